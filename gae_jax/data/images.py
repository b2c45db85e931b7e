"""Crops of decoded images. Worker processes import this module, so it imports no JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from gae_jax.data.contents import printable
from gae_jax.data.decoding import CALLED
from gae_jax.runtime.errors import DataError

# Images with a larger aspect ratio are cropped before they are resized: 1 x 4,000 pixels would
# become 256 x 1,024,000. The pixels of the crop are the same up to rounding.
LONGEST = 32


class Crop(NamedTuple):
    """A cropped image; reconstructions of ``values`` are compared with ``pixels``.

    Attributes:
      pixels: uint8 [S, S, 3], for PSNR and FID.
      values: float32 [S, S, 3] in [-1, 1], for an encoder.
    """

    pixels: np.ndarray
    values: np.ndarray


@contextlib.contextmanager
def _naming(image: Image.Image) -> Iterator[None]:
    """Name the file in whatever is raised while an image is cropped.

    Raises:
      DataError: for any exception.
    """
    try:
        yield
    except Exception as error:  # whatever fails, the error must name the image
        called = image.info.get(CALLED, lambda: "an image")()
        what = str(error) or type(error).__name__
        raise DataError(
            f"{printable(called)} of {image.width} x {image.height} pixels cannot be cut "
            f"({what}); remove it or make it smaller"
        ) from error


def _halved(image: Image.Image, size: int) -> Image.Image:
    """Halve with a box filter while the short side allows it: the first step of ADM's resize."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    return image


def _resized_shape(image: Image.Image, size: int) -> tuple[int, int]:
    """Return (width, height) with the short side ``size``."""
    scale = size / min(image.size)
    width, height = (round(x * scale) for x in image.size)
    return width, height


def _part(
    image: Image.Image, shape: tuple[int, int], left: int, top: int, size: int, resample: int
) -> np.ndarray:
    """Crop ``size`` x ``size`` pixels from (left, top) of an image resized to ``shape``."""
    if max(shape) <= LONGEST * min(shape):
        return np.asarray(image.resize(shape, resample=resample))[
            top : top + size, left : left + size
        ]
    across, down = image.width / shape[0], image.height / shape[1]
    box = (
        *(min(left * across, image.width), min(top * down, image.height)),
        *(min((left + size) * across, image.width), min((top + size) * down, image.height)),
    )
    return np.asarray(image.resize((size, size), resample=resample, box=box))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop the centre as ADM does (guided-diffusion, image_datasets.py): uint8 [size, size, 3].

    Halve with a box filter while possible, then resize bicubic until the short side is ``size``.

    Raises:
      DataError: naming the file, if it cannot be cropped.
    """
    with _naming(image):
        image = _halved(image, size)
        shape = _resized_shape(image, size)
        left, top = ((edge - size) // 2 for edge in shape)
        return _part(image, shape, left, top, size, Image.Resampling.BICUBIC)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crop at random as ADM does, uint8 [size, size, 3]; the short side is size .. size / 0.8.

    Raises:
      DataError: as `center_crop`.
    """
    with _naming(image):
        short = int(rng.integers(size, int(size / 0.8) + 1))
        image = _halved(image, short)
        shape = _resized_shape(image, short)
        top, left = (int(rng.integers(edge - size + 1)) for edge in shape[::-1])
        return _part(image, shape, left, top, size, Image.Resampling.BICUBIC)


def adm_crop(image: Image.Image, size: int) -> Crop:
    """Apply `center_crop` to an RGB image, as for GAE's latents, RAE and ADM's statistics."""
    pixels = center_crop(image, size)
    return Crop(pixels, pixels.astype(np.float32) / np.float32(127.5) - 1)


def lightningdit_crop(image: Image.Image, size: int) -> Crop:
    """Crop an RGB image as LightningDiT's evaluation of tokenizers does.

    torchvision's ToTensor, Resize(size), CenterCrop(size) and Normalize(0.5, 0.5), in this order:
    the short side is resized on float32 values, bilinear with antialiasing (the default since
    torchvision 0.17), the long side is rounded down. ``values`` are not quantised; ``pixels`` are
    the values after LightningDiT's quantiser, as its script writes them to disk.
    """
    with _naming(image):
        width, height = image.size
        short, long = min(width, height), max(width, height)
        longer = int(size * long / short)
        shape = (size, longer) if width <= height else (longer, size)
        # torchvision rounds half offsets to the even side
        left, top = (round((edge - size) / 2) for edge in shape)
        channels = []
        for channel in image.split():
            values = np.asarray(channel, np.float32) / 255
            if image.size != shape:
                # in mode F, PIL neither rounds nor clamps: the same weighted sums as torch's
                plane = Image.fromarray(values)
                channels.append(_part(plane, shape, left, top, size, Image.Resampling.BILINEAR))
            else:
                channels.append(values[top : top + size, left : left + size])
        array = np.stack(channels, axis=-1)
    values = 2 * array - 1
    pixels = np.clip(127.5 * values + 128, 0, 255).astype(np.uint8)
    return Crop(pixels, values)


CROPS: dict[str, Callable[[Image.Image, int], Crop]] = {
    "adm": adm_crop,
    "lightningdit": lightningdit_crop,
}
