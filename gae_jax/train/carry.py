"""Taking weights over from another network: every array is taken, or a reason is given.

Arrays are named by their path in a network, such as ``decoder/blocks/0/attn/qkv/kernel``, trainable
or not.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.nn.network import Arrays, Params
from gae_jax.nn.positions import resize_positions
from gae_jax.runtime.errors import number_of
from gae_jax.runtime.mesh import put_whole
from gae_jax.runtime.sharding import path_of
from gae_jax.train.state import TrainState

Shapes = Mapping[str, tuple[int, ...]]
POSITIONS = ("pos_embed", "decoder_pos_embed")  # tables, [1, tokens, C]
LABELS = "y_embedder/embedding_table/embedding"  # [classes, and one row for "no class", C]
STATISTICS = ("latent_mean", "latent_std")  # of the latents that a diffusion model is trained on


@dataclasses.dataclass(frozen=True)
class Classes:
    """Rows of a label table; with ``null``, one more row stands for "no class"."""

    count: int
    null: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens to every array of the new network and of the source.

    Attributes:
      taken: paths that are taken unchanged.
      resized: path of a learned position table -> (shape in the source, new shape).
      labels: path of a label table that is partly new -> (classes in the source, new classes).
      new: path -> why the array does not come from the source.
      left: path in the source -> why it is not taken.
      problems: a line for each array that does not fit; if there are any, nothing may be taken.
    """

    taken: tuple[str, ...]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    labels: dict[str, tuple[Classes, Classes]]
    new: dict[str, str]
    left: dict[str, str]
    problems: tuple[str, ...]


def flat(arrays: Arrays) -> dict[str, Any]:
    """Flatten (parameters, rest) of a network into one dict by path."""
    arrays_by_path = {}

    def walk(tree: Params, prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}/")
            else:
                arrays_by_path[prefix + name] = value

    for tree in arrays:
        walk(tree, "")
    return arrays_by_path


def make_plan(
    here: Shapes,
    source: Shapes,
    *,
    computed: Callable[[str], bool],
    classes: tuple[Classes, Classes] | None = None,
) -> Plan:
    """Decide by names and shapes what a network takes from another one.

    Args:
      here: shapes of the new network.
      source: shapes of the source.
      computed: path in the new network -> whether the array is computed from the network's sizes.
      classes: of the source and of the new network, if they have label tables.
    """
    taken, resized, labels, new, problems = [], {}, {}, {}, []
    for path, shape in here.items():
        name = path.rpartition("/")[2]
        if path in STATISTICS:
            new[path] = "those of this run's latents"
        elif path not in source:
            if "lora" in path.split("/"):
                new[path] = "the source has no LoRA there"
            else:
                problems.append(f"{path}: {list(shape)} here, absent in the source")
        elif path.endswith(LABELS) and classes and classes[0] != classes[1]:
            if source[path][1:] != shape[1:]:
                problems.append(f"{path}: {list(shape)} here, {list(source[path])} in the source")
            else:
                labels[path] = classes
        elif source[path] == shape:
            taken.append(path)
        elif name in POSITIONS and computed(path) and source[path][2:] == shape[2:]:
            new[path] = f"computed for {shape[1]} positions, {source[path][1]} in the source"
        elif name in POSITIONS and _resizable(source[path], shape):
            resized[path] = (source[path], shape)
        else:
            problems.append(f"{path}: {list(shape)} here, {list(source[path])} in the source")
    left = {path: "the new network has none" for path in source if path not in here}
    problems += [f"{path}: absent here, {list(source[path])} in the source" for path in left]
    left |= {path: "this run's own are used" for path in source if path in STATISTICS}
    return Plan(tuple(taken), resized, labels, new, left, tuple(problems))


def _leading(tokens: int) -> int | None:
    """Return the positions before a square grid: 0, or 1 for CLS; None if neither fits."""
    return next(
        (n for n in (0, 1) if tokens > n and math.isqrt(tokens - n) ** 2 == tokens - n), None
    )


def _resizable(source: tuple[int, ...], here: tuple[int, ...]) -> bool:
    leading = [_leading(shape[1]) if len(shape) == 3 else None for shape in (source, here)]
    return leading[0] == leading[1] is not None and source[2] == here[2]


def carried(plan: Plan, source: Mapping[str, np.ndarray], fresh: Callable[[str], np.ndarray]):
    """Return path -> array of the new network, for all arrays that come from the source.

    Args:
      source: the source's arrays.
      fresh: path -> the array that the new network was initialized with.
    """
    arrays = {path: source[path] for path in plan.taken}
    for path, (_, shape) in plan.resized.items():
        arrays[path] = resized(source[path], shape[1])
    for path, classes in plan.labels.items():
        arrays[path] = _labels(source[path], fresh(path), *classes)
    return arrays


def resized(table: np.ndarray, tokens: int) -> np.ndarray:
    """Resize a position table [1, G*G, C], or with CLS [1, 1 + G*G, C], to another token count.

    Bicubic as PyTorch's `interpolate` (a = -0.75, align_corners=False, no antialias), fp32.
    """
    leading = _leading(table.shape[1])
    if leading is None:
        raise ValueError(f"{table.shape[1]} positions are no square grid, with or without CLS")
    side = math.isqrt(tokens - leading)
    wide = jnp.asarray(table, jnp.float32)
    return np.asarray(resize_positions(wide, (side, side), leading=leading, antialias=False))


def _labels(table: np.ndarray, fresh: np.ndarray, source: Classes, here: Classes) -> np.ndarray:
    """Fill a label table: rows of classes if the counts agree, "no class" if both have it."""
    filled = np.array(fresh)
    if source.count == here.count:
        filled[: here.count] = table[: source.count]
    if source.null and here.null:
        filled[-1] = table[-1]
    return filled


def labels_line(source: Classes, here: Classes) -> str:
    """Describe what `carried` does with a label table."""
    if source.count == here.count:
        rows = f"the rows of the {number_of(here.count, 'class', 'classes')} are taken"
    else:
        rows = f"new, {number_of(here.count, 'class', 'classes')}, {source.count} in the source"
    if source.null and here.null:
        return f"{rows}; the row of no class is taken"
    if here.null:
        return f"{rows}; the row of no class is new, the source has none"
    return f"{rows}; the source's row of no class is left" if source.null else rows


def with_arrays(state: TrainState, network: str, arrays: Mapping[str, np.ndarray]) -> TrainState:
    """Put arrays, given by path, into a network of the state; its EMA starts from them.

    So does a tokenizer's snapshot of itself.
    """

    def put(tree: Params, prefix: str = "") -> Params:
        filled = dict(tree)
        for key, leaf in tree.items():
            if isinstance(leaf, dict):
                filled[key] = put(leaf, f"{prefix}{key}/")
            elif prefix + key in arrays:
                filled[key] = _like(leaf, arrays[prefix + key])
        return filled

    # copies: the step donates every array
    params = put(state.params[network])
    rest = {**state.rest, network: put(state.rest[network])}
    ema = state.ema
    if network in ema:
        ema = {**ema, network: jax.tree.map(jnp.copy, params)}
    if network == "tokenizer" and "snapshot" in rest:
        rest["snapshot"] = jax.tree.map(jnp.copy, params)
    return dataclasses.replace(state, params={**state.params, network: params}, rest=rest, ema=ema)


def with_moments(
    state: TrainState, network: str, moments: dict, paths: Collection[str]
) -> TrainState:
    """Put Adam's moments of a network into the state; the schedule stays at step 0.

    Args:
      moments: mu, nu and count, as `checkpoint.load_moments` returns them.
      paths: parameters whose moments are taken; the others keep zeros.
    """
    stored = {name: flat((moments[name], {})) for name in ("mu", "nu")}

    def is_adam(part) -> bool:
        return hasattr(part, "mu")

    def filled(part):
        if not is_adam(part):
            return part

        def put(name: str):
            def choose(key_path, leaf):
                path = path_of(key_path)
                return _like(leaf, stored[name][path]) if path in paths else leaf

            return jax.tree_util.tree_map_with_path(choose, getattr(part, name))

        count = _like(part.count, np.asarray(moments["count"]))
        return part._replace(mu=put("mu"), nu=put("nu"), count=count)

    opt = jax.tree.map(filled, state.opt[network], is_leaf=is_adam)
    return dataclasses.replace(state, opt={**state.opt, network: opt})


def _like(leaf: jax.Array, value: np.ndarray) -> jax.Array:
    """Return a value in the dtype of an array, sharded like it."""
    return put_whole(np.array(value, leaf.dtype), leaf.sharding)
