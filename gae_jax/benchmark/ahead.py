"""A step compiled ahead of time, and what its program says of memory, work and traffic."""

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
from gae_jax.runtime import mesh as parallel
from gae_jax.train.fit import jit_step

# What libtpu says when a program is too large: "Used 20.05G of 15.75G hbm.", or "HLO temporaries
# (16.18G) exceeds available HBM (15.75G)", which leaves out the arguments.
TOO_LARGE = re.compile(
    r"(?:Used |temporaries \()([\d.]+)([KMGT])\)? (?:of|exceeds available HBM) "
    r"\(?([\d.]+)([KMGT])(?:\)| hbm)"
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def placed(workload: Workload, mesh: Mesh) -> tuple:
    """Abstract (state, batch, key, frozen) of a step, as `train.fit` lays them on a mesh."""
    state, batch, key, frozen = arguments_of(workload)

    def at(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    rows, whole = NamedSharding(mesh, parallel.BATCH), NamedSharding(mesh, P())
    return (
        jax.tree.map(at, state, parallel.shard(state, mesh)),
        {name: at(leaf, rows) for name, leaf in batch.items()},
        at(key, whole),
        jax.tree.map(at, frozen, parallel.shard(frozen, mesh)),
    )


def layout(tree) -> dict[str, float]:
    """Bytes of placed arrays: in all, on one device, and the share that lies whole on every one."""
    total = on_one = whole = 0
    for leaf in jax.tree.leaves(tree):
        bytes_ = leaf.size * leaf.dtype.itemsize
        held = leaf.dtype.itemsize
        for size in leaf.sharding.shard_shape(leaf.shape):
            held *= size
        total, on_one = total + bytes_, on_one + held
        whole += bytes_ if held == bytes_ else 0
    return {
        "bytes": total,
        "bytes_per_device": on_one,
        "unsharded_share": whole / total if total else 0.0,
    }


def count_parameters(state, frozen) -> dict[str, dict[str, int]]:
    """Of every network: of those that learn, and of those that are only read."""

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    learned = getattr(state, "params", {})
    return {
        "parameters": {name: size(tree) for name, tree in learned.items()},
        "frozen_parameters": {name: size(params) for name, (params, _) in frozen.items()},
    }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Attributes:
    seconds: that the compiler took, tracing apart.
    """

    compiled: Any
    trace_seconds: float
    seconds: float


def compile_step(workload: Workload, mesh: Mesh) -> Compiled:
    """The step's program for a mesh whose devices need not be there."""
    state, batch, key, frozen = placed(workload, mesh)
    step, _ = jit_step(workload, mesh)
    start = time.perf_counter()
    lowered = step.lower(state, batch, key, frozen, workload.phase)
    between = time.perf_counter()
    compiled = lowered.compile()
    return Compiled(compiled, between - start, time.perf_counter() - between)


def too_large(error: Exception) -> tuple[int, int] | None:
    """(bytes that a program needs at least, bytes that there are) if a compiler says so."""
    found = TOO_LARGE.search(str(error))
    if not found:
        return None
    return tuple(int(float(found[i]) * UNITS[found[i + 1]]) for i in (1, 3))


def memory(compiled, chip: Chip | None) -> dict[str, Any]:
    """Bytes of one device, and whether they fit into the chip's memory."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,  # outputs that lie where arguments were
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    return {**parts, "total": total, **against(total, chip)}


def against(total: int, chip: Chip | None) -> dict[str, Any]:
    """Whether so many bytes fit; nothing is known without a chip."""
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

    Each is assumed to be reached in full, and all three to overlap entirely. XLA counts as memory
    traffic what it keeps on the chip too, which makes the estimate longer, and the body of a loop
    once, whatever it turns: its bytes are scaled by the operations that it so misses.

    Args:
      flops: of one device and step, what is computed twice among them.
      xla_flops, accessed: of one device and step, as XLA counts them.
      sent: bytes that one device sends, over all its links together.
      images: of the global batch.
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
