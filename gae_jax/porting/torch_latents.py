"""Import and export latents in the files of the released code.

Its folder has ``latents_rankRR_shardSSS.safetensors``, each with ``latents`` and ``latents_flip``
[n, d, h, w] (of the mirrored images: encoded, not mirrored) and ``labels`` [n]. Beside them is
``latents_stats.pt``: mean and std [1, d, 1, 1] of 10,000 random ones, drawn without a seed.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import re
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from gae_jax.data.latent_files import DTYPES
from gae_jax.data.latent_shards import finish_set, finished_shards, write_shard
from gae_jax.data.latents import LatentSet
from gae_jax.interop.files import write_safetensors
from gae_jax.porting.latent_statistics import of_channels
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import DataError, UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.runtime.progress import Progress

SHARD = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
VIEWS = {"image": "latents", "mirror": "latents_flip"}  # ours -> the tensor of a released file
STATISTICS = ("latents_stats.safetensors", "latents_stats.pt")  # the first needs no torch
NOTABLE = 0.01  # difference of statistics that is warned of, in units of std


@dataclasses.dataclass(frozen=True)
class ReleasedLatents:
    """A folder of released latents that was checked.

    Attributes:
      files: the shards, by rank and number.
      counts: images in each.
      views: those of `VIEWS` that every file has.
      statistics: (mean, std) of the folder, [d] each, or None.
      digest: of the names and sizes of the files, and of the statistics.
    """

    files: tuple[Path, ...]
    counts: tuple[int, ...]
    views: tuple[str, ...]
    statistics: tuple[np.ndarray, np.ndarray] | None
    digest: str

    @property
    def source(self) -> dict:
        """What the manifest says about the source of the latents."""
        return {"files": [path.name for path in self.files], "digest": self.digest}


def survey(path: Path, shape: tuple[int, int, int]) -> ReleasedLatents:
    """Read the headers and labels of a folder of released latents.

    Args:
      shape: (h, w, d) of the tokenizer's latents.

    Raises:
      DataError: if the folder has no shards, or a file is truncated, lacks a tensor or has one of
        a wrong shape or dtype.
      ConversionError: if the statistics are not of d channels.
    """
    numbers = {}
    for file in sorted(path.glob("*.safetensors")):
        if file.name in STATISTICS:
            continue
        if not (match := SHARD.fullmatch(file.name)):
            raise DataError(
                f"{file} is not called latents_rankRR_shardSSS.safetensors, as the released code "
                "names latents; move it out of the folder"
            )
        numbers[file] = tuple(map(int, match.groups()))
    if not numbers:
        raise DataError(
            f"{path} holds no latents_rankRR_shardSSS.safetensors; name the folder that the "
            "released code wrote them to: --config.import_torch.latents=DIR"
        )
    files = tuple(sorted(numbers, key=numbers.get))
    _warn_of_gaps(path, sorted(numbers.values()))
    headers = {file: _header(file) for file in files}
    counts = tuple(_check(file, headers[file], shape) for file in files)
    if not sum(counts):
        raise DataError(f"{path}: its {len(files)} files hold no image; extract the latents again")
    without = [file.name for file in files if VIEWS["mirror"] not in headers[file]]
    if 0 < len(without) < len(files):
        raise DataError(
            f"{path}: {len(without)} of {len(files)} files have no latents_flip: "
            f"{', '.join(without[:8])}; extract these again, or take latents_flip out of all"
        )
    stats_files = [path / name for name in STATISTICS if (path / name).exists()]
    statistics = of_channels(stats_files[0], shape[-1]) if stats_files else None
    digest = hashlib.sha256(json.dumps([(f.name, f.stat().st_size) for f in files]).encode())
    for value in statistics or ():
        digest.update(value.tobytes())
    views = ("image",) if without else tuple(VIEWS)
    return ReleasedLatents(files, counts, views, statistics, digest.hexdigest())


def _warn_of_gaps(path: Path, numbers: list[tuple[int, int]]) -> None:
    """Warn of gaps in the numbering, which starts at 0 in every rank: files may be missing."""
    present = set(numbers)
    last = dict(numbers)  # sorted: the highest one stays
    missing = [
        f"rank {rank}, shard {shard}"
        for rank in range(max(last) + 1)
        for shard in range(last.get(rank, 0) + 1)
        if (rank, shard) not in present
    ]
    if missing:
        logging.warning(
            "import-torch: %s lacks %d files by its numbering: %s",
            *(path, len(missing), "; ".join(missing[:4])),
        )


def _header(file: Path) -> dict[str, tuple[list[int], str]]:
    """Read a header: name of a tensor -> (shape, dtype)."""
    try:
        with safe_open(file, "numpy") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118, a handle is no dict
            return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file} is not a complete safetensors file ({error}); copy or extract it again"
        ) from error


def _check(file: Path, header: dict, shape: tuple[int, int, int]) -> int:
    """Check the tensors of a file; returns its number of images.

    Raises:
      DataError: if they are not latents of shape [n, d, h, w] and their labels [n].
    """
    h, w, d = shape
    for name in ("latents", "labels"):
        if name not in header:
            raise DataError(
                f"{file} has no tensor {name!r}, it has {sorted(header)}; extract it again with "
                "the released code"
            )
    for name in VIEWS.values():
        sizes, dtype = header.get(name, ([0, d, h, w], "F32"))
        if sizes[1:] != [d, h, w]:
            raise DataError(
                f"{file}: {name} is {sizes}, the run's tokenizer makes {['n', d, h, w]} (channels "
                "first); give the config of the tokenizer that made them"
            )
        if dtype not in ("F32", "F16", "BF16"):
            raise DataError(
                f"{file}: {name} has dtype {dtype}; save it as float32, float16 or bfloat16"
            )
    count = header["latents"][0][0]
    for name in (VIEWS["mirror"], "labels"):
        if name in header and header[name][0][0] != count:
            raise DataError(
                f"{file}: {name} is of {header[name][0][0]} images, latents of {count}; extract "
                "it again"
            )
    if len(header["labels"][0]) != 1 or header["labels"][1][0] not in "IU":
        raise DataError(
            f"{file}: labels are {header['labels'][0]} of dtype {header['labels'][1]}; they must "
            "be integers, one for each image"
        )
    labels = _labels(file)
    if count and not 0 <= labels.min() <= labels.max() <= np.iinfo(np.int32).max:
        raise DataError(
            f"{file}: labels go from {labels.min()} to {labels.max()}; number the classes from 0"
        )
    return count


def _labels(file: Path) -> np.ndarray:
    with safe_open(file, "numpy") as content:
        return content.get_tensor("labels")


def is_imported(session: Session, released: ReleasedLatents, tokenizer: str) -> bool:
    """Whether the run already has these latents.

    Raises:
      UserError: if it has others and ``--fresh`` is not given.
    """
    folder = session.run.stage("latents")
    if session.fresh or not folder.done:
        return False
    manifest = read_json(folder.path / "manifest.json")
    wanted = dict(source=released.source, tokenizer=tokenizer, dtype=session.config.latents.dtype)
    if differing := [name for name, value in wanted.items() if manifest.get(name) != value]:
        raise UserError(
            f"{folder.path} already holds other latents (differing: {', '.join(differing)}); give "
            "another --workdir, or --fresh to replace them"
        )
    return True


def write_stage(session: Session, released: ReleasedLatents, tokenizer: str) -> None:
    """Write the stage ``latents`` from a released folder, one file at a time.

    Each file becomes a shard; those that an interrupted session wrote are not written again.

    Args:
      tokenizer: fingerprint of the run's tokenizer.

    Raises:
      DataError: for latents that are not finite; earlier shards stay.
    """
    start, folder = time.monotonic(), session.run.stage("latents")
    dtype = session.config.latents.dtype
    sections = {"latents": {"dtype": dtype}, "import_torch": {"latents": released.digest}}
    folder.open(sections, {"tokenizer": tokenizer}, fresh=session.fresh)
    done = finished_shards(folder.path, len(released.files), tokenizer=tokenizer)
    ready = sum(released.counts[index] for index in done)
    with Progress("import latents", sum(released.counts), done=ready, unit="image") as progress:
        for index, file in enumerate(released.files):
            if index in done:
                continue
            latents = read_latents(file, released.views, DTYPES[dtype])
            labels = _labels(file).astype(np.int32)
            write_shard(folder.path, index, latents, labels, skipped=0, tokenizer=tokenizer)
            progress.update(len(labels))
    facts = dict(
        imported=True,
        tokenizer=tokenizer,
        source=released.source,
        views=list(released.views),
        statistics="exact",
    )
    manifest = finish_set(folder.path, len(released.files), dtype=dtype, **facts)
    if released.statistics:
        manifest = with_statistics(manifest, *released.statistics)
        write_json(folder.path / "manifest.json", manifest)
    folder.finish(
        seconds=time.monotonic() - start,
        fingerprint=hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16],
        count=manifest["count"],
        skipped=manifest["skipped"],
        imported=True,
    )


def read_latents(file: Path, views: tuple[str, ...], dtype: np.dtype) -> np.ndarray:
    """Read the latents of a released file, [n, views, h, w, d].

    Raises:
      DataError: if a latent is not finite.
    """
    latents = None
    with safe_open(file, "numpy") as content:
        for at, view in enumerate(views):
            tensor = np.moveaxis(content.get_tensor(VIEWS[view]), 1, -1)
            bad = np.flatnonzero(~np.isfinite(tensor).all(axis=(1, 2, 3)))
            if len(bad):
                raise DataError(
                    f"{file}: {VIEWS[view]}[{bad[0]}] is not finite, as {len(bad)} of "
                    f"{len(tensor)} are not; extract it again"
                )
            if latents is None:
                latents = np.empty((len(tensor), len(views), *tensor.shape[1:]), dtype)
            latents[:, at] = tensor
    return latents


def with_statistics(manifest: dict, mean: np.ndarray, std: np.ndarray) -> dict:
    """Add imported statistics to a manifest; the exact ones are kept under other names.

    A diffusion model that was trained on the released statistics needs those.
    """
    exact_mean, exact_std = np.array(manifest["mean"]), np.array(manifest["std"])
    unit = np.maximum(exact_std, np.finfo(np.float32).tiny)
    differences = [np.abs(mean - exact_mean) / unit, np.abs(std - exact_std) / unit]
    if (largest := np.max(differences)) > NOTABLE:
        logging.warning(
            "import-torch: the imported statistics differ from the exact ones of these latents by "
            "up to %.3g std; remove the statistics file to use the exact ones",
            largest,
        )
    return manifest | {
        "statistics": "imported",
        "mean": mean.astype(np.float64).tolist(),
        "std": std.astype(np.float64).tolist(),
        "exact_mean": manifest["mean"],
        "exact_std": manifest["std"],
    }


def export(folder: StageFolder, target: Path) -> None:
    """Write the latents of a finished stage as released shards, one for each of ours.

    bfloat16 is kept: the released dataset class subtracts float32 statistics, which makes it
    float32. Statistics are not written: that class takes every .safetensors in the folder for a
    shard, and its own file of them is a torch file.

    Args:
      target: an empty folder.
    """
    latents = LatentSet.open(folder.path)
    views, labels = latents.views(), latents.labels
    names = [VIEWS[view] for view in latents.manifest["views"]]
    ends = np.cumsum([0, *(shard["count"] for shard in latents.manifest["shards"])])
    with Progress("export latents", len(latents), unit="image") as progress:
        for shard, (first, stop) in enumerate(itertools.pairwise(ends)):
            rows = views[first:stop]
            tensors = {name: np.moveaxis(rows[:, at], -1, 1) for at, name in enumerate(names)}
            tensors["labels"] = labels[first:stop].astype(np.int64)
            write_safetensors(target / f"latents_rank00_shard{shard:03}.safetensors", tensors)
            progress.update(len(rows))
    print(
        f"\nlatents: {folder.path}\n  {len(latents)} images, {', '.join(names)}, "
        f"{latents.manifest['dtype']}"
    )
    if VIEWS["mirror"] not in names:
        logging.warning(
            "export-torch: the set has no mirrored images (data.mirror is off), so the files have "
            "no latents_flip, which the released ImgLatentDataset reads every second time"
        )
