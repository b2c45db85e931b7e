"""A set of latents on disk: shards that are memory-mapped, exact statistics, and a manifest.

Shard i holds the images i * shard_size to (i + 1) * shard_size of the source, whoever makes it.
It is ``latents-00000.npy`` [n, views, h, w, d] (view 0 the image, view 1 its mirror image where
mirroring makes sense: encoded, never a mirrored latent) with ``labels-00000.npy`` [n]; numbers of
bfloat16, which the format does not know, lie there as uint16. ``shard-00000.json`` is written
last and makes a shard valid, ``manifest.json`` the set: it says which tokenizer made the latents of
which images, and holds per-channel mean and standard deviation over all images and positions.

A set may have mean and deviation of every element besides, over all images: ``moments-00000.npy``
[2, h, w, d] of each shard (mean, sum of squared deviations), and ``elements.npz`` of the set.
"""

import dataclasses
import hashlib
import math
import os
from pathlib import Path

import grain
import numpy as np

from gae_jax.data.latent_files import (
    AGAIN,
    DTYPES,
    map_shards,
    name_of,
    read_manifest,
    read_moments,
    read_shard,
)
from gae_jax.data.pipeline import Batches
from gae_jax.errors import DataError
from gae_jax.files import read_npz, read_object, write_json, write_npy, write_npz


class Moments:
    """Streaming mean and standard deviation in float64 (Chan's rule).

    Args:
      shape: what they are kept of: channels, or (h, w, channels).
    """

    def __init__(self, shape: int | tuple[int, ...]):
        self.count, self.mean, self.m2 = 0, np.zeros(shape), np.zeros(shape)

    def add(self, values: np.ndarray) -> None:
        """``values`` [..., *shape]."""
        rows = values.reshape(-1, *self.mean.shape).astype(np.float64)
        mean = rows.mean(axis=0)
        self.merge(len(rows), mean, np.square(rows - mean).sum(axis=0))

    def merge(self, count: int, mean: np.ndarray, m2: np.ndarray) -> None:
        """Adds ``count`` rows with this mean and sum of squared deviations."""
        total = self.count + count
        delta = np.asarray(mean) - self.mean
        self.m2 = self.m2 + m2 + np.square(delta) * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.count = total

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.m2 / self.count)


def write_shard(
    folder: Path,
    index: int,
    latents: np.ndarray,
    labels: np.ndarray,
    *,
    elements: bool = False,
    **facts,
) -> None:
    """Writes one shard, by the process that calls this.

    Args:
      latents: [n, views, h, w, d] in the dtype that they are kept in.
      labels: [n].
      elements: also writes the moments of every element.
      facts: what else ``shard-*.json`` is to say; `finish_set` wants "tokenizer" and "skipped".
    """
    moments = Moments(latents.shape[-1])
    if len(latents):  # of what is stored, rounded as it is
        moments.add(latents)
    if elements:
        own = Moments(latents.shape[2:])
        for views in latents:  # one by one: a shard is large
            own.add(views)
        write_npy(folder / name_of("moments", index), np.stack([own.mean, own.m2]), own=True)
    raw = np.ascontiguousarray(latents)
    digest = hashlib.sha256(raw.tobytes())
    digest.update(np.ascontiguousarray(labels).tobytes())
    plain = raw.view(np.uint16) if raw.dtype == DTYPES["bfloat16"] else raw
    write_npy(folder / name_of("latents", index), plain, own=True)
    write_npy(folder / name_of("labels", index), labels, own=True)
    found = {
        **facts,
        "count": len(labels),
        "sha256": digest.hexdigest(),
        "rows": moments.count,
        "mean": moments.mean.tolist(),
        "m2": moments.m2.tolist(),
    }
    write_json(folder / name_of("shard", index), found, own=True)


def finished_shards(folder: Path, count: int, **facts) -> list[int]:
    """Which of ``count`` shards are there, made of what ``facts`` say.

    Raises:
      DataError: for a shard that was made of something else, or beyond the last one.
    """
    found = []
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
        found.append(index)
    return found


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
    """Writes the manifest of ``count`` shards that are all there, and returns it.

    The statistics are merged in the order of the shards, whoever made them.

    Args:
      statistics_of: what `LatentSet.mean` and `LatentSet.std` are of, "channel" or "element"; the
        latter needs shards that were written with ``elements``.
      variance_only: that mean is 0.
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
            moments.merge(shard["rows"], np.array(shard["mean"]), np.array(shard["m2"]))
    if statistics_of == "element":
        write_npz(folder / "elements.npz", **_elements(folder, shards))
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


def _elements(folder: Path, shards: list[dict]) -> dict[str, np.ndarray]:
    """Mean and deviation [h, w, d] of every element, over images and views."""
    total = None
    for index, shard in enumerate(shards):
        path = folder / name_of("moments", index)
        mean, m2 = read_moments(path)
        total = Moments(mean.shape) if total is None else total
        if mean.shape != total.mean.shape:
            raise DataError(f"{path} is of {list(mean.shape)}, others of other shapes; {AGAIN}")
        if shard["rows"]:
            total.merge(shard["rows"] // math.prod(mean.shape[:-1]), mean, m2)
    std = np.sqrt(total.m2 / total.count + ELEMENT_EPS)
    return {"mean": total.mean.astype(np.float32), "std": std.astype(np.float32)}


class Stacked:
    """Arrays one behind the other along their first axis, read by slices of that.

    Args:
      arrays: at least one, of the same shape behind the first axis.
    """

    def __init__(self, arrays: list[np.ndarray]):
        self._arrays, self._ends = arrays, np.cumsum([0, *map(len, arrays)])
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])
        self.ndim, self.dtype = len(self.shape), arrays[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, stop, _ = rows.indices(len(self))
        parts = [
            array[max(first - start, 0) : max(stop - start, 0)]
            for array, start in zip(self._arrays, self._ends[:-1], strict=True)
        ]
        return np.concatenate(parts)

    def row(self, index: int) -> np.ndarray:
        """One of them, without the first axis."""
        part = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self._arrays[part][index - self._ends[part]]


class Picked:
    """Some rows of an array, in an order of their own, read where it is sliced.

    Args:
      rows: what they are taken from, along its first axis.
      indices: int [k].
    """

    def __init__(self, rows: Stacked, indices: np.ndarray):
        self._rows, self._indices = rows, np.asarray(indices)
        self.shape = (len(self._indices), *rows.shape[1:])
        self.ndim, self.dtype = rows.ndim, rows.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = np.empty((len(self._indices[rows]), *self.shape[1:]), self.dtype)
        for at, index in enumerate(self._indices[rows]):
            found[at] = self._rows.row(int(index))
        return found


@dataclasses.dataclass(frozen=True)
class LatentSet:
    """The latents in a folder, by index; a grain source."""

    folder: Path
    manifest: dict

    @classmethod
    def open(cls, folder: Path) -> "LatentSet":
        """Maps the shards of a finished set.

        Raises:
          DataError: if the set is unfinished, or holds other shards than its manifest lists.
        """
        if not (folder / "manifest.json").exists():
            raise DataError(f"{folder} holds no finished set of latents; run: latents")
        manifest = read_manifest(folder / "manifest.json")
        listed = {name_of("latents", shard["index"]) for shard in manifest["shards"]}
        there = {name for name in os.listdir(folder) if name.startswith("latents-")}
        if listed != there:
            raise DataError(
                f"{folder}: shards and manifest disagree on {sorted(listed ^ there)}; extract the "
                "latents again with: latents --fresh"
            )
        return cls(folder, manifest)

    def __post_init__(self):
        latents, labels = map_shards(self.folder, self.manifest, self.dtype)
        object.__setattr__(self, "_latents", latents)
        object.__setattr__(self, "_labels", labels)
        counts = [shard["count"] for shard in self.manifest["shards"]]
        object.__setattr__(self, "_ends", np.cumsum(counts))

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> dict:
        """``{"latent": float32 [views, h, w, d], "label"}``."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        at = index - (self._ends[shard - 1] if shard else 0)
        latent = self._latents[shard][at].astype(np.float32)
        return {"latent": latent, "label": np.int32(self._labels[shard][at])}

    def __repr__(self) -> str:
        return f"LatentSet({self.manifest['tokenizer']}, {len(self)}, {self.dtype})"

    @property
    def dtype(self) -> str:
        """That the latents are kept in; earlier versions knew one only."""
        return self.manifest.get("dtype", "float32")

    @property
    def per(self) -> str:
        """What mean and std are of: "channel", the only one of earlier versions, or "element"."""
        return self.manifest.get("statistics_of", "channel")

    @property
    def mean(self) -> np.ndarray:
        """Per channel, [d], or per element, [h, w, d]; 0 where the variance alone counts."""
        found = self._statistics("mean")
        return np.zeros_like(found) if self.manifest.get("variance_only") else found

    @property
    def std(self) -> np.ndarray:
        """Per channel, [d], or per element, [h, w, d]."""
        return self._statistics("std")

    def _statistics(self, name: str) -> np.ndarray:
        if self.per == "channel":
            return np.asarray(self.manifest[name], np.float32)
        return read_npz(self.folder / "elements.npz", name, remedy=AGAIN)[name]

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(unmirrored latents, float32 [k, h, w, d], labels [k]) of these images, in memory."""
        rows = Picked(Stacked(self._latents), indices)
        found = np.empty((len(indices), *rows.shape[2:]), np.float32)
        for at in range(len(indices)):
            found[at] = rows[at : at + 1][0, 0]
        return found, self.labels[indices]

    def views(self) -> "Stacked":
        """All latents [n, views, h, w, d] as one array that is read where it is sliced."""
        return Stacked(self._latents)

    @property
    def largest_label(self) -> int:
        """Of all images, read shard by shard; -1 of a set without images."""
        return max((int(labels.max()) for labels in self._labels if len(labels)), default=-1)

    @property
    def labels(self) -> np.ndarray:
        """[n], in memory."""
        return np.concatenate(self._labels)

    def training_batches(self, batch_size: int, seed: int, workers: int) -> Batches:
        """Endless ``{"latent": [b, h, w, d], "label": [b]}``; one view of each image an epoch."""

        def choose(item: dict, rng: np.random.Generator) -> dict:
            views = item["latent"]
            return {**item, "latent": views[rng.integers(len(views))]}

        ds = grain.MapDataset.source(self).seed(seed).shuffle().repeat().random_map(choose)
        remedy = "latents come from disk: move the run to a faster one, or set data.workers higher"
        name = f"{self!r}, seed {seed}"
        return Batches(ds, batch_size, workers, name, light=True, remedy=remedy)
