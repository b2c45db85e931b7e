"""What a cache of decoded images holds, and reading images from it.

Of centre crops the cropped pixels are cached; of random crops the decoded images, which the random
resize needs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from gae_jax.data.images import center_crop
from gae_jax.data.rows import Fields, Lean, name_of
from gae_jax.runtime.errors import DataError

VERSION = 1  # of the format; see `cache_fill`
UNREADABLE, READABLE = 0, 1


class Key(NamedTuple):
    """What a cache holds.

    Attributes:
      content: which images, as `content_of` says.
      kind: "cut": centre crops of ``size``; "decoded": uncropped images.
    """

    content: str
    kind: str
    size: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        facts = [VERSION, *self, PIL.__version__]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


class DecodedRows(Lean):
    """The images of a source as a cache holds them, as rows for the workers that fill it.

    Args:
      capacity: bytes of a row; a larger image comes without pixels, by its size alone.
    """

    def __init__(self, source, kind: str, size: int, capacity: int):
        self.source, self._kind, self._size, self._capacity = source, kind, size, capacity

    @property
    def fields(self) -> Fields:
        number = np.dtype(np.int64)
        named = dict.fromkeys(("height", "width", "label", "state"), ((), number))
        return {"pixels": ((self._capacity,), np.dtype(np.uint8)), **named}

    def read(self, index: int) -> tuple[np.ndarray, int] | None:
        """Return (pixels [H, W, 3], label); None if the image is to be skipped."""
        item = self.source._read(index)
        if item is None:
            return None
        if self._kind == "cut":
            return center_crop(item["image"], self._size), item["label"]
        return np.asarray(item["image"]), item["label"]

    def read_again(self, index: int, size: int) -> np.ndarray:
        """Read the pixels [H, W, 3] of an image that had ``size`` numbers when it was first read.

        Raises:
          DataError: if it has changed since then.
        """
        image = self.read(index)
        if image is None or image[0].size != size:
            raise DataError(
                f"{self.name(index)} has changed while the cache was filled; wait until nothing "
                "writes there and start again"
            )
        return image[0]

    def fill(self, positions: Sequence[int], out: dict[str, np.ndarray]) -> None:
        for at, index in enumerate(positions):
            image = self.read(index) if index < len(self.source) else None
            out["state"][at] = READABLE if image else UNREADABLE
            pixels, label = image or (np.zeros((0, 0, 3), np.uint8), 0)
            out["height"][at], out["width"][at] = pixels.shape[:2]
            out["label"][at] = label
            if pixels.size <= self._capacity:
                out["pixels"][at, : pixels.size] = pixels.reshape(-1)

    def name(self, position: int) -> str:
        return name_of(self.source, position)


class Index(NamedTuple):
    """First byte, height, width, label and state (`READABLE`?) of every image; int64 [n]."""

    start: np.ndarray
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray
    state: np.ndarray


class CachedImages:
    """The images of a source, read by index from a cache instead of decoded.

    Items have "label" and "pixels", uint8 [S, S, 3], of centre crops, else "image". An unreadable
    image is replaced by the next one, as in `data.sources.base.Encoded`.

    Args:
      place: the file of the pixels, or a file descriptor of them.
    """

    def __init__(self, source, key: Key, place: Path | int, index: Index):
        self._source, self.key, self._place, self._index = source, key, place, index
        self.class_names, self.unreadable = source.class_names, dict(source.problems)

    @property
    def handles(self) -> tuple[int, ...]:
        """File descriptors that worker processes need."""
        return (self._place,) if isinstance(self._place, int) else ()

    @functools.cached_property
    def _pixels(self) -> np.ndarray:
        handle = self._place if isinstance(self._place, int) else os.open(self._place, os.O_RDONLY)
        try:
            if not (size := os.fstat(handle).st_size):  # no image can be read
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(handle, size, access=mmap.ACCESS_READ), np.uint8)
        finally:
            if handle != self._place:
                os.close(handle)

    def __len__(self) -> int:
        return len(self._index.state)

    def __getitem__(self, index: int) -> dict:
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            if self._index.state[at] == READABLE:
                return self._item(at)
        raise DataError(f"none of the {len(self)} images of {self!r} can be read")

    def _item(self, at: int) -> dict:
        start, height, width, label, _ = (int(column[at]) for column in self._index)
        pixels = self._pixels[start : start + 3 * height * width].reshape(height, width, 3)
        what = "pixels" if self.key.kind == "cut" else "image"
        return {what: pixels if what == "pixels" else Image.fromarray(pixels), "label": label}

    def readable(self, index: int) -> bool:
        """Return whether the image of this index, not a replacement, can be read."""
        return bool(self._index.state[index] == READABLE)

    def _name(self, index: int) -> str:
        return name_of(self._source, index)

    def __repr__(self) -> str:
        return repr(self._source)

    def __getstate__(self) -> dict:
        dropped = {"_pixels", "_source"}  # workers read the pixels alone
        return {key: value for key, value in self.__dict__.items() if key not in dropped}
