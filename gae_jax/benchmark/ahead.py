"""Compile a step ahead of time; read memory, operations and traffic from the program."""

import dataclasses
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax.benchmark.chips import Chip
from gae_jax.benchmark.collectives import Program, total_sent
from gae_jax.benchmark.workloads import Workload, arguments_of
from gae_jax.runtime.mesh import BATCH
from gae_jax.runtime.sharding import shard
from gae_jax.train.fit import jit_step

# Messages of libtpu for too large a program: "Used 20.05G of 15.75G hbm.", or "HLO temporaries
# (16.18G) exceeds available HBM (15.75G)", which leaves out the arguments.
TOO_LARGE = re.compile(
    r"(?:Used |temporaries \()([\d.]+)([KMGT])\)? (?:of|exceeds available HBM) "
    r"\(?([\d.]+)([KMGT])(?:\)| hbm)"
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def placed(workload: Workload, mesh: Mesh) -> tuple:
    """Abstract (state, batch, key, frozen) of a step, with the shardings of `train.fit`."""
    state, batch, key, frozen = arguments_of(workload)

    def at(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    rows, replicated = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    return (
        jax.tree.map(at, state, shard(state, mesh)),
        {name: at(leaf, rows) for name, leaf in batch.items()},
        at(key, replicated),
        jax.tree.map(at, frozen, shard(frozen, mesh)),
    )


def layout(tree) -> dict[str, float]:
    """Bytes of placed arrays: in all, on one device, and the share that is replicated."""
    total = on_one = replicated = 0
    for leaf in jax.tree.leaves(tree):
        bytes_ = leaf.size * leaf.dtype.itemsize
        held = leaf.dtype.itemsize
        for size in leaf.sharding.shard_shape(leaf.shape):
            held *= size
        total, on_one = total + bytes_, on_one + held
        replicated += bytes_ if held == bytes_ else 0
    return {
        "bytes": total,
        "bytes_per_device": on_one,
        "unsharded_share": replicated / total if total else 0.0,
    }


def count_parameters(state, frozen) -> dict[str, dict[str, int]]:
    """Count the parameters of every network that is trained, and of every frozen one."""

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    learned = getattr(state, "params", {})
    return {
        "parameters": {name: size(tree) for name, tree in learned.items()},
        "frozen_parameters": {name: size(params) for name, (params, _) in frozen.items()},
    }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Attributes:
      trace_seconds: time of tracing.
      seconds: time of the compiler.
    """

    compiled: Any
    trace_seconds: float
    seconds: float


def compile_step(workload: Workload, mesh: Mesh) -> Compiled:
    """Compile the step for a mesh; its devices need not exist."""
    state, batch, key, frozen = placed(workload, mesh)
    step, _ = jit_step(workload, mesh)
    start = time.perf_counter()
    lowered = step.lower(state, batch, key, frozen, workload.phase)
    between = time.perf_counter()
    compiled = lowered.compile()
    return Compiled(compiled, between - start, time.perf_counter() - between)


def too_large(error: Exception) -> tuple[int, int] | None:
    """Parse a compiler's error: (bytes needed at least, bytes available); None: another error."""
    match = TOO_LARGE.search(str(error))
    if not match:
        return None
    return tuple(int(float(match[i]) * UNITS[match[i + 1]]) for i in (1, 3))


def memory(compiled, chip: Chip | None) -> dict[str, Any]:
    """Bytes of one device by kind, and whether they fit into the chip's memory."""
    analysis = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,  # outputs in the memory of arguments
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    return {**parts, "total": total, **against(total, chip)}


def against(total: int, chip: Chip | None) -> dict[str, Any]:
    """Whether so many bytes fit into the chip's memory; None without a chip."""
    if chip is None:
        return {"capacity": None, "fits": None, "spare": None}
    return {"capacity": chip.memory, "fits": total <= chip.memory, "spare": chip.memory - total}


def traffic(compiled, mesh: Mesh) -> dict[str, Any]:
    """The collectives of a program, and the bytes that one device sends in a step."""
    program = Program(compiled.as_text())
    rows = program.collectives(dict(mesh.shape))
    return {
        "collectives": [dataclasses.asdict(row) for row in rows],
        "sent_bytes_per_device": total_sent(rows),
        "unknown_loops": len(program.unknown_loops),
    }


def estimate(
    *, flops: float, xla_flops: float, accessed: float, sent: float, images: int, chip: Chip
) -> dict[str, Any]:
    """ESTIMATE: the least time of a step by each of the chip's rates, and the longest of the three.

    Each rate is assumed to be reached in full, and all three to overlap entirely. XLA counts data
    that stays on the chip as memory traffic, which makes the estimate longer. It counts the body of
    a loop once; its bytes are therefore scaled by the ratio of operations to XLA's count.

    Args:
      flops: of one device and step, with recomputation.
      xla_flops, accessed: operations and bytes of one device and step, as XLA counts them.
      sent: bytes that one device sends, over all its links together.
      images: in the global batch.
    """
    loops = max(flops / xla_flops, 1.0) if xla_flops else 1.0
    seconds = {
        "compute": flops / chip.flops,
        "memory": accessed * loops / chip.memory_rate,
        "links": sent / chip.link_rate,
    }
    bound = max(seconds, key=seconds.get)
    return {
        "seconds": seconds,
        "bound": bound,
        "loop_factor": loops,
        "steps_per_second": 1 / seconds[bound],
        "images_per_second": images / seconds[bound],
    }
