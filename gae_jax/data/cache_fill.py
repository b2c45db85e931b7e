"""Filling a cache of decoded images, in memory or in a folder.

A folder is named after what it holds (content of the source, crop, size, decoder)::

    pixels         uint8, image after image, in the order of the source
    index.npz      of every image: where it begins, height, width, label, whether it is readable
    manifest.json  written last, makes the folder valid

An interrupted fill resumes from its last note (``partial.npz``). One process of a host fills a
folder, the others wait for it. In memory the same pixels are anonymous, for one process and its
workers.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from gae_jax.data.cached_images import VERSION, CachedImages, DecodedRows, Index, Key
from gae_jax.data.workers import anonymous_memory
from gae_jax.runtime.errors import DataError, WriteError, number_of
from gae_jax.runtime.files import explained, read_npz, read_object, write_json, write_npz

NOTE_SECONDS = 10.0  # between two notes of a fill's progress
BATCH = 256  # images

Reader = Callable[[DecodedRows, int, int], Iterable[dict[str, np.ndarray]]]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def fill_memory(source, key: Key, capacity: int, read: Reader) -> CachedImages:
    """Cache a source in anonymous memory.

    Args:
      capacity: bytes that most images take.
      read: as `cache.cached`.

    Raises:
      DataError: if the memory does not suffice.
    """
    needed, free = len(source) * capacity, _free_memory()
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
    images = CachedImages(source, key, handle, index)
    weakref.finalize(images, os.close, handle)
    return images


def _free_memory() -> int | None:
    """Return the bytes of memory that are available; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def open_folder(source, key: Key, home: Path, capacity: int, read: Reader) -> CachedImages:
    """Open the cache of a source in a folder, which is filled first if it is not yet complete.

    Args:
      capacity, read: as `fill_memory`.

    Raises:
      DataError: if the disk is full, or the cache is damaged.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock:
            _await(lock, home)
            if not (home / "manifest.json").exists():
                _fill_folder(source, key, home, capacity, read)
    except (OSError, WriteError) as error:
        raise DataError(
            f"data.cache=disk: {home} cannot be written ({error}); make room, choose another "
            "data.cache_dir, or use data.cache=none; a later run resumes from what is written"
        ) from error
    remedy = f"remove {home} and start again"
    index = Index(**read_npz(home / "index.npz", *Index._fields, remedy=remedy))
    manifest = read_object(home / "manifest.json", remedy=remedy, bytes=int, problems=dict)
    with explained(home / "pixels", remedy):
        size = (home / "pixels").stat().st_size
    if size != manifest["bytes"]:
        raise DataError(
            f"{home}/pixels has {size} bytes, its manifest says {manifest['bytes']}; {remedy}"
        )
    for at, problem in manifest["problems"].items():
        source.note(int(at), problem)
    logging.info("data.cache: images are read from %s", home)
    return CachedImages(source, key, home / "pixels", index)


def _await(lock: IO, home: Path) -> None:
    """Take a lock, and log it if another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logging.info("data.cache: another process fills %s; waiting for it", home)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _fill_folder(source, key: Key, home: Path, capacity: int, read: Reader) -> None:
    note, pixels = home / "partial.npz", home / "pixels.partial"
    done = pixels.stat().st_size if note.exists() and pixels.exists() else 0
    needed, free = len(source) * capacity - done, shutil.disk_usage(home).free
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
    write_npz(home / "index.npz", index._asdict(), own=True)
    os.replace(pixels, home / "pixels")
    facts = {"version": VERSION, "of": key.content, "kind": key.kind, "size": key.size}
    facts |= {"images": len(source), "bytes": end, "problems": problems}
    write_json(home / "manifest.json", facts, own=True)
    note.unlink(missing_ok=True)


def _fill(
    source, key: Key, capacity: int, read: Reader, file: BinaryIO, note: Path | None
) -> tuple[Index, int]:
    """Write the pixels of all images one after the other.

    Args:
      note: file of the progress, written every `NOTE_SECONDS`, from which a fill resumes.

    Returns:
      (index of the images, bytes in all).
    """
    index = Index(*(np.zeros(len(source), np.int64) for _ in Index._fields))
    first, end = _resume(index, file, note, source)
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
                    pixels = batch["pixels"][at, :size]
                    if size > capacity:
                        pixels = rows.read_again(first + at, size)
                    file.write(np.ascontiguousarray(pixels).data)
            end += int(sizes.sum())
            first += count
            now = time.monotonic()
            if note is not None and now - noted > NOTE_SECONDS:
                file.flush()
                os.fsync(file.fileno())
                problems = json.dumps({str(at): text for at, text in source.problems.items()})
                facts = {"first": first, "end": end, "problems": problems}
                progress = {name: np.asarray(value) for name, value in facts.items()}
                write_npz(note, index._asdict() | progress, own=True)
                noted = now
            if now - said > 60:
                logging.info("data.cache: %d of %d images", first, len(source))
                said = now
    finally:
        if hasattr(batches, "close"):
            batches.close()
    return index, end


def _resume(index: Index, file: BinaryIO, note: Path | None, source) -> tuple[int, int]:
    """Restore the index of an interrupted fill.

    Returns:
      (images, bytes) that are written; (0, 0) if there are none.
    """
    if note is None:
        return 0, 0
    first = end = 0
    if note.exists():
        noted = read_npz(note, remedy=f"remove {note} and start again")
        if os.fstat(file.fileno()).st_size >= int(noted["end"]):
            first, end = int(noted["first"]), int(noted["end"])
            for name, column in zip(Index._fields, index, strict=True):
                column[:] = noted[name]
            for at, problem in json.loads(str(noted["problems"])).items():
                source.note(int(at), problem)
            logging.info("data.cache: resumes at image %d", first)
    file.truncate(end)
    return first, end
