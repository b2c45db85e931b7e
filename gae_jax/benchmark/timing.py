"""Time of steps that are sent to a device one after the other."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
      steps: mean time of a step in every repeat.
      dispatch: time until a call came back on the host, the device being still at work. Of every
        repeat the shortest counts, of these the median: once the device's queue is full (CUDA
        holds a thousand kernels, a few steps), a call waits for room in it.
    """

    steps: tuple[float, ...]
    dispatch: float

    @property
    def median(self) -> float:
        return float(np.median(self.steps))


def time_steps(
    call: Callable[[int], Any], wait: Callable[[], None], *, steps: int, repeats: int
) -> Times:
    """Repeats of ``steps`` calls each.

    Args:
      call: starts step i, counted over all repeats.
      wait: comes back when all that was started is done; called only between repeats.
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


def matmul_rate(size: int, *, steps: int = 20, repeats: int = 5) -> float:
    """Operations per second of a bf16 product of two [size, size] matrices on the first device."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    found = product(x, x)

    def call(step):
        nonlocal found
        found = product(x, x)

    times = time_steps(call, lambda: jax.block_until_ready(found), steps=steps, repeats=repeats)
    return 2 * size**3 / times.median


def peak_memory() -> int | None:
    """Most bytes ever in use on one device of the process; None where nobody counts (CPUs)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found.get("peak_bytes_in_use", 0) for found in stats), default=0) or None


def program_memory(compiled) -> int | None:
    """Bytes of one device that a compiled program asks for: arguments, results, scratch."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
