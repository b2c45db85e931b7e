"""How tensors of released torch modules correspond to our arrays: rows of name tables.

A row is (torch name, our path, transform), where ``{n}`` stands for the number of a block or
layer and the transform is one of `gae_jax.interop.convert`. A row applies to a network that has
an array at the path, so rows of options that are off (q and k norms) are skipped. Rows with a
derived transform say which torch buffer follows from the shape of the array at the path and the
sizes of the network, if these ask for one. Rows with the transform "unused" have a pattern
(`fnmatch`) for torch's name and no path: a file may hold such tensors, and they are ignored.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx

Shapes = Mapping[str, tuple[int, ...]]  # of a file's tensors, by name


class Row(NamedTuple):
    """A tensor of torch, or one in every block, and the path of our array."""

    torch: str
    ours: str
    transform: str


class Table(NamedTuple):
    """The rows of a module of ours."""

    module: type[nnx.Module]
    rows: tuple[Row, ...]


def same(*names: str) -> tuple[Row, ...]:
    """Return rows of arrays with one name and layout on both sides."""
    return tuple(Row(name, name, "same") for name in names)


def linear(*names: str) -> tuple[Row, ...]:
    """Return rows of Linear layers without bias that have one name on both sides."""
    return tuple(Row(f"{name}.weight", f"{name}.kernel", "linear") for name in names)


def biased(torch: str, ours: str | None = None, transform: str = "linear") -> tuple[Row, ...]:
    """Return rows of weight and bias of a Linear layer or, with "conv", of a convolution."""
    ours = ours or torch
    return (
        Row(f"{torch}.weight", f"{ours}.kernel", transform),
        Row(f"{torch}.bias", f"{ours}.bias", "same"),
    )


def norm(torch: str, ours: str | None = None, weight: str = "weight") -> tuple[Row, ...]:
    """Return rows of weight and bias of a norm; ``weight``: our name of the former."""
    ours = ours or torch
    return (
        Row(f"{torch}.weight", f"{ours}.{weight}", "same"),
        Row(f"{torch}.bias", f"{ours}.bias", "same"),
    )


def unused(*patterns: str) -> tuple[Row, ...]:
    """Return rows of tensors that a file may hold and that are ignored."""
    return tuple(Row(pattern, "", "unused") for pattern in patterns)


class Heads(NamedTuple):
    """Where a config section holds the number of attention heads of one part of a network.

    Attributes:
      field: the field with the number of heads.
      width: the field with the width of that part; "": the section has none.
      published: width -> heads of the published networks.
    """

    field: str
    width: str
    published: Mapping[int, int]


def published(presets: Mapping[str, Mapping], width: str, heads: str) -> dict[int, int]:
    """Return {width: heads} of published networks, from their sizes by name."""
    return {sizes[width]: sizes[heads] for sizes in presets.values()}


def depth_of(shapes: Shapes, prefix: str) -> int:
    """Count the blocks whose tensors are named ``PREFIX.N.*``."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, shapes) if m), default=-1)


def edge_of(tokens: int) -> int:
    """Return the edge of a square grid of tokens."""
    return math.isqrt(tokens)
