"""Writing a set of latents: exact moments, shards that grow, and the manifest.

`gae_jax.data.latents` describes the format.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gae_jax.data.latent_files import AGAIN, DTYPES, name_of, read_moments, read_shard
from gae_jax.data.moments import merge_moments
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import NpyFile, read_object, write_json, write_npy, write_npz

# Numbers that `Moments` processes at once: in float64 they fit into a core's cache.
PIECE = 65_536


class Moments:
    """Streaming mean and standard deviation in float64 (Chan's rule).

    Args:
      shape: of the mean: number of channels, or (h, w, channels).
    """

    def __init__(self, shape: int | tuple[int, ...]):
        self.count, self.mean, self.m2 = 0, np.zeros(shape), np.zeros(shape)

    def add(self, values: np.ndarray) -> None:
        """Add ``values`` [..., *shape]."""
        rows = values.reshape(-1, self.mean.size)
        size = max(PIECE // self.mean.size, 1)
        for first in range(0, len(rows), size):
            piece = rows[first : first + size].astype(np.float64)
            ones = np.ones(len(piece))  # matmuls sum over rows several times faster than numpy
            mean = ones @ piece / len(piece)
            piece -= mean
            m2 = ones @ np.square(piece, out=piece)
            self.merge(len(piece), *(part.reshape(self.mean.shape) for part in (mean, m2)))

    def merge(self, count: int, mean: np.ndarray, m2: np.ndarray) -> None:
        """Add ``count`` rows with this mean and sum of squared deviations."""
        merged = merge_moments(self.count, self.mean, self.m2, count, mean, m2)
        self.count, self.mean, self.m2 = merged

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.m2 / self.count)


# A std below this share of the mean is rounding of float32.
ROUNDING = 1e-7


def varying(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Tell the std of numbers that vary from rounding of constants, before dividing by it.

    Args:
      mean, std: of one shape.

    Returns:
      bool of the same shape.
    """
    return std > ROUNDING * np.abs(mean)


# Images that are added to a shard's moments, digest and file at once. The last bits of the moments
# depend on this number, so it is not the batch size.
CHUNK = 64


class ShardFile:
    """A shard that is written while its latents are computed, valid once `finish` has returned.

    Args:
      folder, index: of the shard.
      shape: (views, h, w, d).
      dtype: that the latents are stored in.
      elements: whether to store the moments of every element too.
    """

    def __init__(
        self, folder: Path, index: int, shape: tuple[int, ...], dtype: np.dtype, *, elements=False
    ):
        self._folder, self._index = folder, index
        self._dtype, self._count = np.dtype(dtype), 0
        self._moments = Moments(shape[-1])
        self._of_elements = Moments(tuple(shape[1:])) if elements else None
        self._digest = hashlib.sha256()
        self._labels: list[np.ndarray] = []
        self._pending: list[np.ndarray] = []  # fewer images than a chunk
        stored = np.dtype(np.uint16) if self._dtype == DTYPES["bfloat16"] else self._dtype
        self._file = NpyFile(folder / name_of("latents", index), stored, tuple(shape))

    def add(self, latents: np.ndarray, labels: np.ndarray) -> None:
        """Add ``latents`` [n, views, h, w, d] and their labels [n]."""
        self._labels.append(np.array(labels))
        while len(latents):
            room = CHUNK - sum(map(len, self._pending))
            self._pending.append(latents[:room])
            latents = latents[room:]
            if sum(map(len, self._pending)) == CHUNK:
                self._take()

    def _take(self) -> None:
        chunk = np.ascontiguousarray(np.concatenate(self._pending), self._dtype)
        self._pending = []
        self._moments.add(chunk)  # of the values as they are stored, rounded
        if self._of_elements:
            self._of_elements.add(chunk)
        self._digest.update(chunk.view(np.uint8).data)
        self._file.append(chunk.view(self._file.dtype))
        self._count += len(chunk)

    def finish(self, labels_dtype=np.int32, **facts) -> None:
        """Write the rest, and the record that makes the shard valid.

        Args:
          facts: further values for ``shard-*.json``; `finish_set` needs "skipped".
        """
        if self._pending:
            self._take()
        labels = np.concatenate([*self._labels, np.zeros(0, labels_dtype)])
        self._digest.update(np.ascontiguousarray(labels).tobytes())
        if self._of_elements:
            moments = np.stack([self._of_elements.mean, self._of_elements.m2])
            write_npy(self._folder / name_of("moments", self._index), moments, own=True)
        self._file.finish()
        write_npy(self._folder / name_of("labels", self._index), labels, own=True)
        record = {
            **facts,
            "count": self._count,
            "sha256": self._digest.hexdigest(),
            "rows": self._moments.count,
            "mean": self._moments.mean.tolist(),
            "m2": self._moments.m2.tolist(),
        }
        write_json(self._folder / name_of("shard", self._index), record, own=True)

    def discard(self) -> None:
        """Remove what was written of an unfinished shard."""
        self._file.discard()


def write_shard(
    folder: Path,
    index: int,
    latents: np.ndarray,
    labels: np.ndarray,
    *,
    elements: bool = False,
    **facts,
) -> None:
    """Write one shard, by the process that calls this.

    Args:
      latents: [n, views, h, w, d] in the dtype that they are stored in.
      labels: [n].
      elements, facts: as in `ShardFile`.
    """
    shard = ShardFile(folder, index, latents.shape[1:], latents.dtype, elements=elements)
    try:
        shard.add(latents, labels)
        shard.finish(labels_dtype=labels.dtype, **facts)
    finally:
        shard.discard()


def finished_shards(folder: Path, count: int, **facts) -> list[int]:
    """Return which of ``count`` shards are finished.

    Args:
      facts: values that their records must have.

    Raises:
      DataError: for a shard with other values, or beyond the last one.
    """
    finished = []
    for path in sorted(folder.glob("shard-*.json")):
        number = path.stem.split("-", 1)[1]
        if not number.isdigit():
            raise DataError(f"{path} is no shard of a set; move it away")
        index, shard = int(number), read_object(path, remedy=AGAIN)
        for name, value in facts.items():
            if shard[name] != value:
                raise DataError(
                    f"{path}: made by {name} {shard[name]}, this run uses {value}; {AGAIN}"
                )
        if index >= count:
            raise DataError(
                f"{path}: the set has {count} shards; extract the latents again with: latents "
                "--fresh"
            )
        finished.append(index)
    return finished


# Added to the variances of elements, as RAE's released code does.
ELEMENT_EPS = 1e-5


def finish_set(
    folder: Path,
    count: int,
    *,
    dtype: str,
    statistics_of: str = "channel",
    variance_only: bool = False,
    **facts,
) -> dict:
    """Write the manifest of ``count`` finished shards, and return it.

    The statistics are merged in the order of the shards, whichever process made them.

    Args:
      dtype: that the latents are stored in.
      statistics_of: "channel" or "element": what `LatentSet.mean` and `LatentSet.std` are taken of;
        the latter needs shards that were written with ``elements``.
      variance_only: whether `LatentSet.mean` is 0.
      facts: further values for the manifest; "tokenizer" is required.
    """
    shards = [read_shard(folder / name_of("shard", index)) for index in range(count)]
    moments = Moments(len(shards[0]["mean"]))
    for index, shard in enumerate(shards):
        if len(shard["mean"]) != moments.mean.size:
            raise DataError(
                f"{folder / name_of('shard', index)} has {len(shard['mean'])} channels, the first "
                f"shard {moments.mean.size}; {AGAIN}"
            )
        if shard["rows"]:
            mean, m2 = (np.asarray(shard[name], np.float64) for name in ("mean", "m2"))
            moments.merge(shard["rows"], mean, m2)
    if statistics_of == "element":
        write_npz(folder / "elements.npz", _elements(folder, shards))
    listed = [
        {"index": index, **{name: shard[name] for name in ("count", "sha256")}}
        for index, shard in enumerate(shards)
    ]
    manifest = {
        **facts,
        "dtype": dtype,
        "statistics_of": statistics_of,
        "variance_only": variance_only,
        "count": sum(shard["count"] for shard in shards),
        "skipped": sum(shard["skipped"] for shard in shards),
        "shards": listed,
        "mean": moments.mean.tolist(),
        "std": moments.std.tolist(),
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def _elements(folder: Path, shards: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """Merge mean and std [h, w, d] of every element, over images and views."""
    total = Moments(read_moments(folder / name_of("moments", 0))[0].shape)
    for index, shard in enumerate(shards):
        path = folder / name_of("moments", index)
        mean, m2 = read_moments(path)
        if mean.shape != total.mean.shape:
            raise DataError(
                f"{path} has shape {list(mean.shape)}, the first {list(total.mean.shape)}; {AGAIN}"
            )
        if shard["rows"]:
            total.merge(shard["rows"] // math.prod(mean.shape[:-1]), mean, m2)
    std = np.sqrt(total.m2 / total.count + ELEMENT_EPS)
    return {"mean": total.mean.astype(np.float32), "std": std.astype(np.float32)}
