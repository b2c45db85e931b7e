"""``bench``: time, operations and memory of the config's models, on random weights and data."""

import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gae_jax.benchmark import data, feeding, flops, timing
from gae_jax.benchmark.rows import failure, make_rows, table_of
from gae_jax.benchmark.timing import measure, memory_figures, peak_memory
from gae_jax.benchmark.workloads import (
    TIMED,
    arguments_of,
    plain,
    timed_workload,
    with_timed_precision,
)
from gae_jax.config import bind
from gae_jax.config.precision import NETWORKS, settings
from gae_jax.evaluation import scores
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json
from gae_jax.tokenizers import latent_shape

# Figures of devices that rows of the host's work lack.
HOSTS = dict.fromkeys(("compile_seconds", "tflop_per_second", "peak_memory_bytes"))
MATMUL = {"cpu": 512}  # edge of the matrices, 8192 on accelerators


def time_precision_recall(session: Session, distance: str) -> dict[str, Any]:
    """Time `scores.precision_recall`, from features in the host's memory to the two figures.

    Operations are those of the matmul of all pairs, 2 per channel, without padded blocks.
    """
    config = session.config.bench
    sizes = config.precision_recall
    random = np.random.default_rng(session.config.seed)
    n, m = sizes.reference, sizes.generated
    # squares: features after a ReLU and a mean are not negative
    sets = [
        np.square(random.standard_normal((rows, sizes.channels), np.float32)) for rows in (n, m)
    ]
    operations = 2 * sizes.channels * (n * n + m * m + n * m)
    before = peak_memory()
    return {
        "compile_seconds": None,  # in the warm-up
        **measure(
            lambda index: scores.precision_recall(*sets, distance=distance),
            lambda: None,  # it returns floats
            config,
            images=n + m,
            operations=operations,
            steps=sizes.steps,
        ),
        **memory_figures(before),
        "program_memory_bytes": None,
        "devices": 1,
    }


def time_images(session: Session, crop: str) -> dict[str, Any]:
    """Time the data pipeline on photographs of `benchmark.data` instead of the run's images."""
    config = session.config
    with tempfile.TemporaryDirectory(prefix="gae_jax-bench-") as folder:
        return {
            **HOSTS,
            **data.time_data(
                Path(folder),
                crop,
                image_size=config.data.image_size,
                repeats=config.bench.repeats,
                seed=config.seed,
                say=lambda what: logging.info("bench: data: %s", what),
                **bind(data.time_data, config.bench.data, "bench.data"),
            ),
        }


Makers = Iterator[tuple[str, Callable[[], dict]]]  # (name, function that makes the row)


def rows_of_workers(session: Session) -> Makers:
    """Rows of the data pipeline with one worker process, two, ..."""
    config = session.config.bench.feeding
    with tempfile.TemporaryDirectory(prefix="gae_jax-bench-") as folder:
        for size in config.sizes:
            (root := Path(folder) / str(size)).mkdir()
            feeding.write_files(root, size, config.images, session.config.seed)
            for cache in (False, True):
                for workers in config.workers:
                    if workers > data.cores():
                        continue
                    kind = "cache" if cache else "jpeg"
                    yield (
                        f"data/{size}px-{kind}-{workers}",
                        partial(_time_workers, config, root, size, workers, cache),
                    )


def _time_workers(config, root: Path, size: int, workers: int, cache: bool) -> dict[str, Any]:
    """Time worker processes, or the cache, as a row; ``config`` is ``bench.feeding``."""
    row = feeding.time_workers(
        *(root, size, workers),
        **dict(cache=cache, batch_size=config.batch_size),
        seconds=config.seconds,
    )
    return {**HOSTS, **row}


def train_from_disk(session: Session, name: str) -> dict[str, Any]:
    """Time a stage's training loop from JPEG files that are made for it."""
    config = session.config.bench.feeding
    with tempfile.TemporaryDirectory(prefix="gae_jax-bench-") as folder:
        row = feeding.train_from_disk(
            *(session, name, Path(folder)), images=config.images, steps=config.steps
        )
    return {**HOSTS, **row}


def time_latents(session: Session) -> dict[str, Any]:
    """Time reading latents for the training step of the diffusion model."""
    config = session.config
    with tempfile.TemporaryDirectory(prefix="gae_jax-bench-") as folder:
        return {
            **HOSTS,
            **data.time_latents(
                Path(folder),
                latent_shape(config),
                batch_size=config.bench.dit_train.batch_size,
                workers=config.bench.data.workers,
                repeats=config.bench.repeats,
                seed=config.seed,
            ),
        }


def time_torch(session: Session) -> dict[str, Any]:
    """Time the user's PyTorch callable.

    Raises:
      ConfigError: if PyTorch is not installed, or there is no such file or function in it.
    """
    config = session.config.bench
    path, _, name = config.torch.partition(":")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("bench.torch is set, but PyTorch is not installed; leave it empty")
    if not name or not Path(path).is_file():
        raise ConfigError(f"bench.torch is {config.torch!r}; give FILE.py:FUNCTION")
    import torch

    loader = importlib.machinery.SourceFileLoader("bench_torch", path)
    spec = importlib.machinery.ModuleSpec("bench_torch", loader, origin=path)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if not hasattr(module, name):
        raise ConfigError(f"bench.torch: {path} has no function {name}")
    call, images = getattr(module, name)()
    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    return {
        "compile_seconds": None,
        **measure(lambda index: call(), wait, config, images=images, operations=None, steps=10),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_is_this_works": on_gpu or None,
        "program_memory_bytes": None,
        "devices": 1,
    }


def time_model(session: Session, name: str) -> dict[str, Any]:
    """Time a workload of `TIMED`."""
    config = session.config
    return timing.time_workload(
        session,
        timed_workload(config, name),
        count_operations(config, name),
        steps=config.bench[name.replace("-", "_")].steps,
    )


def rows_of(session: Session) -> Makers:
    """The rows that the config asks for."""
    config = session.config
    for name in config.bench.works:
        if name == "precision-recall":
            for distance in scores.DISTANCES:
                yield f"{name}/{distance}", partial(time_precision_recall, session, distance)
        elif name == "data":
            for crop in data.CROPS:
                yield f"{name}/{crop}", partial(time_images, session, crop)
            yield f"{name}/latents", lambda: time_latents(session)
            yield from rows_of_workers(session)
        elif name == "train-from-disk":
            for stage in config.bench.feeding.stages:
                yield f"{name}/{stage}", partial(train_from_disk, session, stage)
        else:
            yield name, partial(time_model, session, name)
    if config.bench.torch:
        yield "torch", lambda: time_torch(session)


def count_operations(config, name: str) -> int:
    """Count the operations of one step from its trace, with plain attention and nothing twice."""
    workload = timed_workload(plain(config), name)
    arguments = arguments_of(workload)
    return flops.count(lambda *arrays: workload.step(*arrays, workload.phase), *arguments)


def facts(session: Session) -> dict[str, Any]:
    """The facts that the figures depend on."""
    device = session.mesh.devices.flat[0]
    config = with_timed_precision(session.config)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": session.mesh.size,
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "precision": {name: settings(config, name) for name in NETWORKS},
    }


COLUMNS = (
    # title, key, factor, format
    ("compile s", "compile_seconds", 1, ".1f"),
    ("ms/step", "ms_per_step", 1, ".2f"),
    ("min", "ms_per_step_min", 1, ".2f"),
    ("max", "ms_per_step_max", 1, ".2f"),
    ("images/s", "images_per_second", 1, ".1f"),
    ("TFLOP/s", "tflop_per_second", 1, ".2f"),
    ("of matmul", "fraction_of_matmul", 100, ".1f"),
    ("peak GiB", "peak_memory_bytes", 2**-30, ".2f"),
    ("program GiB", "program_memory_bytes", 2**-30, ".2f"),
    ("dispatch ms", "dispatch_ms", 1, ".3f"),
    ("host ms", "host_ms", 1, ".3f"),
    ("bare images/s", "bare_images_per_second", 1, ".1f"),
    ("of bare", "of_bare", 100, ".1f"),
    ("CPU ms/image", "cpu_ms_per_image", 1, ".2f"),
    ("CPU of bare", "cpu_of_bare", 100, ".1f"),
    ("of repeated", "of_repeated", 100, ".1f"),
    ("data wait", "data_wait", 100, ".1f"),
    ("ratio", "ratio", 1, ".3f"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Show the rows as text; "<" marks a peak that was reached before the workload.

    "of matmul", "data wait" and what begins with "of" are in percent.
    """
    return table_of(
        rows,
        COLUMNS,
        mark=lambda row, path: (
            "<" if path == "peak_memory_bytes" and row["peak_is_this_works"] is False else ""
        ),
    )


def read_other(path: str) -> dict[str, float]:
    """Read workload -> images per second from a file that `run` wrote; {} for no path.

    Raises:
      ConfigError: if the file is not one of those.
    """
    if not path:
        return {}
    if not Path(path).is_file():
        raise ConfigError(f"bench.compare: there is no file {path}")
    try:
        rows = read_json(Path(path))["rows"]
        return {row["work"]: row["images_per_second"] for row in rows if not row["error"]}
    except (KeyError, TypeError):
        raise ConfigError(f"bench.compare: {path} was not written by `bench`") from None


def run(session: Session) -> dict[str, Any]:
    """Time the workloads, print a table and write it as JSON.

    Returns:
      The contents of the file.

    Raises:
      UserError: at the end, if a workload failed.
    """
    config = session.config.bench
    other = read_other(config.compare)
    platform = session.mesh.devices.flat[0].platform
    size = config.matmul or MATMUL.get(platform, 8192)
    rate = timing.matmul_rate(size)
    logging.info("bench: a bf16 matmul of %d x %d: %.1f TFLOP/s", size, size, rate / 1e12)
    result = {**facts(session), "matmul_size": size, "matmul_tflop_per_second": rate / 1e12}
    path = Path(config.out) if config.out else session.run.path / "bench.json"

    def finish(row):
        if (reached := row.get("tflop_per_second")) is not None:
            row["fraction_of_matmul"] = reached * 1e12 / (rate * row["devices"])
        if row["work"] in other:
            row["ratio"] = row["images_per_second"] / other[row["work"]]
        logging.info(
            "bench: %s: %.2f ms, %.1f images/s",
            *(row["work"], row["ms_per_step"], row["images_per_second"]),
        )

    failed = make_rows("bench", rows_of(session), result, path, finish=finish)
    print(table(result["rows"]))
    if failed:
        models = [name for name in failed if name in TIMED]
        remedy = (
            f". If it was out of memory: a smaller batch (--config.bench."
            f"{models[0].replace('-', '_')}.batch_size=N), or recomputed activations "
            "(precision.diffusion.remat, precision.tokenizer.remat)"
            if models
            else ""
        )
        raise UserError(failure("bench", failed, len(result["rows"])) + remedy)
    return result
