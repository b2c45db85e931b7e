"""The shards that ``prepare-data`` writes."""

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gae_jax.data import shards
from gae_jax.data.contents import Contents, counted
from gae_jax.data.sources.base import Encoded, check_place, select
from gae_jax.runtime.errors import DataError


class ArrayRecords(Encoded):
    """A folder that ``prepare-data`` wrote; `gae_jax.data.shards` describes the format.

    Its ``train`` and ``val`` are used as they are; without ``val``, ``train`` is split by
    ``holdout``, as `Folder` splits the same images.

    Args:
      root: a local folder, or one of ``gs://`` (for which gcsfs must be installed).

    Raises:
      DataError: if there is no finished folder; names shards that differ from the manifest.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        holdout: float = 0.0,
        on_corrupt: str = "error",
        exif: str = "ignore",
    ):
        check_place(root)
        manifest = read_manifest(root)
        has_val = "val" in manifest["splits"]
        name = "val" if has_val and split == "holdout" else "train"
        if name not in manifest["splits"]:
            raise DataError(f"{root} holds no training images; prepare them with: prepare-data")
        listed = manifest["splits"][name]["shards"]
        self.class_names: list[str] = manifest["class_names"]
        self._names = [shard["name"] for shard in listed]
        self._ends = np.cumsum([shard["count"] for shard in listed])
        self._records = open_shards(root, listed)
        labels = shards.labels_of(manifest["splits"][name])
        # None: all records, in their order
        self._chosen = None if has_val else select(labels, split, holdout)
        self.labels = labels if has_val else labels[self._chosen]
        count = len(self.labels)
        if not count:
            raise DataError(
                f"{root} holds no {name} images: all were left out by --on-corrupt=skip"
            )
        super().__init__(root, count, on_corrupt, exif)
        self.contents = Contents.of(
            counted(labels, self.class_names), facts=" ".join(shard["sha256"] for shard in listed)
        )
        contents = [shard["sha256"] for shard in listed] + [split, has_val or holdout]
        digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
        self._repr = f"ArrayRecords({split!r}, {count} images, {digest}{self._read_as})"

    def _record(self, index: int) -> shards.Record:
        at = index if self._chosen is None else int(self._chosen[index])
        return shards.unpack(self._records[at])

    def _encoded(self, index: int) -> tuple[io.BytesIO, int]:
        record = self._record(index)
        return io.BytesIO(record.content), record.label

    def _name(self, index: int) -> str:
        at = index if self._chosen is None else int(self._chosen[index])
        shard = int(np.searchsorted(self._ends, at, side="right"))
        at -= int(self._ends[shard - 1]) if shard else 0
        try:
            name = self._record(index).name
        except (ValueError, RuntimeError):
            name = "no name"
        return f"record {at} ({name}) of {self._names[shard]} in {self._where}"

    def __repr__(self) -> str:
        return self._repr


def read_manifest(root: str) -> dict[str, Any]:
    """Read the manifest of a finished folder.

    Raises:
      DataError: if there is none, or it is damaged.
    """
    from etils import epath

    path = epath.Path(root) / "manifest.json"
    try:
        manifest = json.loads(path.read_text()) if root else None
    except ImportError as error:  # gs:// without gcsfs
        raise DataError(f"data.root is {root!r}: {error}") from error
    except (FileNotFoundError, NotADirectoryError):
        manifest = None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); write the folder again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check data.root") from error
    if manifest is None:
        raise DataError(
            f"data.root is {root!r}, which holds no manifest.json; give --config.data.root=DIR "
            "with DIR as written by: python -m gae_jax prepare-data --out=DIR"
        )
    shards.check_manifest(manifest, path)
    return manifest


def open_shards(root: str, listed: list[dict[str, Any]]):
    """Open the records of the shards: bytes, by index.

    Args:
      listed: the shards' entries in the manifest.

    Raises:
      DataError: naming the shards that are missing, or of another size or count.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from array_record.python.array_record_module import ArrayRecordReader
    from etils import epath

    folder = epath.Path(root)
    paths = [folder / shard["name"] for shard in listed]

    def size_differs(path, shard) -> str:
        if not path.exists():
            return "is missing"
        size = path.stat().length
        return "" if size == shard["bytes"] else f"has {size} bytes, not {shard['bytes']}"

    def count_differs(path, shard) -> str:
        count = ArrayRecordReader(os.fspath(path)).num_records()  # 0 if it cannot read the file
        return "" if count == shard["count"] else f"has {count} records, not {shard['count']}"

    def refuse(differs) -> None:
        with ThreadPoolExecutor(32) as pool:
            results = pool.map(differs, paths, listed)
            problems = [f"{p.name} {what}" for p, what in zip(paths, results, strict=True) if what]
        if problems:
            raise DataError(
                f"{root}: shards and manifest disagree: {'; '.join(problems[:5])}"
                + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
                + "; remove what is wrong and run the same prepare-data command again"
            )

    refuse(size_differs)
    try:
        records = ArrayRecordDataSource([os.fspath(path) for path in paths])
        if len(records) == sum(shard["count"] for shard in listed):
            return records
    except RuntimeError:  # a damaged index; the error does not name the file
        pass
    refuse(count_differs)
    raise DataError(f"{root}: the shards cannot be opened; check them with: prepare-data --verify")
