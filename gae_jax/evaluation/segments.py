"""Label maps of images, brought to the grid of their latents, for `latent.ssc`.

A map is a PNG at the path of its image, in a separate folder. Of three channels it is one
of COCO's panoptic annotations, whose segment is R + 256 G + 65,536 B; of one channel it holds the
numbers themselves. 0 is no segment.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import explained


def read(path: Path) -> np.ndarray:
    """Read the segments' numbers, int64 [H, W].

    Raises:
      DataError: if there is no such file, or it has neither one channel nor three.
    """
    if not path.is_file():
        raise DataError(
            f"there is no label map {path}; give every held-out image one of its name, or unset "
            "evaluate.segments"
        )
    with (
        explained(path, "make this label map again, or unset evaluate.segments"),
        Image.open(io.BytesIO(path.read_bytes())) as image,
    ):
        values = np.asarray(image).astype(np.int64)
    if values.ndim == 2:
        return values
    if values.ndim == 3 and values.shape[2] == 3:
        return values @ np.array([1, 256, 65_536])
    raise DataError(f"{path} is {list(values.shape)}; a label map has one channel, or COCO's three")


def crop(labels: np.ndarray, size: int, how: str = "adm") -> np.ndarray:
    """Crop [H, W] -> [size, size] as the crop of that name crops images, nearest pixels.

    Args:
      how: a name of `data.images.CROPS`.
    """
    height, width = labels.shape
    if how == "lightningdit":
        longer = int(size * max(height, width) / min(height, width))
        shape = (longer, size) if width <= height else (size, longer)
        first = [round((edge - size) / 2) for edge in shape]
    else:
        edges = [height, width]
        while min(edges) >= 2 * size:
            edges = [edge // 2 for edge in edges]
        scale = size / min(edges)
        shape = tuple(round(edge * scale) for edge in edges)
        first = [(edge - size) // 2 for edge in shape]
    rows, columns = (
        ((start + np.arange(size) + 0.5) * original / edge).astype(int)
        for start, original, edge in zip(first, (height, width), shape, strict=True)
    )
    return labels[rows[:, None], columns]


def to_grid(labels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the most frequent number of each cell, [S, S] -> [h, w]; -1 where that is 0.

    Of equally frequent numbers it is the lowest. (That cells vote is our choice.)

    Raises:
      DataError: if the grid does not divide the map.
    """
    height, width = grid
    if labels.shape[0] % height or labels.shape[1] % width:
        raise DataError(
            f"a label map of {list(labels.shape)} pixels does not divide into the latents' grid of "
            f"{height} x {width}"
        )
    names, numbers = np.unique(labels, return_inverse=True)
    numbers = numbers.reshape(height, labels.shape[0] // height, width, labels.shape[1] // width)
    votes = (numbers[..., None] == np.arange(len(names))).sum(axis=(1, 3))
    winners = names[votes.argmax(axis=-1)]
    return np.where(winners == 0, -1, winners)
