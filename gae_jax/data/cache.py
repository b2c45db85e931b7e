"""Decoded images kept as uint8, so that their decoding is paid once.

Of centre crops the cut pixels are kept, of random crops the decoded images, which the random
resize needs. A folder of the cache is named by what it holds: content of the source, crop,
size, decoder::

    pixels         uint8, image after image, in the order of the source
    index.npz      of every image: where it begins, height, width, label, whether it can be read
    manifest.json  written last, makes the folder valid

A fill that was interrupted goes on where its last note (``partial.npz``) stands. One process of a
host fills, the others wait for it. In memory the same pixels lie without a name, for one process
and its workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import logging
import math
import mmap
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
from PIL import Image

from gae_jax.data.images import center_crop
from gae_jax.data.rows import Fields, Lean, name_of
from gae_jax.runtime.errors import DataError, number_of

CACHES = ("none", "memory", "disk")
VERSION = 1
NOTE_SECONDS = 10.0  # between two notes of how far a fill has come
SAMPLE = 64  # images that tell how large decoded ones are
# Decoded images so many times as large as a crop are not kept: reading them costs as much.
LARGE = 8
BATCH = 256

UNREADABLE, READABLE = 0, 1


class Key(NamedTuple):
    """What a cache holds.

    Attributes:
      content: which images, as `content_of` says.
      kind: "cut": centre crops of ``size``; "decoded": whole images.
    """

    content: str
    kind: str
    size: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        facts = [VERSION, *self, PIL.__version__]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def content_of(source) -> str:
    """What tells the images of a source from others, also from changed files of the same names."""
    fingerprint = getattr(source, "fingerprint", None)
    return f"{source!r} {fingerprint() if fingerprint else ''}"


class DecodedRows(Lean):
    """Images of a source as they are kept; rows for the workers that fill a cache.

    Args:
      capacity: bytes of a row; of a larger image only the size comes.
    """

    def __init__(self, source, kind: str, size: int, capacity: int):
        self.source, self._kind, self._size, self._capacity = source, kind, size, capacity

    @property
    def fields(self) -> Fields:
        number = np.dtype(np.int64)
        named = dict.fromkeys(("height", "width", "label", "state"), ((), number))
        return {"pixels": ((self._capacity,), np.dtype(np.uint8)), **named}

    def read(self, index: int) -> tuple[np.ndarray, int] | None:
        """(pixels [H, W, 3], label); None if the image is to be skipped."""
        item = self.source._read(index)
        if item is None:
            return None
        if self._kind == "cut":
            return center_crop(item["image"], self._size), item["label"]
        return np.asarray(item["image"]), item["label"]

    def fill(self, positions: Sequence[int], out: dict[str, np.ndarray]) -> None:
        for at, index in enumerate(positions):
            found = self.read(index) if index < len(self.source) else None
            out["state"][at] = READABLE if found else UNREADABLE
            pixels, label = found or (np.zeros((0, 0, 3), np.uint8), 0)
            out["height"][at], out["width"][at] = pixels.shape[:2]
            out["label"][at] = label
            if pixels.size <= self._capacity:
                out["pixels"][at, : pixels.size] = pixels.reshape(-1)

    def name(self, position: int) -> str:
        return name_of(self.source, position)


class Index(NamedTuple):
    """Of every image: first byte, height, width, label, and `READABLE` or not; int64 [n]."""

    start: np.ndarray
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray
    state: np.ndarray


class CachedImages:
    """The images of a source from a cache, by index, as the source gives them.

    Items have "pixels", uint8 [S, S, 3], of centre crops, else "image", and "label". An image that
    could not be read is replaced by the next one, as `data.sources.base.Encoded` does.

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
        """Whether the image of this index, not a replacement, can be read."""
        return bool(self._index.state[index] == READABLE)

    def _name(self, index: int) -> str:
        return name_of(self._source, index)

    def __repr__(self) -> str:
        return repr(self._source)

    def __getstate__(self) -> dict:
        dropped = {"_pixels", "_source"}  # workers read the pixels alone
        return {key: value for key, value in self.__dict__.items() if key not in dropped}


# Filled or found by this process; runs of a sweep share them.
_CACHED: dict[tuple[str, str], CachedImages] = {}
# (content, size of a crop) of images that were found too large to keep.
_TOO_LARGE: set[tuple[str, int]] = set()
_CONTENTS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

Reader = Callable[[DecodedRows, int, int], Iterable[dict[str, np.ndarray]]]


def cached(
    source, *, where: str, folder: str, crop: str, image_size: int, read: Reader, whole: bool = True
):
    """The source from its cache, which is filled first if it must be.

    Args:
      where: one of `CACHES`.
      folder: of the caches on disk; "": `default_folder`.
      crop: of training: "center" or "random".
      read: (rows, first position, size of a batch) -> batches to the end of the source.
      whole: most images are going to be read; else a cache is used only if it is there.

    Returns:
      `CachedImages`; the source itself where nothing is cached.

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
        if not whole and not (where == "disk" and (home / "manifest.json").exists()):
            return source
        if (key.content, image_size) in _TOO_LARGE:
            return source
        if (capacity := _capacity(source, kind, image_size)) is None:
            _TOO_LARGE.add((key.content, image_size))
            _say_too_large(image_size)
            return source
        if where == "memory":
            _CACHED[name] = _in_memory(source, key, capacity, read)
        else:
            _CACHED[name] = _on_disk(source, key, home, capacity, read)
    for at, problem in _CACHED[name].unreadable.items():
        source.note(at, problem)
    return _CACHED[name]


def default_folder() -> Path:
    """Where caches lie unless ``data.cache_dir`` says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gae_jax" / "images"


def _capacity(source, kind: str, size: int) -> int | None:
    """Bytes of most images as they are kept; None if they are too large to keep."""
    if kind == "cut":
        return 3 * size * size
    sample = np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int)
    sizes = [math.prod(source[int(index)]["image"].size) * 3 for index in sample]
    largest, mean = max(sizes), sum(sizes) / len(sizes)
    return None if mean > LARGE * 3 * size * size else largest


@functools.cache
def _say_too_large(size: int) -> None:
    """Tell once, and not for every split and pipeline, that images are not kept."""
    logging.warning(
        "data.cache: random crops need whole images, which are more than %d times as large here as "
        "a crop of %d pixels: they are decoded anew; store them smaller, or use data.crop=center",
        *(LARGE, size),
    )


def _needed(source, key: Key, capacity: int) -> int:
    return len(source) * capacity


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _in_memory(source, key: Key, capacity: int, read: Reader) -> CachedImages:
    from gae_jax.data.workers import anonymous_memory

    needed = _needed(source, key, capacity)
    free = _free_memory()
    if free is not None and needed > 0.9 * free:
        raise DataError(
            f"data.cache=memory needs {_gib(needed)} for {number_of(len(source), 'image')}, "
            f"{_gib(free)} are free; use data.cache=disk or data.cache=none"
        )
    count = number_of(len(source), "image")
    logging.info("data.cache: %s, %s of memory", count, _gib(needed))
    handle = anonymous_memory(0)
    with os.fdopen(os.dup(handle), "wb") as file:
        index, _ = _fill(source, key, capacity, read, file, None)
    found = CachedImages(source, key, handle, index)
    weakref.finalize(found, os.close, handle)
    return found


def _free_memory() -> int | None:
    """Bytes that can be had; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _on_disk(source, key: Key, home: Path, capacity: int, read: Reader) -> CachedImages:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock:
            _await(lock, home)
            if not (home / "manifest.json").exists():
                _fill_folder(source, key, home, capacity, read)
    except OSError as error:
        raise DataError(
            f"data.cache=disk: {home} cannot be written ({error}); make room, choose another "
            "data.cache_dir, or use data.cache=none; what is there is used when it goes on"
        ) from error
    with np.load(home / "index.npz") as file:
        index = Index(*(file[name] for name in Index._fields))
    manifest = json.loads((home / "manifest.json").read_text())
    size = (home / "pixels").stat().st_size
    if size != manifest["bytes"]:
        raise DataError(
            f"{home}/pixels has {size} bytes, its manifest says {manifest['bytes']}; remove "
            f"{home} and start again"
        )
    for at, problem in manifest["problems"].items():
        source.note(int(at), problem)
    logging.info("data.cache: images are read from %s", home)
    return CachedImages(source, key, home / "pixels", index)


def _await(lock: BinaryIO, home: Path) -> None:
    """Takes a lock, and says so if another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logging.info("data.cache: another process fills %s; waiting for it", home)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _fill_folder(source, key: Key, home: Path, capacity: int, read: Reader) -> None:
    note, pixels = home / "partial.npz", home / "pixels.partial"
    done = pixels.stat().st_size if note.exists() and pixels.exists() else 0
    needed, free = _needed(source, key, capacity) - done, shutil.disk_usage(home).free
    if needed > free:
        raise DataError(
            f"data.cache=disk needs {_gib(needed)} for {number_of(len(source), 'image')} in "
            f"{home}, {_gib(free)} are free; make room, choose another data.cache_dir, or use "
            "data.cache=none"
        )
    logging.info(
        "data.cache: %s, %s, decoded once into %s (%s free)",
        *(number_of(len(source), "image"), _gib(needed), home, _gib(free)),
    )
    with pixels.open("ab") as file:
        index, end = _fill(source, key, capacity, read, file, note)
        file.flush()
        os.fsync(file.fileno())
    problems = {str(at): text for at, text in source.problems.items()}
    _write(home / "index.npz", _npz(index))
    os.replace(pixels, home / "pixels")
    facts = {"version": VERSION, "of": key.content, "kind": key.kind, "size": key.size}
    facts |= {"images": len(source), "bytes": end, "problems": problems}
    _write(home / "manifest.json", json.dumps(facts, indent=2).encode())
    note.unlink(missing_ok=True)


def _fill(
    source, key: Key, capacity: int, read: Reader, file: BinaryIO, note: Path | None
) -> tuple[Index, int]:
    """Writes the pixels of all images behind each other; returns (their index, bytes).

    Args:
      note: where to write down now and then how far it has come, and to go on from.
    """
    index = Index(*(np.zeros(len(source), np.int64) for _ in Index._fields))
    first, end = _go_on(index, file, note, source)
    rows, noted = DecodedRows(source, key.kind, key.size, capacity), time.monotonic()
    said = noted
    batches = read(rows, first // BATCH, BATCH)
    try:
        for batch in batches:
            count = min(BATCH, len(source) - first)
            sizes = 3 * batch["height"][:count] * batch["width"][:count]
            mine = slice(first, first + count)
            index.start[mine] = end + np.cumsum(sizes) - sizes
            for name in Index._fields[1:]:
                getattr(index, name)[mine] = batch[name][:count]
            if (sizes == capacity).all():
                file.write(batch["pixels"][:count].data)
            else:
                for at, size in enumerate(sizes.tolist()):
                    whole = size <= capacity
                    pixels = batch["pixels"][at, :size] if whole else rows.read(first + at)[0]
                    file.write(np.ascontiguousarray(pixels).data)
            end += int(sizes.sum())
            first += count
            now = time.monotonic()
            if note is not None and now - noted > NOTE_SECONDS:
                file.flush()
                os.fsync(file.fileno())
                problems = json.dumps({str(at): text for at, text in source.problems.items()})
                _write(note, _npz(index, first=first, end=end, problems=problems))
                noted = now
            if now - said > 60:
                logging.info("data.cache: %d of %d images", first, len(source))
                said = now
    finally:
        if hasattr(batches, "close"):
            batches.close()
    return index, end


def _go_on(index: Index, file: BinaryIO, note: Path | None, source) -> tuple[int, int]:
    """(images, bytes) that an interrupted fill left, whose index is restored; (0, 0) if none."""
    if note is None:
        return 0, 0
    first = end = 0
    if note.exists():
        with np.load(note) as found:
            if os.fstat(file.fileno()).st_size >= int(found["end"]):
                first, end = int(found["first"]), int(found["end"])
                for name, column in zip(Index._fields, index, strict=True):
                    column[:] = found[name]
                for at, problem in json.loads(str(found["problems"])).items():
                    source.note(int(at), problem)
                logging.info("data.cache: goes on at image %d", first)
    file.truncate(end)
    return first, end


def _npz(index: Index, **more) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **index._asdict(), **more)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """A file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
