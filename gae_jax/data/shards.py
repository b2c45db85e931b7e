"""Images in ArrayRecord shards: the record, the manifest, and writing a shard whole.

A folder holds ``manifest.json`` and, of every split, ``train-00000-of-00626.array_record`` and so
on. A record is one image on its own::

    4 bytes  b"GIM1"
    4 bytes  label, unsigned, little-endian: the place of its class in the manifest's class_names
    2 bytes  length of the name in bytes, unsigned, little-endian
    n bytes  name of the file, UTF-8
    the rest the file as it was: JPEG, PNG or WebP, never encoded again

Records lie in the order of label and name, over all shards of a split. ArrayRecord is written with
``group_size:1,uncompressed``: any record is read alone, and encoded images do not compress.

This module does not import JAX: the processes that write shards start quickly.
"""

import hashlib
import io
import os
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gae_jax.data.decoding import UNREADABLE, decode
from gae_jax.errors import DataError

WRITER_OPTIONS = "group_size:1,uncompressed"
FORMAT, VERSION = "gae_jax images", 1
_HEADER = struct.Struct("<4sIH")
_MAGIC = b"GIM1"


class Record(NamedTuple):
    """One image: label, name of its file, and the file's content."""

    label: int
    name: str
    content: bytes


def pack(record: Record) -> bytes:
    """The record as it is stored.

    Raises:
      DataError: if the name is longer than 65,535 bytes.
    """
    name = record.name.encode()
    if len(name) > 0xFFFF:
        raise DataError(f"the file name {record.name[:60]}... has more than 65,535 bytes")
    return _HEADER.pack(_MAGIC, record.label, len(name)) + name + record.content


def unpack(stored: bytes) -> Record:
    """The inverse of `pack`.

    Raises:
      ValueError: if these bytes are no record.
    """
    if len(stored) < _HEADER.size or not stored.startswith(_MAGIC):
        raise ValueError("not a record of gae_jax's prepare-data")
    _, label, length = _HEADER.unpack_from(stored)
    end = _HEADER.size + length
    return Record(label, stored[_HEADER.size : end].decode(), stored[end:])


class Example(NamedTuple):
    """Where the file of an image lies: a file of its own, or bytes inside a tar.

    Attributes:
      size: in bytes; -1: the whole file.
    """

    label: int
    name: str
    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """
        Raises:
          DataError: if the disk does not give them.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise DataError(
                f"{self} cannot be read ({error}); mend it and run the same command again: "
                "finished shards stay"
            ) from error
        if self.size >= 0 and len(content) != self.size:
            raise DataError(f"{self}: the file ends before it; is it complete?")
        return content

    def __str__(self) -> str:
        return self.path if self.size < 0 else f"{self.name} in {self.path}"


def shard_name(split: str, index: int, count: int) -> str:
    return f"{split}-{index:05}-of-{count:05}.array_record"


def write_shard(
    path: Path, examples: Sequence[Example], *, check: bool, on_corrupt: str
) -> dict[str, Any]:
    """Writes a shard under a hidden name and gives it its own when it is whole and on disk.

    Args:
      check: decode every image once.
      on_corrupt: what one that cannot be decoded does: "error" or "skip".

    Returns:
      The shard's entry in the manifest.

    Raises:
      DataError: naming the image that cannot be read, or saying why nothing can be written;
        nothing is left of the shard then.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    partial = path.with_name(f".{path.name}.partial")
    labels, skipped = Counter(), []
    try:
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        try:
            for example in examples:
                content = example.read()
                if check and (problem := _problem(content)):
                    if on_corrupt == "error":
                        raise DataError(
                            f"{example} cannot be read as an image ({problem}); mend or remove it, "
                            "or pass --on-corrupt=skip; finished shards stay"
                        )
                    skipped.append(f"{example} ({problem})")
                    continue
                writer.write(pack(Record(example.label, example.name, content)))
                labels[example.label] += 1
        finally:
            writer.close()
        reader = ArrayRecordReader(str(partial))
        found = reader.num_records()
        reader.close()
        if found != labels.total():
            raise RuntimeError(f"{found} of {labels.total()} records came to the disk")
        digest = sha256(partial, sync=True)
        size = partial.stat().st_size
        os.replace(partial, path)
    except (RuntimeError, OSError) as error:  # ArrayRecord raises RuntimeError of a full disk
        raise DataError(
            f"{path} cannot be written ({error}); make room or choose another --out, and run the "
            "same command again: finished shards stay"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return {
        "name": path.name,
        "count": labels.total(),
        "bytes": size,
        "sha256": digest,
        "classes": {str(label): count for label, count in sorted(labels.items())},
        "skipped": skipped,
    }


def _problem(content: bytes) -> str:
    """Why these bytes cannot be decoded; "" if they can."""
    try:
        decode(io.BytesIO(content))
    except UNREADABLE as error:
        return str(error)
    return ""


def sha256(path: Path, *, sync: bool = False) -> str:
    """Of a file's content, in hex.

    Args:
      sync: wait until it is on the disk.
    """
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(
    class_names: list[str], names: dict[str, list[str]], done: dict[str, dict], **facts
) -> dict[str, Any]:
    """The manifest of the shards that are done; complete if these are all that were planned.

    Args:
      names: split -> names of its shards, in order.
      done: name -> entry of the shards that are done.
      facts: what else it says, of where the images came from.
    """
    splits = {}
    for split, planned in names.items():
        listed = [done[name] for name in planned if name in done]
        counts = [0] * len(class_names)
        for shard in listed:
            for label, count in shard["classes"].items():
                counts[int(label)] += count
        splits[split] = {"count": sum(counts), "class_counts": counts, "shards": listed}
    return {
        "format": FORMAT,
        "version": VERSION,
        "complete": all(name in done for planned in names.values() for name in planned),
        **facts,
        "class_names": class_names,
        "splits": splits,
    }


def labels_of(split: dict[str, Any]) -> np.ndarray:
    """int [n], of a split's entry in the manifest, in the order of the records."""
    classes = [item for shard in split["shards"] for item in shard["classes"].items()]
    return np.repeat([int(label) for label, _ in classes], [count for _, count in classes])


def check_manifest(manifest: Any, path: Any) -> None:
    """Refuses what is no manifest of a finished folder.

    Raises:
      DataError: saying what it is instead.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} was not written by prepare-data")
    if manifest["version"] != VERSION:
        raise DataError(
            f"{path} has version {manifest['version']} of the format, this code reads {VERSION}; "
            "write the folder again with this code's prepare-data"
        )
    if not manifest["complete"]:
        raise DataError(f"{path} is unfinished: run the same prepare-data command again")
