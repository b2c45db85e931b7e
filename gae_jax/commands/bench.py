"""``bench``: time, operations and memory of the config's models, on random weights and data."""

import gc
import importlib.metadata
import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gae_jax.benchmark import data, feeding, flops, timing
from gae_jax.benchmark.table import aligned
from gae_jax.benchmark.workloads import (
    WORKS,
    Work,
    arguments_of,
    plain,
    random_arrays,
)
from gae_jax.config import bind
from gae_jax.evaluation import scores
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import check_batch, jit_on, place, put_batch
from gae_jax.tokenizers import latent_shape
from gae_jax.train.fit import init_state, jit_step

# Figures of devices that rows of the host's work lack.
HOSTS = dict.fromkeys(("compile_seconds", "tflop_per_second", "peak_memory_bytes"))
MATMUL = {"cpu": 512}  # edge of the matrices, 8192 on accelerators


def time_work(
    session: Session, work: Work, operations: int | None, *, steps: int
) -> dict[str, Any]:
    """A row of figures of one work.

    Args:
      operations: of one step, on all devices, where they are counted.
      steps: in every repeat.
    """
    config, mesh = session.config.bench, session.mesh
    check_batch(work.images, mesh, f"bench: batch_size of {work.name}")
    # `jit_step` and `init_state` ask of a Stage what a Work has
    jitted, shardings = jit_step(work, mesh)
    state = init_state(work, shardings, session.config.seed)
    random = np.random.default_rng(session.config.seed)
    frozen = {name: place(random_arrays(net, random), mesh) for name, net in work.frozen.items()}
    batches = [put_batch(work.batch(random), mesh) for _ in range(config.batches)]
    key = place_key(work.name, session)
    jax.block_until_ready((state, frozen, batches, key))

    start = time.perf_counter()
    compiled = jitted.lower(state, batches[0], key, frozen, work.phase).compile()
    compile_seconds = time.perf_counter() - start
    output = None

    def call(index):
        nonlocal state, output
        state, output = compiled(state, batches[index % len(batches)], key, frozen)

    def wait():
        jax.block_until_ready((state, output))

    before = timing.peak_memory()
    row = {
        "compile_seconds": compile_seconds,
        **measure(call, wait, config, images=work.images, operations=operations, steps=steps),
        **memory(before),
        "program_memory_bytes": timing.program_memory(compiled),
        "devices": mesh.size,
    }
    if config.chained and jax.tree.leaves(state):
        chained = chain(work, mesh, shardings, config.chained)
        chained = chained.lower(state, batches[0], key, frozen).compile()

        def call_chained(index):
            nonlocal state
            state = chained(state, batches[index % len(batches)], key, frozen)

        times = measure(call_chained, wait, config, images=work.images, operations=None, steps=1)
        row["chained_ms_per_step"] = times["ms_per_step"] / config.chained
        row["host_ms"] = row["ms_per_step"] - row["chained_ms_per_step"]
    return row


def chain(work: Work, mesh, shardings, steps: int):
    """``steps`` steps of a work in one program, in which the host has no part; state donated."""

    def many(state, batch, key, frozen):
        def one(_, state):
            return work.step(state, batch, key, frozen, work.phase)[0]

        return jax.lax.fori_loop(0, steps, one, state)

    return jit_on(mesh, donate_argnums=0, out_shardings=shardings)(many)


def place_key(name: str, session: Session) -> jax.Array:
    """A work's key on every device of the mesh, as the compiled step wants it."""
    whole = jax.sharding.NamedSharding(session.mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda: stage_key(name, session.config.seed), out_shardings=whole)()


def measure(
    call: Callable[[int], Any],
    wait: Callable[[], None],
    config,
    *,
    images: int,
    operations: int | None,
    steps: int,
) -> dict[str, Any]:
    """Warm-up and repeats. Args as of `timing.time_steps` and `time_work`."""
    start = time.perf_counter()
    for index in range(config.warmup):
        call(index)
    wait()
    warmup_seconds = time.perf_counter() - start
    times = timing.time_steps(call, wait, steps=steps, repeats=config.repeats)
    return {
        "warmup_seconds": warmup_seconds,
        "steps": steps,
        "repeats": config.repeats,
        "images_per_step": images,
        "ms_per_step": 1e3 * times.median,
        "ms_per_step_min": 1e3 * min(times.steps),
        "ms_per_step_max": 1e3 * max(times.steps),
        "images_per_second": images / times.median,
        "dispatch_ms": 1e3 * times.dispatch,
        "tflop_per_step": operations and operations / 1e12,
        "tflop_per_second": operations and operations / 1e12 / times.median,
    }


def memory(before: int | None) -> dict[str, Any]:
    """The process's peak, and whether it is this work's: it never falls.

    Args:
      before: the peak when the work's arrays lay there already.
    """
    peak = timing.peak_memory()
    return {
        "peak_memory_bytes": peak,
        "peak_is_this_works": None if peak is None else peak > (before or 0),
    }


def time_precision_recall(session: Session, distance: str) -> dict[str, Any]:
    """A row of `scores.precision_recall`, from features in the host's memory to the two figures.

    Operations are those of the products of all pairs, 2 channels each, without padded blocks.
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
    before = timing.peak_memory()
    return {
        "compile_seconds": None,  # in the warm-up
        **measure(
            lambda index: scores.precision_recall(*sets, distance=distance),
            lambda: None,  # it gives floats
            config,
            images=n + m,
            operations=operations,
            steps=sizes.steps,
        ),
        **memory(before),
        "program_memory_bytes": None,
        "devices": 1,
    }


def time_images(session: Session, crop: str) -> dict[str, Any]:
    """A row of the data pipeline, with `benchmark.data`'s photographs in the place of the run's."""
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


def rows_of_workers(session: Session):
    """Name -> function that makes the row, of the pipeline with one worker process, two, ..."""
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
                        lambda root=root, size=size, workers=workers, cache=cache: {
                            **HOSTS,
                            **feeding.time_workers(
                                *(root, size, workers),
                                **dict(cache=cache, batch_size=config.batch_size),
                                seconds=config.seconds,
                            ),
                        },
                    )


def train_from_disk(session: Session, name: str) -> dict[str, Any]:
    """A row of a stage's training loop from JPEG files that are made for it."""
    config = session.config.bench.feeding
    with tempfile.TemporaryDirectory(prefix="gae_jax-bench-") as folder:
        row = feeding.train_from_disk(
            *(session, name, Path(folder)), images=config.images, steps=config.steps
        )
    return {**HOSTS, **row}


def time_latents(session: Session) -> dict[str, Any]:
    """A row of reading latents for the training step of the diffusion model."""
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
    """A row of the user's PyTorch callable.

    Raises:
      ConfigError: if there is no PyTorch, no such file or no such function in it.
    """
    config = session.config.bench
    path, _, name = config.torch.partition(":")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("bench.torch is set, but PyTorch is not installed; leave it empty")
    if not name or not Path(path).is_file():
        raise ConfigError(f"bench.torch is {config.torch!r}; give FILE.py:FUNCTION")
    import torch

    spec = importlib.util.spec_from_file_location("bench_torch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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


def rows_of(session: Session):
    """Name -> function that makes the row of figures."""
    config = session.config

    def of_work(name):
        operations = count_operations(config, name)
        section = config.bench[name.replace("-", "_")]
        return time_work(session, WORKS[name](config), operations, steps=section.steps)

    for name in config.bench.works:
        if name == "precision-recall":
            for distance in scores.DISTANCES:
                yield f"{name}/{distance}", lambda d=distance: time_precision_recall(session, d)
        elif name == "data":
            for crop in data.CROPS:
                yield f"{name}/{crop}", lambda crop=crop: time_images(session, crop)
            yield f"{name}/latents", lambda: time_latents(session)
            yield from rows_of_workers(session)
        elif name == "train-from-disk":
            for stage in config.bench.feeding.stages:
                yield f"{name}/{stage}", lambda stage=stage: train_from_disk(session, stage)
        else:
            yield name, lambda name=name: of_work(name)
    if config.bench.torch:
        yield "torch", lambda: time_torch(session)


def count_operations(config, name: str) -> int:
    """Of one step of a work, counted from its trace with plain attention and nothing twice."""
    work = WORKS[name](plain(config))
    state, batch, key, frozen = arguments_of(work)
    return flops.count(lambda *arrays: work.step(*arrays, work.phase), state, batch, key, frozen)


def attempt(name: str, make: Callable[[], dict]) -> dict[str, Any]:
    """The row, or what went wrong: the other works are timed all the same."""
    try:
        row = {"work": name, "error": None, **make()}
    except Exception as error:  # out of memory is a RuntimeError of XLA's
        logging.debug("bench: %s", name, exc_info=True)
        text = next(iter(str(error).splitlines()), "")
        row = {"work": name, "error": f"{type(error).__name__}: {text}"[:300]}
    gc.collect()  # arrays that only a cycle or a traceback kept
    return row


def facts(session: Session) -> dict[str, Any]:
    """What the figures depend on."""
    device = session.mesh.devices.flat[0]
    compute = {
        name: {key: session.config[name].compute[key] for key in session.config[name].compute}
        for name in ("diffusion", "tokenizer")
    }
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": session.mesh.size,
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "dtype": session.config.bench.dtype,
        "products": session.config.bench.products,
        "compute": compute,
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
    """The rows as text; "<" marks a peak that was reached before the work, "-" what is not known.

    "of matmul", "data wait" and what begins with "of" are in percent.
    """

    def cell(row, key, factor, form):
        value = row.get(key)
        if value is None:
            return "-"
        earlier = key == "peak_memory_bytes" and row["peak_is_this_works"] is False
        return "<" * earlier + format(value * factor, form)

    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    cells = [[cell(row, *column[1:]) for column in columns] for row in rows]
    found = [(row["work"], own, row["error"]) for row, own in zip(rows, cells, strict=True)]
    return aligned(["work", *(title for title, *_ in columns)], found)


def read_other(path: str) -> dict[str, float]:
    """Work -> images per second, of a file that `run` wrote; {} for no path.

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
    """Times the works, prints a table and writes it as JSON.

    Returns:
      What the file holds.

    Raises:
      UserError: at the end, if a work failed.
    """
    config = session.config.bench
    other = read_other(config.compare)
    platform = session.mesh.devices.flat[0].platform
    size = config.matmul or MATMUL.get(platform, 8192)
    rate = timing.matmul_rate(size)
    logging.info("bench: a bf16 product of %d x %d: %.1f TFLOP/s", size, size, rate / 1e12)
    result = {**facts(session), "matmul_size": size, "matmul_tflop_per_second": rate / 1e12}
    result["rows"] = []
    path = Path(config.out) if config.out else session.run.path / "bench.json"
    for name, make in rows_of(session):
        row = attempt(name, make)
        if (found := row.get("tflop_per_second")) is not None:
            row["fraction_of_matmul"] = found * 1e12 / (rate * row["devices"])
        if name in other and not row["error"]:
            row["ratio"] = row["images_per_second"] / other[name]
        logging.info(
            "bench: %s: %s",
            name,
            row["error"] or f"{row['ms_per_step']:.2f} ms, {row['images_per_second']:.1f} images/s",
        )
        result["rows"].append(row)
        write_json(path, result)  # what is measured stays, whatever comes
    print(table(result["rows"]))
    logging.info("bench: %s", path)
    if failed := [row["work"] for row in result["rows"] if row["error"]]:
        raise UserError(
            f"bench: {len(failed)} of {len(result['rows'])} works failed: {', '.join(failed)}; "
            "the table says why. Out of memory: a smaller batch (--config.bench."
            f"{failed[0].replace('-', '_')}.batch_size=N), or recomputed activations "
            "(diffusion.compute.remat, tokenizer.compute.remat)"
        )
    return result
