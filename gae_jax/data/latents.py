"""A set of latents on disk: shards that are memory-mapped, exact statistics, and a manifest.

Shard i holds the images i * shard_size to (i + 1) * shard_size of the source, whoever makes it.
It is ``latents-00000.npy`` [n, views, h, w, d] with ``labels-00000.npy`` [n]. View 0 is the image,
view 1 its mirror image where mirroring makes sense (the mirrored image encoded, never a mirrored
latent). Numbers in bfloat16, which npy does not support, are stored as uint16.
``shard-00000.json`` is written last and makes a shard valid, ``manifest.json`` the set: it records
which tokenizer made the latents of which images, and per-channel mean and standard deviation over
all images and positions.

A set may also hold mean and std of every element over all images: ``moments-00000.npy``
[2, h, w, d] of each shard (mean, sum of squared deviations), and ``elements.npz`` of the set.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gae_jax.data.batches import Batches, shuffled_order
from gae_jax.data.latent_files import AGAIN, map_shards, name_of, read_manifest
from gae_jax.data.latent_shards import varying
from gae_jax.data.rows import Fields, Order
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import read_npz


class Stacked:
    """Arrays concatenated along their first axis, read by slices of it, never all at once.

    Args:
      arrays: at least one; their shapes differ in the first axis only.
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

    def gather(self, rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        """Write the elements at these places of the first two axes.

        Args:
          rows, columns: int [k].
          out: [k, ...] of any dtype that the elements can be cast to.
        """
        parts = np.searchsorted(self._ends, rows, side="right") - 1
        for part in np.unique(parts):
            at = np.flatnonzero(parts == part)
            array, row = self._arrays[part], rows[at] - self._ends[part]
            flat = array.reshape(-1, *array.shape[2:])
            out[at] = np.take(flat, row * array.shape[1] + columns[at], axis=0)

    def row(self, index: int) -> np.ndarray:
        """Return the row of an index, without the first axis."""
        part = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self._arrays[part][index - self._ends[part]]


class Picked:
    """Rows of an array by index, in any order, read when this is sliced.

    Args:
      rows: the array; its first axis is indexed.
      indices: int [k].
    """

    def __init__(self, rows: Stacked, indices: np.ndarray):
        self._rows, self._indices = rows, np.asarray(indices)
        self.shape = (len(self._indices), *rows.shape[1:])
        self.ndim, self.dtype = rows.ndim, rows.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        picked = np.empty((len(self._indices[rows]), *self.shape[1:]), self.dtype)
        for at, index in enumerate(self._indices[rows]):
            picked[at] = self._rows.row(int(index))
        return picked


@dataclasses.dataclass(frozen=True)
class LatentSet:
    """The latents in a folder, by index."""

    folder: Path
    manifest: dict
    _latents: list[np.ndarray]  # of every shard, [n, views, h, w, d]
    _labels: list[np.ndarray]  # of every shard, [n]

    @classmethod
    def open(cls, folder: Path) -> "LatentSet":
        """Memory-map the shards of a finished set.

        Raises:
          DataError: if the set is unfinished, or holds other shards than its manifest lists.
        """
        if not (folder / "manifest.json").exists():
            raise DataError(f"{folder} holds no finished set of latents; run: latents")
        manifest = read_manifest(folder / "manifest.json")
        listed = {name_of("latents", shard["index"]) for shard in manifest["shards"]}
        present = {name for name in os.listdir(folder) if name.startswith("latents-")}
        if listed != present:
            raise DataError(
                f"{folder}: shards and manifest disagree on {sorted(listed ^ present)}; {AGAIN}"
            )
        return cls(folder, manifest, *map_shards(folder, manifest, manifest["dtype"]))

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> dict:
        """Load ``{"latent": float32 [views, h, w, d], "label": int32}``."""
        latent = self.views().row(index).astype(np.float32)
        return {"latent": latent, "label": np.int32(self.labels[index])}

    def __repr__(self) -> str:
        return f"LatentSet({self.manifest['tokenizer']}, {len(self)}, {self.dtype})"

    @property
    def dtype(self) -> str:
        """The dtype that the latents are stored in."""
        return self.manifest["dtype"]

    @property
    def per(self) -> str:
        """What mean and std are taken of: "channel" or "element"."""
        return self.manifest["statistics_of"]

    @property
    def mean(self) -> np.ndarray:
        """Mean per channel, [d], or per element, [h, w, d]; 0 with ``variance_only``."""
        value = self._statistics("mean")
        return np.zeros_like(value) if self.manifest["variance_only"] else value

    @property
    def std(self) -> np.ndarray:
        """Std per channel, [d], or per element, [h, w, d]; 1 where all latents are the same."""
        value = self._statistics("std")
        return np.where(varying(self._statistics("mean"), value), value, np.ones_like(value))

    @property
    def constant_channels(self) -> list[int]:
        """The channels in which all latents are the same."""
        varies = varying(self._statistics("mean"), self._statistics("std"))
        return np.flatnonzero(~varies.reshape(-1, varies.shape[-1]).any(axis=0)).tolist()

    def _statistics(self, name: str) -> np.ndarray:
        if self.per == "channel":
            return np.asarray(self.manifest[name], np.float32)
        return read_npz(self.folder / "elements.npz", name, remedy=AGAIN)[name]

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Load (unmirrored latents, float32 [k, h, w, d], labels [k]) of these images."""
        views = self.views()
        latents = np.empty((len(indices), *views.shape[2:]), np.float32)
        views.gather(np.asarray(indices), np.zeros(len(indices), int), latents)
        return latents, self.labels[indices]

    def views(self) -> Stacked:
        """Return all latents [n, views, h, w, d] as one array that is read when it is sliced."""
        return Stacked(self._latents)

    @property
    def label_counts(self) -> np.ndarray:
        """Number of images of each label up to the largest; [0] without images."""
        total = np.zeros(0, np.int64)
        for labels in self._labels:
            counts = np.bincount(labels)
            total, counts = sorted((total, counts), key=len)
            counts[: len(total)] += total
            total = counts
        return total

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """All labels [n], in memory."""
        return np.concatenate(self._labels)

    def training_batches(self, batch_size: int, seed: int, workers: int) -> Batches:
        """Make endless batches ``{"latent": [b, h, w, d], "label": [b]}``.

        An epoch has every image once, in one of its views.
        """

        rows = LatentRows(self, shuffled_order(len(self), seed))
        remedy = "latents come from disk: move the run to a faster one, or set data.workers higher"
        name = f"{self!r}, seed {seed}"
        return Batches(None, batch_size, workers, name, task=rows, remedy=remedy)


class LatentRows:
    """Latents in a shuffled order, each in a view that is drawn at random.

    A batch is gathered shard by shard. Making 256 latents one by one held Python's lock for 25 ms,
    in which the thread that sends steps to the device had to wait.
    """

    def __init__(self, source: LatentSet, order: Order):
        self.source, self.order = source, order

    @property
    def fields(self) -> Fields:
        """Name -> (shape, dtype) of one row."""
        shape = self.source.views().shape[2:]
        return {"latent": (shape, np.dtype(np.float32)), "label": ((), np.dtype(np.int32))}

    def fill(self, positions: Sequence[int], out: dict[str, np.ndarray]) -> None:
        """Write rows, as `data.rows.Rows.fill`."""
        rng, views = np.random.Generator(np.random.Philox(0)), self.source.views()
        chosen = np.empty(len(positions), np.int64)
        for row, position in enumerate(positions):
            self.order.reset(rng, position)
            chosen[row] = rng.integers(views.shape[1])
        indices = np.array([self.order.index(position) for position in positions])
        views.gather(indices, chosen, out["latent"])
        out["label"][...] = self.source.labels[indices]

    def name(self, position: int) -> str:
        """Name the latent of a position in errors."""
        return f"latent {self.order.index(position)} of {self.source!r}"
