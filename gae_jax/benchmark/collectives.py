"""Read the collectives of a compiled program from its text.

The body of a loop counts as often as it runs, a start and its end once, and so does a collective
that the compiler spreads over several computations. Bytes are those that one device sends in a
ring: (n - 1) / n of what is gathered or scattered in a group of n, twice that for an all-reduce.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "token": 0}  # other dtypes have their bits in the name

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same axes of the mesh, in one run of the program.

    Attributes:
      kind: one of `KINDS`.
      axes: of the mesh, in its order; () if unknown.
      count: number of collectives.
      sent: bytes that one device sends.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    sent: float


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ", 1)[0])

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        called = _CALLED.findall(self.rest)
        if branches := _BRANCHES.search(self.rest):
            called += re.findall(r"%?([\w.\-]+)", branches[1])
        return called


class Program:
    """The computations of a module in the text form of XLA's HLO, after compilation."""

    def __init__(self, text: str):
        self.bodies: dict[str, list[Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()  # of unknown length; counted once
        current = ""
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = head[2]
                self.bodies[current] = []
                self.entry = current if head[1] else self.entry
            elif (match := _INSTRUCTION.match(line)) and (code := _OPCODE.search(match[3])):
                one = Instruction(
                    match[2], match[3][: code.start()], code[1], match[3][code.end() :]
                )
                self.bodies[current].append(one)
                if match[1]:
                    self._roots[current] = one

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often every reachable computation runs."""
        runs: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            runs[name] = runs.get(name, 0) + times
            for instruction in self.bodies.get(name, ()):
                loop = instruction.opcode == "while"
                inner = times * (self._iterations(name, instruction) if loop else 1)
                for called in instruction.called:
                    visit(called, inner)

        visit(self.entry, 1)
        return runs

    def _iterations(self, where: str, loop: Instruction) -> int:
        if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        names = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.rest))
        count = self._counted_iterations(where, loop, names["condition"], names["body"])
        if count is None:
            self.unknown_loops.add(loop.name)
        return count or 1

    def _counted_iterations(
        self, where: str, loop: Instruction, condition: str, body: str
    ) -> int | None:
        """Iterations of a loop that counts an element of its tuple up to a constant; else None."""
        test, after = self._roots[condition], self._roots[body]
        inside = {one.name: one for one in self.bodies[condition]}
        if test.opcode != "compare" or "direction=LT" not in test.rest or len(test.operands) != 2:
            return None
        counter, limit = (inside.get(name) for name in test.operands)
        index = counter and re.search(r"index=(\d+)", counter.rest)
        end = _constant(limit)
        if index is None or end is None or after.opcode != "tuple":
            return None
        place = int(index[1])
        steps = {one.name: one for one in self.bodies[body]}
        add = steps.get(after.operands[place])
        if add is None or add.opcode != "add":
            return None
        by = [_constant(steps.get(name)) for name in add.operands]
        step = next((value for value in by if value), None)
        around = {one.name: one for one in self.bodies[where]}
        given = around.get(loop.operands[0]) if loop.operands else None
        start = 0
        if given is not None and given.opcode == "tuple":
            start = _constant(around.get(given.operands[place])) or 0
        return step and max(math.ceil((end - start) / step), 0)

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """Sum the collectives by kind and axes; those with the most bytes come first.

        Args:
          mesh_shape: name -> size of the mesh's axes; the program numbers devices in that order.
        """
        devices = math.prod(mesh_shape.values())
        once: dict[tuple, tuple[int, float, tuple[str, ...]]] = {}
        for name, times in self.runs.items():
            for one in self.bodies.get(name, ()):
                traffic = traffic_of(one, name, devices)
                if traffic is None:
                    continue
                kind, arrays, sent, members = traffic
                axes = _axes(members, mesh_shape)
                # libtpu's pieces of one collective share a chain, whose first piece is outermost;
                # different collectives may share a channel
                chain = re.search(r'chain_id="(\d+)"', one.rest)
                channel = re.search(r"channel_id=(\d+)", one.rest)
                key = (kind, name, one.name)
                if chain:
                    key = (kind, chain[1], channel and channel[1], arrays)
                earlier = once.get(key)
                if earlier is None or times < earlier[0]:
                    once[key] = times, sent, axes
        total: dict[tuple, list] = {}
        for (kind, *_), (times, sent, axes) in once.items():
            if not sent:  # groups of one
                continue
            row = total.setdefault((kind, axes), [0, 0.0])
            row[0] += times
            row[1] += times * sent
        rows = [Collective(kind, axes, *row) for (kind, axes), row in total.items()]
        return sorted(rows, key=lambda row: -row.sent)


def traffic_of(
    one: Instruction, where: str, devices: int
) -> tuple[str, float, float, np.ndarray | None] | None:
    """(kind, bytes of its result, bytes that a device sends, groups or pairs) of a collective.

    None for any other instruction.

    Args:
      where: name of its computation.
      devices: number of devices of the mesh.
    """
    kind = one.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays = _results(one)
    groups, pairs = _groups(one.rest, devices)
    # unknown groups are taken to be of all devices
    size = groups.shape[-1] if groups is not None else devices
    # TPU compilers write a reduce-scatter as an all-reduce of which every device keeps a part
    if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
        kind, arrays = "reduce-scatter", arrays / size
    sent = _sent(kind, arrays, size, pairs, devices)
    return kind, arrays, sent, groups if pairs is None else pairs


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant":
        return None
    value = re.match(r"(-?\d+)\)", one.rest)
    return int(value[1]) if value else None


def bits_of(dtype: str) -> int:
    """Bits of one element of an XLA dtype, such as "bf16"."""
    bits = BITS.get(dtype)
    return int(re.search(r"\d+", dtype)[0]) if bits is None else bits


def _bytes(shape: str) -> float:
    """Bytes of all arrays in the text of a shape."""
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        total += bits_of(dtype) / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def _parts(shape: str) -> list[str]:
    """Split the text of a tuple into its elements; other text is one element."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _results(one: Instruction) -> float:
    """Bytes of the result; the start of all but an all-reduce lists its operands first."""
    shape = one.shape.strip()
    if one.opcode.endswith("-start") and one.opcode != "all-reduce-start":
        return _bytes(_parts(shape)[1])
    return _bytes(shape)


def _groups(rest: str, devices: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(groups [n, size], None) or (None, pairs [n, 2]) of device numbers; (None, None): unknown."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        numbers = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return None, np.array(numbers, int).reshape(-1, 2)
    if listed := re.search(r"replica_groups=\{(\{.*?\})?\}", rest):
        rows = re.findall(r"\{([\d,]+)\}", listed[1] or "")
        given = [[int(i) for i in row.split(",")] for row in rows]
        return np.array(given or [range(devices)]), None
    if iota := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _iota(iota[2]).reshape(_integers(iota[1])), None
    if named := _MESH.search(rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        numbers = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        return _along(numbers, sizes, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3])), None
    return None, None


# The axes of the compiler's mesh, the order of its devices, and the axes of the groups.
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}"
)


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """Device numbers of "[2,4]T(1,0)": counted in row-major order, then transposed."""
    shape, _, order = text.partition("T")
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return numbers.transpose(_integers(order)) if order else numbers


def _along(numbers: np.ndarray, sizes: dict[str, int], parts: list) -> np.ndarray:
    """Groups of the devices that differ along the named axes only.

    Args:
      parts: (axis, before, size): the part of an axis with that size after one of size
        ``before``; the complete axis if both are empty.
    """
    cut, last = [], []
    for name, size in sizes.items():
        pieces = [(int(pre or 1), int(own or size)) for axis, pre, own in parts if axis == name]
        done = 1
        for before, own in sorted(pieces):
            cut += [before // done, own]
            last.append(len(cut) - 1)
            done = before * own
        cut.append(size // done)
    first = [place for place in range(len(cut)) if place not in last]
    length = math.prod(cut[place] for place in last)
    return numbers.reshape(cut).transpose(first + last).reshape(-1, length)


def _sent(kind: str, result: float, size: int, pairs: np.ndarray | None, devices: int) -> float:
    """Bytes that one device sends, on average over the devices."""
    if kind == "collective-permute":
        moved = 1.0 if pairs is None else np.mean(pairs[:, 0] != pairs[:, 1]) * len(pairs) / devices
        return result * float(moved)
    share = (size - 1) / size
    if kind == "all-reduce":
        return 2 * result * share
    if kind == "reduce-scatter":
        return result * (size - 1)
    return result * share


def _axes(groups: np.ndarray | None, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The axes along which the members of a group differ."""
    if groups is None or not groups.size:
        return ()
    places: Sequence[np.ndarray] = np.unravel_index(groups, tuple(mesh_shape.values()))
    return tuple(
        name
        for name, place in zip(mesh_shape, places, strict=True)
        if np.any(place != place[:, :1])
    )


def total_sent(rows: Iterable[Collective]) -> float:
    """Bytes that one device sends in one run of the program."""
    return sum(row.sent for row in rows)
