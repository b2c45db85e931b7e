"""Images in ArrayRecord shards: the record, the manifest, and atomic writing of shards.

A folder holds ``manifest.json`` and, of every split, ``train-00000-of-00626.array_record`` and so
on. A record is one image on its own::

    4 bytes  b"GIM1"
    4 bytes  label, unsigned, little-endian: index into the manifest's class_names
    2 bytes  length of the name in bytes, unsigned, little-endian
    n bytes  name of the file, UTF-8
    the rest the original file: JPEG, PNG or WebP, never encoded again

Records are in the order of label and name, over all shards of a split. ArrayRecord is written with
``group_size:1,uncompressed``: records are read one by one, and encoded images do not compress.

This module does not import JAX, so that the processes that write shards start quickly.
"""

import hashlib
import io
import os
import re
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gae_jax.data.decoding import decode
from gae_jax.runtime.errors import DataError, number_of

WRITER_OPTIONS = "group_size:1,uncompressed"
FORMAT, VERSION = "gae_jax images", 1
_HEADER = struct.Struct("<4sIH")
_MAGIC = b"GIM1"
NAMES = ("utf-8", "surrogateescape")  # of file names; other encodings survive unchanged


class Record(NamedTuple):
    """One image: label, name of its file, and the file's content."""

    label: int
    name: str
    content: bytes


def pack(record: Record) -> bytes:
    """Serialize a record.

    Raises:
      DataError: if the name is longer than 65,535 bytes.
    """
    name = record.name.encode(*NAMES)
    if len(name) > 0xFFFF:
        raise DataError(f"the file name {record.name[:60]}... has more than 65,535 bytes")
    return _HEADER.pack(_MAGIC, record.label, len(name)) + name + record.content


def unpack(stored: bytes) -> Record:
    """Invert `pack`.

    Raises:
      ValueError: if the bytes are not a record.
    """
    if len(stored) < _HEADER.size or not stored.startswith(_MAGIC):
        raise ValueError("not a record of gae_jax's prepare-data")
    _, label, length = _HEADER.unpack_from(stored)
    end = _HEADER.size + length
    if len(stored) < end:
        raise ValueError("a record that ends inside its name")
    return Record(label, stored[_HEADER.size : end].decode(*NAMES), stored[end:])


class Example(NamedTuple):
    """The location of an image's content: a file, or bytes inside a tar.

    Attributes:
      offset: in the tar; -1 for a file.
      size: in bytes; -1 if unknown.
    """

    label: int
    name: str
    path: str
    offset: int = -1
    size: int = -1

    def read(self) -> bytes:
        """Read the content.

        Raises:
          DataError: if it cannot be read, or its size has changed since it was listed.
        """
        inside = self.offset >= 0
        try:
            with open(self.path, "rb") as file:
                file.seek(max(self.offset, 0))
                content = file.read(self.size if inside else -1)
        except OSError as error:
            raise DataError(
                f"{self} cannot be read ({error}); repair it and run the same command again: "
                "finished shards stay"
            ) from error
        if len(content) != self.size and (inside or self.size >= 0):
            raise DataError(
                f"{self} has {len(content)} bytes, {self.size} when it was listed; wait until "
                "nothing writes there and run the same command again: finished shards stay"
            )
        return content

    def __str__(self) -> str:
        return f"{self.name} in {self.path}" if self.offset >= 0 else self.path


def listing_of(examples: Sequence[Example]) -> str:
    """Hash the labels, names and sizes of images, not their paths."""
    digest = hashlib.sha256()
    for label, name, _, _, size in examples:
        digest.update(f"{label} {size} {len(name)} {name}\n".encode(*NAMES))
    return digest.hexdigest()[:16]


SHARD_NAME = re.compile(r"(train|val)-\d{5}-of-\d{5}\.array_record")


def digest_of_names(names: Sequence[str]) -> bytes:
    """Hash names in their order with SHA-256."""
    return hashlib.sha256("\n".join(names).encode(*NAMES)).digest()


def shard_name(split: str, index: int, count: int) -> str:
    """Return the file name of shard ``index`` of ``count``."""
    return f"{split}-{index:05}-of-{count:05}.array_record"


def write_shard(
    path: Path, examples: Sequence[Example], *, check: bool, on_corrupt: str
) -> dict[str, Any]:
    """Write a shard under a hidden name, and rename it when it is complete and on disk.

    Args:
      check: decode every image once.
      on_corrupt: images that cannot be decoded: "error" or "skip".

    Returns:
      The shard's entry in the manifest.

    Raises:
      DataError: naming the image that cannot be read, or saying why nothing can be written;
        nothing is left of the shard then.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    # named by process: one that outlived a killed session may still be writing the same shard
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    labels: Counter[int] = Counter()
    skipped = []
    try:
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        try:
            for example in examples:
                content = example.read()
                if check and (problem := _problem(content)):
                    if on_corrupt == "error":
                        raise DataError(
                            f"{example} cannot be read as an image ({problem}); repair or remove "
                            "it, or pass --on-corrupt=skip; finished shards stay"
                        )
                    skipped.append(f"{example} ({problem})")
                    continue
                writer.write(pack(Record(example.label, example.name, content)))
                labels[example.label] += 1
        finally:
            writer.close()
        reader = ArrayRecordReader(str(partial))
        written = reader.num_records()
        reader.close()
        if written != labels.total():
            raise RuntimeError(f"{written} of {labels.total()} records came to the disk")
        digest = sha256(partial, sync=True)
        size = partial.stat().st_size
        os.replace(partial, path)
    except (RuntimeError, OSError) as error:  # ArrayRecord raises RuntimeError on a full disk
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
        "listing": listing_of(examples),
        "checked": check,
    }


def _problem(content: bytes) -> str:
    """Say why these bytes cannot be decoded; "" if they can."""
    try:
        decode(io.BytesIO(content))
    except Exception as error:  # on damaged content decoders raise anything
        return str(error) or type(error).__name__
    return ""


def sha256(path: Path, *, sync: bool = False) -> str:
    """Hash a file's content with SHA-256, in hex.

    Args:
      sync: first wait until it is on disk.
    """
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(
    class_names: list[str], names: dict[str, list[str]], done: dict[str, dict], **facts
) -> dict[str, Any]:
    """Make the manifest of the finished shards; it is complete if they are all planned shards.

    Args:
      names: split -> names of its planned shards, in order.
      done: name -> entry, of the finished shards.
      facts: further values, such as the origin of the images.
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
    """Return the labels, int [n], of a split's entry in the manifest, in the order of records."""
    classes = [item for shard in split["shards"] for item in shard["classes"].items()]
    return np.repeat([int(label) for label, _ in classes], [count for _, count in classes])


def check_manifest(manifest: Any, path: Any, *, complete: bool = True) -> None:
    """Check that a JSON value is the manifest of a folder of shards.

    Args:
      complete: also refuse a manifest that lists only a part of the shards.

    Raises:
      DataError: saying what is wrong.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} was not written by prepare-data")
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path} has version {manifest.get('version')} of the format, this code reads "
            f"{VERSION}; write the folder again with this code's prepare-data"
        )
    if problem := _problem_of_manifest(manifest):
        raise DataError(
            f"{path} is damaged ({problem}); write the folder again with: prepare-data --fresh"
        )
    if complete and not manifest["complete"]:
        raise DataError(f"{path} is unfinished: run the same prepare-data command again")


def _problem_of_manifest(manifest: dict) -> str:
    """Say what is wrong with a manifest; "" if nothing is."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 48

    names, splits = manifest.get("class_names"), manifest.get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "class_names is no list of names"
    if not isinstance(splits, dict) or not splits.keys() <= {"train", "val"}:
        return "splits is not of train and val"
    if type(manifest.get("complete")) is not bool:
        return "complete is neither true nor false"
    made_of = manifest.get("made_of", {})
    images = made_of.get("images", splits) if isinstance(made_of, dict) else None
    if not isinstance(images, dict) or images.keys() != splits.keys():
        return f"made_of is of other splits than {', '.join(splits) or 'none'}"
    for split, facts in splits.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("shards"), list):
            return f"{split} has no list of shards"
        for shard in facts["shards"]:
            if not isinstance(shard, dict) or not SHARD_NAME.fullmatch(str(shard.get("name"))):
                return f"{split} lists a shard without a proper name"
            name, classes = shard["name"], shard.get("classes")
            if not is_count(shard.get("count")) or not is_count(shard.get("bytes")):
                return f"{name} has no count or no bytes"
            if not isinstance(shard.get("sha256"), str):
                return f"{name} has no sha256"
            if not isinstance(shard.get("skipped"), list):
                return f"{name} has no list of skipped images"
            if not isinstance(classes, dict) or not all(map(is_count, classes.values())):
                return f"{name} has no counts of classes"
            if any(not re.fullmatch("[0-9]{1,9}", x) or int(x) >= len(names) for x in classes):
                return f"{name} has labels that are none of {len(names)} classes"
            total = sum(classes.values())
            if total != shard["count"] or total * _HEADER.size > shard["bytes"]:
                return f"{name} has {number_of(shard['count'], 'image')}, its classes {total}"
        if facts.get("count") != sum(shard["count"] for shard in facts["shards"]):
            return f"{split} has another count than its shards"
    return ""
