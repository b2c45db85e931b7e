"""The cache of decoded images: each image is decoded once, then read as uint8 pixels."""

from __future__ import annotations

import functools
import logging
import math
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from gae_jax.data.cache_fill import Reader, fill_memory, open_folder
from gae_jax.data.cached_images import CachedImages, Key

CACHES = ("none", "memory", "disk")
SAMPLE = 64  # images from which the size of decoded images is estimated
# Decoded images that are this many times as large as a crop are not cached: reading them costs as
# much as decoding.
LARGE = 8


def content_of(source) -> str:
    """Return what identifies a source's images, files changed under the same names included."""
    fingerprint = getattr(source, "fingerprint", None)
    return f"{source!r} {fingerprint() if fingerprint else ''}"


# Caches that this process has filled or opened; the runs of a sweep share them.
_CACHED: dict[tuple[str, str], CachedImages] = {}
# (content, size of a crop) of images that are too large to cache.
_TOO_LARGE: set[tuple[str, int]] = set()
_CONTENTS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def cached(
    source, *, where: str, folder: str, crop: str, image_size: int, read: Reader, most: bool = True
):
    """Return the images of a source from its cache, which is filled first if necessary.

    Args:
      where: one of `CACHES`.
      folder: of the caches on disk; "": `default_folder`.
      crop: of training: "center" or "random".
      read: (rows, first position, size of a batch) -> batches to the end of the source.
      most: whether most images are going to be read; if not, only an existing cache is used.

    Returns:
      `CachedImages`, or the source itself where nothing is cached.

    Raises:
      DataError: if there is no room, or an image cannot be read and is not to be skipped.
    """
    if where == "none":
        return source
    kind = "decoded" if crop == "random" else "cut"
    if source not in _CONTENTS:
        _CONTENTS[source] = content_of(source)
    key = Key(_CONTENTS[source], kind, image_size if kind == "cut" else 0)
    home = (Path(folder).absolute() if folder else default_folder()) / key.name
    name = (where, str(home))
    if name not in _CACHED:
        if not most and not (where == "disk" and (home / "manifest.json").exists()):
            return source
        if (key.content, image_size) in _TOO_LARGE:
            return source
        if (capacity := _capacity(source, kind, image_size)) is None:
            _TOO_LARGE.add((key.content, image_size))
            _warn_too_large(image_size)
            return source
        if where == "memory":
            _CACHED[name] = fill_memory(source, key, capacity, read)
        else:
            _CACHED[name] = open_folder(source, key, home, capacity, read)
    for at, problem in _CACHED[name].unreadable.items():
        source.note(at, problem)
    return _CACHED[name]


def default_folder() -> Path:
    """Return the folder of the caches where ``data.cache_dir`` is empty."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gae_jax" / "images"


def _capacity(source, kind: str, size: int) -> int | None:
    """Return the bytes that most images take in the cache; None if they are too large for it."""
    if kind == "cut":
        return 3 * size * size
    sample = np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int)
    sizes = [math.prod(source[int(index)]["image"].size) * 3 for index in sample]
    largest, mean = max(sizes), sum(sizes) / len(sizes)
    return None if mean > LARGE * 3 * size * size else largest


@functools.cache
def _warn_too_large(size: int) -> None:
    """Warn once, and not for every split and pipeline, that images are not cached."""
    logging.warning(
        "data.cache: random crops need whole images, which are more than %d times as large here as "
        "a crop of %d pixels: they are not cached but decoded again each time; store them smaller, "
        "or use data.crop=center",
        *(LARGE, size),
    )
