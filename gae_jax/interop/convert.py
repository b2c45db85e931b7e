"""Import and export by the tables: strict in both directions, on numpy arrays.

A transform is a pair of inverse functions (to ours, to torch) of an array and the sizes of the
network. Where several rows name one array of ours, each tensor is a part of its last axis, in the
order of the rows. A derived buffer has no array on our side: it is computed at export, and at
import compared with that, up to the rounding of files in half precision, or, if nothing depends on
its value, only required to exist; where the sizes say that the network has none, its value is None.
Tensors that match the torch name of a row "unused" (a pattern of `fnmatch`) are ignored at import,
and export writes none.
"""

import math
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from gae_jax.nn.layers import rope_table
from gae_jax.nn.network import Arrays, Network, Params
from gae_jax.nn.torch_names import Table
from gae_jax.objectives.dino_discriminator import IMAGENET_SCALE, IMAGENET_SHIFT
from gae_jax.runtime.errors import UserError, number_of


class ConversionError(UserError):
    """Tensors that do not fit the network."""


def import_torch(
    table: Table,
    tensors: dict[str, np.ndarray],
    network: Network,
    *,
    may_lack: tuple[str, ...] = (),
    remark: Callable[[str], None] = lambda line: None,
    **sizes,
) -> Arrays:
    """Convert tensors to (params, rest) of the network: numpy arrays in its dtypes.

    Args:
      table: of the network's architecture.
      tensors: torch state dict, in torch's layouts.
      network: whose arrays and shapes are expected.
      may_lack: patterns of derived buffers that may be missing.
      remark: called with a line for everything that was ignored, or computed instead of read.
      sizes: arguments that the network was built with; the DiT needs ``num_heads``, DiT-DH
        ``input_size`` too, and both ``use_rope`` if that is off.

    Raises:
      ConversionError: naming every tensor that is missing, unexpected or misshapen, every derived
        buffer with other values than the network computes, and every tensor with NaN or infinity
        or of integers instead of weights.
    """
    stored, derived, problems = _layout(table, network.abstract, sizes)
    expected = {name: entry[-1] for name, entry in stored.items()}
    expected |= {name: value.shape for name, (value, _) in derived.items()}
    for pattern in (row.torch for row in table.rows if row.transform == "unused"):
        unused = {x for x in tensors if x not in expected and fnmatchcase(x, pattern)}
        if unused:
            remark(f"left out: {pattern} ({number_of(len(unused), 'tensor')})")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    for name in [x for x in derived if x not in tensors and _any_match(x, may_lack)]:
        remark(f"{name} is not in the file; it is computed")
        del expected[name]
    problems += _mismatches(expected, tensors)
    for name, (value, tolerance) in derived.items():
        if name in tensors and tensors[name].shape == value.shape and tolerance is not None:
            error, rounding = _off(tensors[name], value)
            if not np.all(error <= tolerance + rounding):
                problems.append(f"wrong values: {name} is off by up to {np.max(error):.3g}")
            elif np.max(error) > tolerance:
                remark(
                    f"{name} is rounded in the file, by up to {np.max(error):.3g}; it is computed"
                )
    _raise_if(
        problems,
        f"the tensors do not fit {table.module.__name__}; build the network with the sizes of "
        "the checkpoint, and pass the state dict of this one network"
        + (
            "; tensors of other networks are ignored with "
            "--config.import_torch.leave_out='(\"NAME*\",)'"
            if any(line.startswith("unexpected") for line in problems)
            else ""
        ),
    )
    _check_numbers({name: tensors[name] for name in stored})
    parts: dict[str, list[np.ndarray]] = {}
    for name, (path, to_ours, _, _) in stored.items():
        parts.setdefault(path, []).append(to_ours(tensors[name], sizes))

    def array(key, leaf):
        first, *rest = parts[_path(key)]
        joined = np.concatenate([first, *rest], axis=-1) if rest else first
        return np.array(joined, leaf.dtype, order="C")

    return jax.tree_util.tree_map_with_path(array, network.abstract)


def computed_names(table: Table, network: Network, **sizes) -> frozenset[str]:
    """Return the tensors that a network computes and never takes from a file."""
    return frozenset(_layout(table, network.abstract, sizes)[1])


def _any_match(name: str, patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _off(tensor: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (how far a buffer of a file is from its value, how far rounding may bring it).

    The rounding is that of its dtype, and at least bfloat16's: files in half precision are often
    widened again.
    """
    kind = tensor.dtype if tensor.dtype.itemsize < 2 else ml_dtypes.bfloat16
    error = np.abs(tensor.astype(np.float32) - value)
    if tensor.dtype.kind in "biu":
        return error, np.zeros_like(error)
    limits = ml_dtypes.finfo(kind)  # near 0 numbers of 8 bits are no closer than the smallest
    return error, float(limits.eps) * np.abs(value) + float(limits.smallest_subnormal)


def _check_numbers(tensors: dict[str, np.ndarray]) -> None:
    """Raise ConversionError for weights that are not finite numbers."""
    problems = []
    for name, tensor in tensors.items():
        if tensor.dtype.kind in "biuc":
            problems.append(f"{name} is of {tensor.dtype.name}, no real numbers")
        elif not (finite := np.isfinite(tensor)).all():
            nans = int(np.isnan(tensor).sum())
            infinite = int(finite.size - finite.sum()) - nans
            counts = ((nans, "NaN"), (infinite, "infinite"))
            said = " and ".join(f"{count} {what}" for count, what in counts if count)
            problems.append(f"{name} has {said} of {tensor.size} numbers")
    _raise_if(
        problems,
        "the weights are not usable: take a checkpoint from before the training diverged, one that "
        "is not quantised, or for infinities one that was not narrowed to fp16",
    )


def export_torch(table: Table, params: Params, rest: Params, **sizes) -> dict[str, np.ndarray]:
    """Return the torch state dict of a network, derived buffers included.

    Args:
      table: of the network's architecture.
      params, rest: of the network.
      sizes: arguments that the network was built with, all that differ from the defaults.

    Raises:
      ConversionError: naming every array that a network of these sizes misses, does not have,
        or has with another shape.
    """
    network = Network(partial(table.module, **sizes))
    stored, derived, problems = _layout(table, network.abstract, sizes)
    expected = {path: leaf.shape for path, leaf in _leaves(network.abstract).items()}
    arrays = _leaves((params, rest))
    problems += _mismatches(expected, arrays)
    _raise_if(
        problems,
        f"the arrays are not those of {table.module.__name__} with these sizes; pass all "
        "arguments that the network was built with, and its arrays only",
    )
    tensors = {
        name: np.array(to_torch(np.asarray(arrays[path]), sizes), order="C")
        for name, (path, _, to_torch, _) in stored.items()
    }
    return tensors | {name: value for name, (value, _) in derived.items()}


class Mapped(NamedTuple):
    """The tensors that one row of a table maps: all blocks together."""

    torch: str
    ours: str
    transform: str
    shapes: tuple[tuple[int, ...], ...]


def mapping(table: Table, network: Network, **sizes) -> list[Mapped]:
    """Return what a torch state dict of the network holds; arguments as `import_torch`."""
    stored, derived, _ = _layout(table, network.abstract, sizes)
    shapes = {name: entry[-1] for name, entry in stored.items()}
    shapes |= {name: value.shape for name, (value, _) in derived.items()}
    mapped = []
    for row in table.rows:
        pattern = re.compile(re.escape(row.torch).replace(r"\{n\}", r"\d+"))
        names = [name for name in shapes if pattern.fullmatch(name)]
        if names and row.ours:
            mapped.append(Mapped(*row, tuple(shapes[name] for name in names)))
    return mapped


def _layout(table: Table, abstract, sizes):
    """Return what a torch state dict of the network holds.

    Returns:
      {torch name: (our path, to ours, to torch, torch shape)}, {torch name of a derived buffer:
      (value, tolerance)}, and a line for each array that the table has no row for.
    """
    leaves = _leaves(abstract)
    stored, derived, covered = {}, {}, set()
    for row in table.rows:
        pattern = re.compile(re.escape(row.ours).replace(r"\{n\}", r"(?P<n>\d+)"))
        for path, match in ((path, pattern.fullmatch(path)) for path in leaves):
            if not match:
                continue
            name = row.torch.format(**match.groupdict())
            if row.transform in DERIVED:
                make, tolerance = DERIVED[row.transform]
                if (value := make(leaves[path].shape, sizes)) is not None:
                    derived[name] = value, tolerance
            else:
                to_ours, to_torch = TRANSFORMS[row.transform]
                shape = jax.eval_shape(partial(to_torch, sizes=sizes), leaves[path]).shape
                stored[name] = path, to_ours, to_torch, shape
                covered.add(path)
    return stored, derived, [f"not in the table: {path}" for path in leaves if path not in covered]


def _mismatches(expected: dict[str, tuple], given: dict) -> list[str]:
    """Return a line for each array that is missing, unexpected or misshapen."""
    shapes = {name: np.shape(array) for name, array in given.items()}
    both = [name for name in expected if name in shapes]
    return [
        *(f"missing: {name} {list(expected[name])}" for name in expected if name not in shapes),
        *(f"unexpected: {name} {list(shapes[name])}" for name in shapes if name not in expected),
        *(
            f"misshapen: {name} is {list(shapes[name])}, must be {list(expected[name])}"
            for name in both
            if shapes[name] != expected[name]
        ),
    ]


def _raise_if(problems: list[str], summary: str) -> None:
    if problems:
        raise ConversionError("\n  ".join([f"{summary}:", *problems]))


def _path(key) -> str:
    """Return the dotted path of a leaf of (params, rest)."""
    return jax.tree_util.keystr(key[1:], simple=True, separator=".")


def _leaves(trees) -> dict:
    return {_path(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]}


def _halves(head_dim: int) -> np.ndarray:
    """Return the order of channels that makes released RoPE ours.

    Released RoPE rotates channels (2j, 2j + 1) by angle j, ours (j, j + head_dim / 2).
    """
    return np.arange(head_dim).reshape(-1, 2).T.ravel()


def _pairs(head_dim: int) -> np.ndarray:
    """Invert `_halves`."""
    return np.arange(head_dim).reshape(2, -1).T.ravel()


def _reorder(x, sizes, order):
    """Reorder the rows of q and of k per head in [3 * width, ...]; those of v stay."""
    rows = np.arange(x.shape[0]).reshape(3, sizes["num_heads"], -1)
    q_and_k = rows[:2, :, order(rows.shape[-1])]
    return x[np.concatenate([q_and_k, rows[2:]]).ravel()]


def _rope_buffer(part: int, shape: tuple, sizes) -> np.ndarray | None:
    """Compute [tokens, head_dim] as released, from the position table's [1, tokens, width]."""
    if not sizes.get("use_rope", True):
        return None
    _, tokens, width = shape
    table = rope_table(math.isqrt(tokens), width // sizes["num_heads"])[part]
    return np.repeat(table, 2, axis=-1)


def _of_part(part: int, pair: tuple[Callable, Callable]) -> tuple[Callable, Callable]:
    """Return a pair of transforms for the backbone (0) or the head (1) of DiT-DH."""

    def call(transform, x, sizes):
        return transform(x, sizes | {"num_heads": sizes["num_heads"][part]})

    to_ours, to_torch = (partial(call, transform) for transform in pair)
    return to_ours, to_torch


def _rope_buffer_of_part(part: int, table: int, shape: tuple, sizes) -> np.ndarray | None:
    """Compute `_rope_buffer` of a part of DiT-DH, from its embedder's shape [p, p, C, width]."""
    grid = sizes["input_size"] // shape[0]
    heads = {"num_heads": sizes["num_heads"][part]}
    return _rope_buffer(table, (1, grid**2, shape[-1]), sizes | heads)


def _part_of(index: int, parts: int) -> tuple[tuple[Callable, Callable], tuple[Callable, Callable]]:
    """Return (transform of a weight, of a bias) of one of several layers that only ours fuses."""

    def part(x):
        width = x.shape[-1] // parts
        return x[..., index * width : (index + 1) * width]

    return (
        (lambda x, sizes: x.T, lambda x, sizes: part(x).T),
        (lambda x, sizes: x, lambda x, sizes: part(x)),
    )


# Name of a transform -> (torch's array to ours, ours to torch's), functions of (array, sizes).
TRANSFORMS: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda x, sizes: x, lambda x, sizes: x),
    "batched": (lambda x, sizes: x[None], lambda x, sizes: x[0]),  # torch has no leading axis of 1
    "linear": (lambda x, sizes: x.T, lambda x, sizes: x.T),
    "conv": (
        lambda x, sizes: x.transpose(2, 3, 1, 0),
        lambda x, sizes: x.transpose(3, 2, 0, 1),
    ),
    "conv_1d": (
        lambda x, sizes: x.transpose(2, 1, 0),
        lambda x, sizes: x.transpose(2, 1, 0),
    ),
    "rope_linear": (
        lambda x, sizes: _reorder(x, sizes, _halves).T,
        lambda x, sizes: _reorder(x.T, sizes, _pairs),
    ),
    "rope_bias": (
        lambda x, sizes: _reorder(x, sizes, _halves),
        lambda x, sizes: _reorder(x, sizes, _pairs),
    ),
    "rope_norm": (
        lambda x, sizes: x[_halves(x.shape[0])],
        lambda x, sizes: x[_pairs(x.shape[0])],
    ),
}
for _names in (("q", "k", "v"), ("gate", "up")):
    for _index, _name in enumerate(_names):
        _pair = _part_of(_index, len(_names))
        TRANSFORMS[f"linear_{_name}"], TRANSFORMS[f"same_{_name}"] = _pair
for _index in (0, 1):
    for _name in ("rope_linear", "rope_bias"):
        TRANSFORMS[f"{_name}_{_index}"] = _of_part(_index, TRANSFORMS[_name])

# (value from the shape of the array at the path and the sizes, tolerance at import: None for
# buffers whose value nothing depends on; the released tables are computed in fp32)
DERIVED: dict[str, tuple[Callable, float | None]] = {
    "rope_cos": (partial(_rope_buffer, 0), 1e-4),
    "rope_sin": (partial(_rope_buffer, 1), 1e-4),
    **{
        f"rope_{_name}_{_index}": (partial(_rope_buffer_of_part, _index, _table), 1e-4)
        for _table, _name in enumerate(("cos", "sin"))
        for _index in (0, 1)
    },
    # images in [-1, 1] -> normalised by ImageNet's mean and std, [1, 3, 1, 1]
    "imagenet_scale": (lambda shape, sizes: IMAGENET_SCALE.reshape(1, 3, 1, 1), 1e-6),
    "imagenet_shift": (lambda shape, sizes: IMAGENET_SHIFT.reshape(1, 3, 1, 1), 1e-6),
    "batch_count": (lambda shape, sizes: np.zeros((), np.int64), None),
}
