"""The files of a set of latents, checked when they are read (format: `gae_jax.data.latents`)."""

from pathlib import Path

import ml_dtypes
import numpy as np

from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import Record, explained, read_npy, read_object

AGAIN = "extract the latents again with: latents --fresh"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def name_of(kind: str, index: int) -> str:
    """Return the file name of a shard; ``kind``: latents, labels, moments or shard."""
    return f"{kind}-{index:05}.{'json' if kind == 'shard' else 'npy'}"


def read_shard(path: Path) -> Record:
    """Read the record of a shard that `latent_shards.ShardFile` wrote.

    Raises:
      DataError: if it is damaged.
    """
    kinds = dict(count=int, rows=int, skipped=int, sha256=str, mean=list, m2=list)
    shard = read_object(path, remedy=AGAIN, **kinds)
    for name in ("count", "rows", "skipped"):
        if not 0 <= shard[name] < 1 << 48:
            raise DataError(f"{path} is damaged: {name} is {shard[name]}; {AGAIN}")
    with explained(path, AGAIN):
        mean, m2 = (np.asarray(shard[name], np.float64) for name in ("mean", "m2"))
        if mean.ndim != 1 or mean.shape != m2.shape or not np.isfinite([mean, m2]).all():
            raise ValueError(f"its mean and m2 are {list(mean.shape)} and {list(m2.shape)}")
    return shard


def read_moments(path: Path) -> np.ndarray:
    """Read mean and sum of squared deviations of a shard's elements: float64 [2, h, w, d].

    Raises:
      DataError: if they are damaged.
    """
    moments = read_npy(path, remedy=AGAIN)
    if moments.ndim != 4 or len(moments) != 2 or moments.dtype != np.float64:
        raise DataError(
            f"{path} is damaged: it holds {moments.dtype} {list(moments.shape)}; {AGAIN}"
        )
    return moments


def read_manifest(path: Path) -> Record:
    """Read the manifest of a finished set.

    Raises:
      DataError: if it is damaged.
    """
    kinds = dict(count=int, shards=list, mean=list, std=list, tokenizer=str)
    kinds |= dict(dtype=str, statistics_of=str, variance_only=bool)
    manifest = read_object(path, remedy=AGAIN, **kinds)
    with explained(path, AGAIN):
        shards = manifest["shards"]
        pairs = [(shard["index"], shard["count"]) for shard in shards]
        if not pairs or any(type(x) is not int or x < 0 for pair in pairs for x in pair):
            raise ValueError("its shards are not numbered and counted")
        if sum(count for _, count in pairs) != manifest["count"]:
            raise ValueError(f"count is {manifest['count']}, that of its shards another")
        if manifest["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {manifest['dtype']!r}")
        if manifest["statistics_of"] not in ("channel", "element"):
            raise ValueError(f"statistics_of is {manifest['statistics_of']!r}")
        mean, std = (np.asarray(manifest[name], np.float64) for name in ("mean", "std"))
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f"mean and std are {list(mean.shape)} and {list(std.shape)}")
    return manifest


def map_shards(
    folder: Path, manifest: dict, dtype: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Memory-map (latents [n, views, h, w, d], labels int [n]) of every shard.

    Args:
      dtype: a key of `DTYPES`: that the latents are stored in.

    Raises:
      DataError: naming the file that is missing, damaged or of another size.
    """
    stored = np.dtype(np.uint16) if dtype == "bfloat16" else DTYPES[dtype]

    def load(kind: str, shard: dict) -> np.ndarray:
        path = folder / name_of(kind, shard["index"])
        array = read_npy(path, remedy=AGAIN, mapped=True)
        is_right = {
            "latents": array.ndim == 5 and array.dtype == stored,
            "labels": array.ndim == 1 and array.dtype.kind in "iu",
        }
        if not is_right[kind]:
            raise DataError(
                f"{path} holds {array.dtype} {list(array.shape)}, which does not fit {kind} of a "
                f"set in {dtype}, as manifest.json says; {AGAIN}"
            )
        if len(array) != shard["count"]:
            raise DataError(
                f"{path} holds {len(array)} images, the manifest says {shard['count']}; {AGAIN}"
            )
        return array

    latents, labels = ([load(x, s) for s in manifest["shards"]] for x in ("latents", "labels"))
    for shard, array in zip(manifest["shards"], latents, strict=True):
        if (shape := array.shape[1:]) != latents[0].shape[1:]:
            raise DataError(
                f"{folder / name_of('latents', shard['index'])} has latents of {list(shape)}, the "
                f"first shard of {list(latents[0].shape[1:])}; {AGAIN}"
            )
    return [array.view(DTYPES[dtype]) for array in latents], labels
