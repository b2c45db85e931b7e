"""Time feeding an accelerator from JPEG files: the pipeline by itself, and in training."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gae_jax.benchmark.data import (
    Cost,
    figures_of,
    photographs,
    time_bare,
    time_pipeline,
    write_folder,
)
from gae_jax.benchmark.timing import random_arrays
from gae_jax.benchmark.workloads import make_workload
from gae_jax.data.batches import Batches
from gae_jax.data.pipeline import ImageData
from gae_jax.run.session import Session
from gae_jax.runtime.distributed import cores
from gae_jax.runtime.mesh import put_rows
from gae_jax.runtime.sharding import place
from gae_jax.train.fit import Stage, fit
from gae_jax.train.log import read_metrics

# Edge of the crops -> size of the files; of larger crops it is ImageNet's.
FILES = {64: (64, 64)}
LOOPS = ("repeated", "files", "resident")


def write_files(folder: Path, size: int, count: int, seed: int) -> list[Path]:
    """Write ``count`` JPEG files for crops of ``size``, of which 512 differ."""
    shape = FILES.get(size, (500, 375)) if size > 32 else (size, size)
    contents = photographs(min(count, 512), seed, shape)
    return write_folder(folder, list(itertools.islice(itertools.cycle(contents), count)))


def image_data(folder: Path, size: int, **changes) -> ImageData:
    """The data of class folders, with centre crops and mirror images."""
    fields = dict(name="folder", root=str(folder), holdout=0.0, image_size=size, crop="center")
    fields |= dict(mirror=True, on_corrupt="error", workers=0)
    return ImageData(**fields | changes)


def time_workers(
    folder: Path, size: int, workers: int, *, cache: bool, batch_size: int, seconds: float
) -> dict[str, Any]:
    """Measure the pipeline with some processes, compared with as many bare ones.

    Args:
      folder: of `write_files`.
      cache: read decoded images from a cache, which is filled before.
      seconds: approximate duration of either loop.
    """
    paths = sorted((folder / "photographs").iterdir())
    fields = dict(cache="disk", cache_dir=str(folder.parent / "cache")) if cache else {}
    data = image_data(folder, size, workers=workers, **fields)
    source = data.source("train")
    start = time.perf_counter()
    read = data.training_batches(source, batch_size, 0)
    filled = time.perf_counter() - start
    warmup = 2 + 4 * workers
    guess = time_pipeline(read, max(4, workers), warmup=warmup)
    batches = max(4, min(20_000, int(seconds / (guess.clock * batch_size))))
    pipeline = time_pipeline(read, batches, warmup=warmup)
    if cache:
        row = figures_of([pipeline], [Cost(np.nan, np.nan)], batches, batch_size)
        row = {key: value for key, value in row.items() if "bare" not in key}
        row["fill_seconds"] = filled
    else:
        count = max(workers, int(seconds / pipeline.clock))
        bare = time_bare(paths, "center", size, workers=workers, count=count, warmup=64 * workers)
        row = figures_of([pipeline], [bare], batches, batch_size)
    return row | {"workers": workers, "image_size": size, "cache": cache}


@dataclasses.dataclass(frozen=True)
class InTurn(Batches):
    """``steps`` batches of each of `LOOPS`, one loop after the other."""

    steps: int = 0
    place: Any = None

    def read(self, rows=None, start: int = 0) -> Iterator:
        batch = next(first := iter(super().read(rows)))
        first.close()
        yield from itertools.repeat(batch, self.steps)
        files = iter(super().read(rows, 1))
        yield from itertools.islice(files, self.steps)
        files.close()
        yield from itertools.repeat(self.place(batch))


def train_from_disk(
    session: Session, name: str, folder: Path, *, images: int, steps: int
) -> dict[str, Any]:
    """Measure the training loop of a stage from JPEG files, compared with repeating one batch.

    The repeated batch is in the host's memory and is transferred at every step, or, "resident", is
    on the devices. One training runs all loops, so that nothing is compiled twice; the second half
    of each is measured. All networks have random weights.

    Args:
      name: a stage of `workloads.TRAINED` that trains on images.
      folder: an empty folder.
      images: number of files; the epochs repeat them.
      steps: measured steps of each loop.
    """
    config, mesh = session.config, session.mesh
    size = config[name].train.batch_size
    (root := folder / "images").mkdir()
    write_files(root, config.data.image_size, images, config.seed)
    data = dataclasses.replace(
        session.data,
        **dict(name="folder", root=str(root), holdout=0.0),
        cache_dir=str(folder / "cache"),
    )
    workload, random = make_workload(config, name), np.random.default_rng(config.seed)
    frozen = {
        key: place(random_arrays(network, random), mesh) for key, network in workload.frozen.items()
    }
    source, clock = data.source("train"), []
    start = time.perf_counter()
    batches = data.training_batches(source, size, config.seed)
    filled = time.perf_counter() - start
    fields = {field.name: getattr(batches, field.name) for field in dataclasses.fields(Batches)}

    def on_devices(batch):
        return put_rows(batch, mesh, size)

    def evaluate(state):
        jax.block_until_ready(state)
        clock.append(time.perf_counter())
        return {}

    stage = Stage(
        name=f"bench-{name}",
        init=workload.init,
        step=workload.step,
        batches=lambda _: InTurn(**fields, steps=2 * steps, place=on_devices),
        frozen=frozen,
        evaluate=evaluate,
        phase=lambda _: workload.phase,
    )
    ahead = 2 * len(LOOPS) * steps
    fit(
        stage, folder / "fit", mesh, seed=config.seed, steps=ahead, batch_size=size,
        log_every=ahead, eval_every=steps, save_every=ahead, keep=1,
    )  # fmt: skip
    waits = [row["data_wait"] for row in read_metrics(folder / "fit")]
    seconds = {loop: (clock[2 * at + 1] - clock[2 * at]) / steps for at, loop in enumerate(LOOPS)}
    figures = {f"{loop}_images_per_second": size / value for loop, value in seconds.items()}
    return {
        "steps": steps,
        "images_per_step": size,
        "ms_per_step": 1e3 * seconds["files"],
        "images_per_second": size / seconds["files"],
        **figures,
        "of_repeated": seconds["repeated"] / seconds["files"],
        "of_resident": seconds["resident"] / seconds["files"],
        "data_wait": waits[2 * LOOPS.index("files") + 1],
        "image_size": config.data.image_size,
        "crop": data.crop,
        "cache": data.cache,
        "fill_seconds": filled,
        "workers": data.processes(source, len(source)),
        "cores": cores(),
        "devices": mesh.size,
    }
