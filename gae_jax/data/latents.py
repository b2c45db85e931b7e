"""A set of latents on disk: shards that are memory-mapped, exact statistics, and a manifest.

``manifest.json`` says which tokenizer made the latents of which images, lists the shards, and
holds per-channel mean and standard deviation over all images and positions. A shard is
``latents-00000.npy`` [n, views, h, w, d] (view 0 the image, view 1 its mirror image where
mirroring makes sense: encoded, never a mirrored latent) with ``labels-00000.npy`` [n].
"""

import dataclasses
import os
from pathlib import Path

import grain
import numpy as np

from gae_jax.data.pipeline import iterate
from gae_jax.errors import DataError
from gae_jax.files import read_json, write_json, write_npy


class Moments:
    """Streaming per-channel mean and standard deviation in float64 (Chan's rule)."""

    def __init__(self, channels: int):
        self.count, self.mean, self._m2 = 0, np.zeros(channels), np.zeros(channels)

    def add(self, values: np.ndarray) -> None:
        """``values`` [..., channels]."""
        rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
        count = self.count + len(rows)
        mean = rows.mean(axis=0)
        delta = mean - self.mean
        self._m2 += np.square(rows - mean).sum(axis=0)
        self._m2 += np.square(delta) * self.count * len(rows) / count
        self.mean = self.mean + delta * len(rows) / count
        self.count = count

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self._m2 / self.count)


class LatentWriter:
    """Collects batches into shards; `close` writes the manifest, which makes the set valid."""

    def __init__(self, folder: Path, *, shard_size: int, channels: int):
        self._folder, self._shard_size = folder, shard_size
        self._latents: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._shards: list[dict] = []
        self._moments = Moments(channels)

    def add(self, latents: np.ndarray, labels: np.ndarray) -> None:
        """``latents`` [n, views, h, w, d], ``labels`` [n]."""
        self._moments.add(latents)
        self._latents.append(latents)
        self._labels.append(labels)
        while sum(map(len, self._labels)) >= self._shard_size:
            self._write(self._shard_size)

    def _write(self, count: int) -> None:
        latents, labels = np.concatenate(self._latents), np.concatenate(self._labels)
        index = len(self._shards)
        write_npy(self._folder / f"latents-{index:05}.npy", latents[:count])
        write_npy(self._folder / f"labels-{index:05}.npy", labels[:count])
        self._shards.append({"index": index, "count": int(count)})
        self._latents, self._labels = [latents[count:]], [labels[count:]]

    def close(self, **facts) -> dict:
        """Writes the rest and the manifest; returns the manifest."""
        if left := sum(map(len, self._labels)):
            self._write(left)
        manifest = {
            **facts,
            "count": sum(shard["count"] for shard in self._shards),
            "shards": self._shards,
            "mean": self._moments.mean.tolist(),
            "std": self._moments.std.tolist(),
        }
        write_json(self._folder / "manifest.json", manifest)
        return manifest


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


@dataclasses.dataclass(frozen=True)
class LatentSet:
    """The latents in a folder, by index; a grain source."""

    folder: Path
    manifest: dict

    @classmethod
    def open(cls, folder: Path) -> "LatentSet":
        """Maps the shards of a finished set.

        Raises:
          DataError: if the set is unfinished, or holds shards that its manifest does not list.
        """
        if not (folder / "manifest.json").exists():
            raise DataError(f"{folder} holds no finished set of latents; run: latents")
        manifest = read_json(folder / "manifest.json")
        listed = {f"latents-{shard['index']:05}.npy" for shard in manifest["shards"]}
        there = {name for name in os.listdir(folder) if name.startswith("latents-")}
        if listed != there:
            raise DataError(
                f"{folder}: shards and manifest disagree on {sorted(listed ^ there)}; extract the "
                "latents again with: latents --fresh"
            )
        return cls(folder, manifest)

    def __post_init__(self):
        def load(kind):
            names = [f"{kind}-{shard['index']:05}.npy" for shard in self.manifest["shards"]]
            return [np.load(self.folder / name, mmap_mode="r") for name in names]

        object.__setattr__(self, "_latents", load("latents"))
        object.__setattr__(self, "_labels", load("labels"))
        counts = [shard["count"] for shard in self.manifest["shards"]]
        object.__setattr__(self, "_ends", np.cumsum(counts))

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> dict:
        """``{"latent": [views, h, w, d], "label"}``."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        at = index - (self._ends[shard - 1] if shard else 0)
        return {"latent": self._latents[shard][at], "label": np.int32(self._labels[shard][at])}

    def __repr__(self) -> str:
        return f"LatentSet({self.manifest['tokenizer']}, {len(self)})"

    @property
    def mean(self) -> np.ndarray:
        """Per channel, [d]."""
        return np.asarray(self.manifest["mean"], np.float32)

    @property
    def std(self) -> np.ndarray:
        """Per channel, [d]."""
        return np.asarray(self.manifest["std"], np.float32)

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """(unmirrored latents [n, h, w, d], labels [n]) in memory."""
        latents = np.concatenate([shard[:, 0] for shard in self._latents])
        return latents, self.labels

    def views(self) -> "Stacked":
        """All latents [n, views, h, w, d] as one array that is read where it is sliced."""
        return Stacked(self._latents)

    @property
    def labels(self) -> np.ndarray:
        """[n], in memory."""
        return np.concatenate(self._labels)

    def training_batches(self, batch_size: int, seed: int, workers: int) -> grain.IterDataset:
        """Endless ``{"latent": [b, h, w, d], "label": [b]}``; one view of each image an epoch."""

        def choose(item: dict, rng: np.random.Generator) -> dict:
            views = item["latent"]
            return {**item, "latent": np.array(views[rng.integers(len(views))])}

        ds = grain.MapDataset.source(self).seed(seed).shuffle().repeat().random_map(choose)
        return iterate(ds, batch_size, workers)
