"""Reading a checkpoint into a state with another structure, after the config was amended.

Clipping and learning-rate factors change how the optimizer's state is nested; an EMA, or a network
of a loss term, may be new.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gae_jax.train.checkpoint import readable, stored_tree
from gae_jax.train.state import TrainState

Key = tuple[str, ...]


def _name(part: Any) -> str:
    return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))


def _keys(tree) -> dict[Key, Any]:
    """Return the leaves by name; names in an optimizer leave out the numbers of its parts."""
    leaves: dict[Key, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [_name(part) for part in path]
        if names[0] == "opt":
            inner = names[2:]
            while inner and inner[0].isdigit():
                inner = inner[1:]
            names = [*names[:2], *inner]
            # Adam and the schedule both have a "count"
            names.append(str(sum(key[: len(names)] == tuple(names) for key in leaves)))
        leaves[tuple(names)] = leaf
    return leaves


def _source(key: Key, stored: dict[Key, Any], networks: set[str]) -> Key | None:
    """Return the stored leaf that a leaf of the new state comes from; None: it is new."""
    if key in stored:
        return key
    if key[0] == "ema" and key[1] in networks:  # an EMA starts from the parameters
        return ("params", *key[1:])
    return None


def differs(abstract: TrainState, path: Path) -> bool:
    """Return whether a checkpoint's item ``state`` has leaves of other names than a state."""

    def names(tree) -> set[Key]:
        paths = (path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
        return {tuple(map(_name, path)) for path in paths}

    return names(abstract) != names(stored_tree(path))


def misfits(abstract: TrainState, path: Path) -> list[str]:
    """List what keeps a checkpoint from being read into a state; empty if nothing does.

    Args:
      abstract: shapes of the state.
      path: the item ``state`` of the checkpoint.
    """
    tree = stored_tree(path)
    stored, networks = _keys(tree), set(tree.get("params", {}))
    problems = []
    for key, leaf in _keys(abstract).items():
        name, source = "/".join(key), _source(key, stored, networks)
        if source is None:
            if key[0] == "step" or key[1] in networks or key[1] == "snapshot":
                problems.append(f"{name}: the checkpoint has none")
        elif source not in stored or tuple(stored[source].shape) != tuple(leaf.shape):
            stored_shape = list(stored[source].shape) if source in stored else "none"
            problems.append(f"{name}: {stored_shape} in the checkpoint, {list(leaf.shape)} here")
    return problems


def restore(abstract: TrainState, path: Path, begin: Callable[[], TrainState]) -> TrainState:
    """Read a checkpoint that has no `misfits` into a state.

    Args:
      abstract: shapes, dtypes and shardings of the state.
      path: the item ``state`` of the checkpoint.
      begin: makes a freshly initialized state, whose leaves are taken where the checkpoint has
        none. It must not read other stages, which may be gone.
    """
    tree = stored_tree(path)
    stored, networks = _keys(tree), set(tree.get("params", {}))
    wanted = _keys(abstract)
    sources = {key: _source(key, stored, networks) for key in wanted}
    targets = {source: wanted[key] for key, source in sources.items() if source is not None}
    targets |= {key: wanted[key] for key in wanted if sources[key] == key}

    def arguments(key: Key):
        if key not in targets:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        leaf = targets[key]
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )

    structure = jax.tree_util.tree_structure(tree)
    options = jax.tree_util.tree_unflatten(structure, [arguments(key) for key in stored])
    with readable(path.parent), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = _keys(reader.restore(path.absolute(), ocp.args.PyTreeRestore(tree, options)))
    anew = _keys(begin()) if None in sources.values() else {}
    taken: set[Key] = set()

    def leaf_of(key: Key) -> jax.Array:
        source = sources[key]
        if source is None:
            return anew[key]
        if source in taken:  # the step donates every leaf, so two cannot share memory
            return jax.device_put(jnp.copy(restored[source]), wanted[key].sharding)
        taken.add(source)
        return restored[source]

    ordered = [leaf_of(key) for key in wanted]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), ordered)
