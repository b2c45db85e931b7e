"""The rows of batches as functions of their position, made without JAX or grain.

Worker processes import this module, so it must stay light.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gae_jax.data.images import CROPS, center_crop, random_crop

Fields = dict[str, tuple[tuple[int, ...], np.dtype]]


class Rows(Protocol):
    """Rows of batches, by position; can be pickled.

    Attributes:
      source: the images; `data.sources.base.Encoded` reports unreadable ones.
    """

    source: Any

    @property
    def fields(self) -> Fields:
        """Name -> (shape, dtype) of one row."""

    def fill(self, positions: Sequence[int], out: dict[str, np.ndarray]) -> None:
        """Write the rows of these positions into arrays whose leading axis is the position."""

    def name(self, position: int) -> str:
        """Name the image of a position in errors."""


class Lean:
    """Rows that are pickled without their source's contents, which name every file."""

    source: Any

    def __getstate__(self) -> dict:
        source = self.source
        if hasattr(source, "contents"):
            source = copy.copy(source)
            source.contents = None
        return self.__dict__ | {"source": source}


@functools.cache
def index_shuffle() -> Callable[..., int]:
    """Return grain's shuffle of one index, without importing grain, which would import JAX."""
    if "grain" in sys.modules:  # its module must not be loaded twice
        return sys.modules["grain"].experimental.index_shuffle
    package = importlib.util.find_spec("grain")
    places = package.submodule_search_locations if package else None
    folder = Path(next(iter(places or [""]))) / "_src/python/experimental/index_shuffle/python"
    for path in sorted(folder.glob("index_shuffle_module*.so")):
        loader = importlib.machinery.ExtensionFileLoader("index_shuffle_module", str(path))
        spec = importlib.machinery.ModuleSpec("index_shuffle_module", loader, origin=str(path))
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module.index_shuffle
    import grain

    return grain.experimental.index_shuffle


@dataclasses.dataclass(frozen=True)
class Order:
    """The endless shuffled order of `Batches.examples`, and the random numbers of its positions.

    Attributes:
      count: images of an epoch.
      seed: of the first epoch's shuffle.
      state: of the bit generator (Philox) at position 0; the last word of its counter is the
        position.
    """

    count: int
    seed: int
    state: dict

    def index(self, position: int) -> int:
        """Return the index of the image at a position."""
        epoch, at = divmod(position, self.count)
        seed = (self.seed + epoch) % 2**32
        return index_shuffle()(at, max_index=self.count - 1, seed=seed, rounds=4)

    def reset(self, rng: np.random.Generator, position: int) -> None:
        """Reset a generator to the random numbers of a position."""
        counter = self.state["state"]["counter"].copy()
        counter[-1] = position
        state = self.state["state"] | {"counter": counter}
        rng.bit_generator.state = self.state | {"state": state}


class Augmentation:
    """Crop and mirror images of a source for training.

    Args:
      crop: "center" or "random".
    """

    def __init__(self, *, image_size: int, crop: str, mirror: bool):
        self.size, self._crop, self._mirror = image_size, crop, mirror

    def __call__(self, item: dict, rng: np.random.Generator) -> np.ndarray:
        """Crop an item of the source, and mirror it at random: uint8 [S, S, 3]."""
        if self._crop == "random":
            pixels = random_crop(item["image"], self.size, rng)
        elif "pixels" in item:
            pixels = item["pixels"]
        else:
            pixels = center_crop(item["image"], self.size)
        if self._mirror and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels


class TrainingRows(Lean):
    """Augmented images in a shuffled order: "image" uint8 [S, S, 3] and "label" int32."""

    def __init__(self, source, order: Order, augment: Augmentation):
        self.source, self.order, self._augment = source, order, augment

    @property
    def fields(self) -> Fields:
        size = self._augment.size
        return {
            "image": ((size, size, 3), np.dtype(np.uint8)),
            "label": ((), np.dtype(np.int32)),
        }

    def fill(self, positions: Sequence[int], out: dict[str, np.ndarray]) -> None:
        """Write rows, as `Rows.fill`."""
        rng = np.random.Generator(np.random.Philox(0))
        for row, position in enumerate(positions):
            item = self.source[self.order.index(position)]
            self.order.reset(rng, position)
            copy_pixels(self._augment(item, rng), out["image"][row])
            out["label"][row] = item["label"]

    def name(self, position: int) -> str:
        return name_of(self.source, self.order.index(position))


class OrderedRows(Lean):
    """Every chosen image once, in order: "image", "label", "index" and "valid".

    Args:
      crop: a name in `data.images.CROPS`.
      indices: image of each position; positions behind the end repeat the last, not ``valid``.
    """

    def __init__(self, source, *, image_size: int, crop: str, indices: Sequence[int] | np.ndarray):
        self.source, self._size, self._crop = source, image_size, crop
        self._indices = indices if isinstance(indices, range) else np.asarray(indices, np.int64)

    @property
    def fields(self) -> Fields:
        return {
            "image": ((self._size, self._size, 3), np.dtype(np.uint8)),
            "label": ((), np.dtype(np.int32)),
            "index": ((), np.dtype(np.int64)),
            "valid": ((), np.dtype(np.bool_)),
        }

    def row(self, position: int) -> dict[str, np.ndarray]:
        """Return one row, as `fill` writes it."""
        inside, at = position < len(self._indices), self._index(position)
        item = self.source[at]
        if (pixels := item.get("pixels")) is None:
            pixels = CROPS[self._crop](item["image"], self._size).pixels
        readable = getattr(self.source, "readable", None)
        return {
            "image": pixels,
            "label": np.int32(item["label"]),
            "index": np.int64(at),
            "valid": np.bool_(inside and (readable is None or readable(at))),
        }

    def fill(self, positions: Sequence[int], out: dict[str, np.ndarray]) -> None:
        """Write rows, as `Rows.fill`."""
        for at, position in enumerate(positions):
            for name, value in self.row(position).items():
                out[name][at] = value

    def name(self, position: int) -> str:
        return name_of(self.source, self._index(position))

    def _index(self, position: int) -> int:
        if not len(self._indices):
            return 0
        return int(self._indices[min(position, len(self._indices) - 1)])


def copy_pixels(pixels: np.ndarray, out: np.ndarray) -> None:
    """Copy [H, W, 3]; a mirrored view channel by channel, which takes a fifth of the time."""
    if pixels.strides[1] > 0:
        out[...] = pixels
    else:
        for channel in range(3):
            out[..., channel] = pixels[..., channel]


def name_of(source, index: int) -> str:
    """Name an image of a source in errors."""
    naming = getattr(source, "_name", None)
    return str(naming(index)) if naming else f"image {index} of {source!r}"
