"""What XLA's compiler for TPUs makes of a step, read from the text of the compiled program.

    PYTHONPATH=. python tests/tpu_schedule.py --config=configs/dit_xl_d32_80ep.py \\
        --workdir=runs/plan --config.plan.topology=v5p-8 --config.plan.works="('diffusion',)"

takes the arguments of ``plan``, compiles the same stages and prints what was read of each as JSON.
docs/performance_tpu.md was made with it. The compiler writes how many cycles it expects of most
instructions; they are its ESTIMATE, by which it chooses layouts and fusions, and nothing is
measured. It has none for collectives and for Pallas kernels, into which it cannot look.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator

from gae_jax.benchmark import ahead
from gae_jax.benchmark.collectives import Instruction, Program, bits_of, traffic_of
from gae_jax.benchmark.targets import target_of
from gae_jax.benchmark.workloads import batch_size_of, make_workload
from gae_jax.commands import cli, plan

PRODUCTS = {"convolution", "dot"}
MOVES = {"copy", "transpose"}
# What is neither computed nor written: names, handles, and moves that run beside the work.
NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "iota", "partition-id", "replica-id", "after-all", "opt-barrier"),
}
_CYCLES = re.compile(r'estimated_cycles":"(\d+)"')
# bf16[256,16,72]{2,1,0:T(8,128)(2,1)}: sizes, the axes from the fastest to the slowest, the tile
_LAID = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]+)\]\{([\d,]+):T\(([\d,]+)\)")


@dataclasses.dataclass(frozen=True)
class Reading:
    """Of one device and one run of the program.

    Attributes:
      cycles: that the compiler estimates, by what they go to: "products" (and what is fused to
        them), "elementwise" (and reductions), "moves" (copies to another layout).
      recomputed: of these cycles, those of what a backward pass computes again.
      kernels: calls of kernels, whose cycles are not known.
      fusions: how many, by the compiler's kind ("output": a product's; "loop"; "custom").
      written: bytes of results, as their shapes have them.
      padding: share of what they take with the tiles' padding that is padding.
      moved: bytes of copies to another layout.
      exposed: bytes that a device sends while nothing is computed: of collectives that are not
        split into a start and an end with work between.
      hidden: bytes that it sends beside work.
    """

    cycles: dict[str, int]
    recomputed: int
    kernels: int
    fusions: dict[str, int]
    written: float
    padding: float
    moved: float
    exposed: float
    hidden: float


def read(text: str, devices: int) -> Reading:
    """Of a program's text.

    Args:
      devices: of the mesh.
    """
    program = Program(text)
    cycles = dict.fromkeys(("products", "elementwise", "moves"), 0)
    fusions: dict[str, int] = {}
    recomputed = kernels = 0
    written = padded = moved = 0.0
    traffic: dict[tuple, tuple[float, bool]] = {}  # bytes of a collective, and whether beside work
    for name, times in scheduled(program):
        body = program.bodies[name]
        for place, one in enumerate(body):
            own = times * cycles_of(one)
            kind = kind_of(one, program)
            cycles[kind] += own
            recomputed += own if "rematted_computation" in one.rest or ".remat" in one.name else 0
            kernels += times * ("tpu_custom_call" in one.rest)
            if one.opcode == "fusion":
                how = re.search(r"kind=k(\w+)", one.rest)[1].lower()
                fusions[how] = fusions.get(how, 0) + times
            for where, inner in _collectives(one, name, program):
                kind_sent, arrays, sent, _ = traffic_of(inner, where, devices)
                beside = where.startswith("async_collective") or _work_until_done(body, place) > 0
                # pieces of one collective, spread over fusions, have a chain in common
                chain = re.search(r'chain_id="(\d+)"', inner.rest)
                key = (kind_sent, arrays, chain[1]) if chain else (where, inner.name, name, place)
                earlier = traffic.get(key, (math.inf, False))
                traffic[key] = min(earlier[0], times * sent), earlier[1] or beside
            if one.opcode not in NOTHING and not one.opcode.endswith(("-start", "-done")):
                plain, full = sizes_of(one.shape)
                written, padded = written + times * plain, padded + times * full
                moved += times * plain if kind == "moves" else 0
    padding = 1 - written / padded if padded else 0.0
    exposed = sum(sent for sent, beside in traffic.values() if not beside)
    hidden = sum(sent for sent, beside in traffic.values() if beside)
    return Reading(cycles, recomputed, kernels, fusions, written, padding, moved, exposed, hidden)


def scheduled(program: Program) -> Iterator[tuple[str, int]]:
    """(computation, how often it runs) of those whose instructions run one after the other.

    What is fused, reduced with or called by a kernel is part of the instruction that names it.
    """
    seen, due = set(), [program.entry]
    while due:
        name = due.pop()
        if name in seen or name not in program.bodies:
            continue
        seen.add(name)
        yield name, program.runs[name]
        for one in program.bodies[name]:
            if one.opcode in ("while", "conditional", "call"):
                due += one.called


def cycles_of(one: Instruction) -> int:
    """The compiler's estimate; 0 where it has none."""
    found = _CYCLES.search(one.rest)
    return int(found[1]) if found else 0


def kind_of(one: Instruction, program: Program) -> str:
    """ "products", "moves" or "elementwise"."""
    inside = {one.opcode}
    if one.opcode == "fusion":
        inside = opcodes_in(one, program)
    if inside & PRODUCTS:
        return "products"
    return "moves" if inside & MOVES and inside <= MOVES | NOTHING | {"fusion"} else "elementwise"


def opcodes_in(one: Instruction, program: Program) -> set[str]:
    """Of all that an instruction calls, and what that calls."""
    found = set()
    for name in one.called:
        for inner in program.bodies.get(name, ()):
            found |= {inner.opcode} | opcodes_in(inner, program)
    return found


def sizes_of(shape: str) -> tuple[float, float]:
    """(bytes, bytes with the tiles' padding) of the arrays in a shape's text that have a tile."""
    plain = padded = 0.0
    for dtype, sizes, order, tile in _LAID.findall(shape):
        lengths = [int(size) for size in sizes.split(",")]
        across = [lengths[int(axis)] for axis in order.split(",")]  # the fastest first
        width = bits_of(dtype) / 8
        plain += width * math.prod(lengths)
        tiles = [int(size) for size in tile.split(",")][::-1]
        for place, size in enumerate(tiles[: len(across)]):
            across[place] = -(-across[place] // size) * size
        padded += width * math.prod(across)
    return plain, padded


def _collectives(one: Instruction, where: str, program: Program):
    """(computation, collective) of an instruction, or of the fusion that it is."""
    if traffic_of(one, where, 1) is not None:
        yield where, one
    elif one.opcode == "fusion":
        for name in one.called:
            for inner in program.bodies.get(name, ()):
                if traffic_of(inner, name, 1) is not None:
                    yield name, inner


def _work_until_done(body: list[Instruction], place: int) -> int:
    """Estimated cycles between a start and its end; 0 for what has none."""
    start, total = body[place], 0
    if not start.opcode.endswith("-start"):
        return 0
    for one in body[place + 1 :]:
        if one.opcode.endswith("-done") and start.name in one.operands:
            return total
        total += cycles_of(one) + (one.opcode == "while")  # a loop is work
    return total


def main(arguments: list[str]) -> None:
    """Print the `Reading` of every stage that ``plan`` would compile with these arguments."""
    _, config, *_ = cli.parse(["gae_jax", "plan", *arguments])
    target = target_of(config.plan.topology, config.mesh)
    config, _ = plan.config_for(config, target)
    for name in plan.names_of(config):
        size = config.plan.batch_size or batch_size_of(config, name)
        compiled = ahead.compile_step(make_workload(config, name, size), target.mesh).compiled
        reading = dataclasses.asdict(read(compiled.as_text(), target.mesh.size))
        print(json.dumps({"work": name, "batch_size": size, "schedule": reading}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
