"""Time, operations and memory of steps that are sent to a device one after the other."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.benchmark.workloads import Workload
from gae_jax.kernels.fp8 import FP8
from gae_jax.nn.network import Network
from gae_jax.run.load import as_computed
from gae_jax.run.session import Session
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import check_batch, jit_on, put_batch
from gae_jax.runtime.sharding import place
from gae_jax.train.fit import init_state, jit_step


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
      steps: mean time of a step in every repeat.
      dispatch: time until a call returned on the host while the device was still at work. The
        shortest call of every repeat counts, and of these the median: once the device's queue is
        full (CUDA holds a thousand kernels, a few steps), a call waits for room in it.
    """

    steps: tuple[float, ...]
    dispatch: float

    @property
    def median(self) -> float:
        return float(np.median(self.steps))


def time_steps(
    call: Callable[[int], Any], wait: Callable[[], None], *, steps: int, repeats: int
) -> Times:
    """Time repeats of ``steps`` calls each.

    Args:
      call: starts step i, counted over all repeats.
      wait: returns when everything that was started is done; called between repeats.
    """
    means, dispatch = [], []
    wait()
    for repeat in range(repeats):
        calls = []
        start = time.perf_counter()
        for step in range(steps):
            before = time.perf_counter()
            call(repeat * steps + step)
            calls.append(time.perf_counter() - before)
        wait()
        dispatch.append(min(calls))
        means.append((time.perf_counter() - start) / steps)
    return Times(tuple(means), float(np.median(dispatch)))


def measure(
    call: Callable[[int], Any],
    wait: Callable[[], None],
    config,
    *,
    images: int,
    operations: int | None,
    steps: int,
) -> dict[str, Any]:
    """Warm up and time repeats.

    Args:
      call, wait, steps: as of `time_steps`.
      config: the section ``bench``, with ``warmup`` and ``repeats``.
      images: of one step.
      operations: of one step on all devices, if they are counted.
    """
    start = time.perf_counter()
    for index in range(config.warmup):
        call(index)
    wait()
    warmup_seconds = time.perf_counter() - start
    times = time_steps(call, wait, steps=steps, repeats=config.repeats)
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


def random_arrays(network: Network, random: np.random.Generator) -> tuple[dict, dict]:
    """Make random (parameters, rest) of a frozen network on the host, in the dtypes of `load`.

    The network's own initialisation would have to be compiled, which takes longer than what is
    timed. Parameters are normal with std 0.02 (fp8 weights with 100, as `kernels.fp8` gives them),
    the rest (variances among it) is between 0.5 and 1.5; a block of numbers is repeated.
    """
    normal = 0.02 * random.standard_normal(2**20, np.float32)
    positive = 0.5 + random.random(2**20, np.float32)

    def fill(block):
        def fill_leaf(leaf):
            numbers = 5_000 * normal if leaf.dtype == FP8 else block
            return np.resize(numbers, leaf.shape).astype(leaf.dtype)

        return fill_leaf

    params, rest = network.abstract
    params = as_computed(network, jax.tree.map(fill(normal), params))
    return params, jax.tree.map(fill(positive), rest)


def time_workload(
    session: Session, workload: Workload, operations: int | None, *, steps: int
) -> dict[str, Any]:
    """Compile a workload and time it on the session's mesh; returns a row of figures.

    Args:
      operations: of one step on all devices, if they are counted.
      steps: in every repeat.
    """
    config, mesh = session.config.bench, session.mesh
    check_batch(workload.images, mesh, f"bench: batch_size of {workload.name}")
    # `jit_step` and `init_state` need the attributes of a Stage that a Workload has
    jitted, shardings = jit_step(workload, mesh)
    state = init_state(workload, shardings, session.config.seed)
    random = np.random.default_rng(session.config.seed)
    frozen = {
        name: place(random_arrays(network, random), mesh)
        for name, network in workload.frozen.items()
    }
    batches = [put_batch(workload.batch(random), mesh) for _ in range(config.batches)]
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    key = jax.jit(lambda: stage_key(workload.name, session.config.seed), out_shardings=replicated)()
    jax.block_until_ready((state, frozen, batches, key))

    start = time.perf_counter()
    compiled = jitted.lower(state, batches[0], key, frozen, workload.phase).compile()
    compile_seconds = time.perf_counter() - start
    output = None

    def call(index):
        nonlocal state, output
        state, output = compiled(state, batches[index % len(batches)], key, frozen)

    def wait():
        jax.block_until_ready((state, output))

    before = peak_memory()
    images = workload.images
    row = {
        "compile_seconds": compile_seconds,
        **measure(call, wait, config, images=images, operations=operations, steps=steps),
        **memory_figures(before),
        "program_memory_bytes": program_memory(compiled),
        "devices": mesh.size,
    }
    if config.chained and jax.tree.leaves(state):
        chained = chain(workload, mesh, shardings, config.chained)
        chained = chained.lower(state, batches[0], key, frozen).compile()

        def call_chained(index):
            nonlocal state
            state = chained(state, batches[index % len(batches)], key, frozen)

        times = measure(call_chained, wait, config, images=images, operations=None, steps=1)
        row["chained_ms_per_step"] = times["ms_per_step"] / config.chained
        row["host_ms"] = row["ms_per_step"] - row["chained_ms_per_step"]
    return row


def chain(workload: Workload, mesh, shardings, steps: int):
    """Jit ``steps`` steps as one program that the host has no part in; the state is donated."""

    def run_all(state, batch, key, frozen):
        def run_step(_, state):
            return workload.step(state, batch, key, frozen, workload.phase)[0]

        return jax.lax.fori_loop(0, steps, run_step, state)

    return jit_on(mesh, donate_argnums=0, out_shardings=shardings)(run_all)


def matmul_rate(size: int, *, steps: int = 20, repeats: int = 5) -> float:
    """Measure a bf16 matmul of two [size, size] matrices on the first device, in operations/s."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    matmul = jax.jit(jnp.matmul).lower(x, x).compile()
    result = matmul(x, x)

    def call(step):
        nonlocal result
        result = matmul(x, x)

    times = time_steps(call, lambda: jax.block_until_ready(result), steps=steps, repeats=repeats)
    return 2 * size**3 / times.median


def peak_memory() -> int | None:
    """The most bytes ever in use on one device of the process; None if not counted (CPUs)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((item.get("peak_bytes_in_use", 0) for item in stats), default=0) or None


def memory_figures(before: int | None) -> dict[str, Any]:
    """The process's peak memory, and whether this workload reached it: the peak never falls.

    Args:
      before: the peak when the workload's arrays had been placed.
    """
    peak = peak_memory()
    return {
        "peak_memory_bytes": peak,
        "peak_is_this_works": None if peak is None else peak > (before or 0),
    }


def program_memory(compiled) -> int | None:
    """Bytes that a compiled program needs on one device: arguments, results, temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
