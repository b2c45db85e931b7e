"""Networks as a static graph and plain arrays."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

Params = dict[str, Any]


class Keys:
    """Gives modules the keys of ``nnx.Rngs(key)``, one stream for all names; counts in Python.

    `nnx.Rngs` counts in an array, and asks it after every key how it is sharded. Under jit that
    raises an error inside, and JAX writes a message from all that was traced so far: PAE's modules
    took nine seconds to trace, and now take half of one.
    """

    def __init__(self, key: jax.Array | int):  # or a seed
        self._key = jax.random.key(key) if isinstance(key, int) else key
        self._count = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key

    def __getattr__(self, name: str) -> "Keys":
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class Network:
    """A module without its arrays.

    Args:
      build: makes the module from ``rngs``; runs abstractly here, and for real in `init`.
    """

    def __init__(self, build: Callable[..., nnx.Module]):
        self._build = build
        abstract = nnx.eval_shape(lambda: build(rngs=Keys(0)))
        self._graph, params, rest = nnx.split(abstract, nnx.Param, ...)
        self._keys = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        self.abstract = _named(params), _named(rest)

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Fresh arrays: (parameters, rest)."""
        return variables_of(self._build(rngs=Keys(key)))

    def __call__(self, params: Params, rest: Params) -> nnx.Module:
        """The module with these arrays."""
        params, rest = map(_with_keys_of, self._keys, (params, rest))
        return nnx.merge(self._graph, params, rest)

    def changed(self, change: Callable[[nnx.Module], nnx.Module]) -> "Network":
        """The network of the modules that ``change`` makes of this one's."""
        return Network(lambda rngs: change(self._build(rngs=rngs)))

    @property
    def size(self) -> int:
        """Number of parameters and fixed table entries."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract))


def variables_of(module: nnx.Module) -> tuple[Params, Params]:
    """(parameters, rest) of a module as nested dicts of arrays."""
    _, params, rest = nnx.split(module, nnx.Param, ...)
    return _named(params), _named(rest)


def _named(state: nnx.State) -> Params:
    """Nested dicts keyed by strings, as a checkpoint gives them back (NNX lists have integers)."""

    def name(tree):
        return {str(k): name(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return name(nnx.to_pure_dict(state))


def _with_keys_of(template, tree):
    """The tree with the keys of the template.

    Given strings, NNX would take the items of a list as "0", "1", "10", "2", ... in that order,
    and so give ten or more blocks each other's weights.
    """
    if not isinstance(template, dict):
        return tree
    if tree.keys() != {str(key) for key in template}:
        raise ValueError(
            f"arrays {sorted(tree)} do not fit a module with {sorted(template, key=str)}"
        )
    return {key: _with_keys_of(value, tree[str(key)]) for key, value in template.items()}


def fingerprint(tree) -> str:
    """A hash of the names, shapes and exact values of all leaves: which weights these are.

    Leaves that lie on devices of several processes have to be fetched before (`to_host`).
    """
    hasher = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ):
        array = np.ascontiguousarray(jax.device_get(leaf))
        hasher.update(f"{path} {array.dtype} {array.shape}".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()[:16]


# What a section ``compute`` says of a network, not of its step.
COMPUTED = ("dtype", "remat", "attention", "kernels")
Loaded = tuple[Network, tuple[dict, dict]]


def frozen_compute(dtype: str, attention: str = "auto") -> dict[str, str]:
    """``compute`` of a network that is only called: the fastest way in this dtype."""
    return dict(dtype=dtype, attention=attention, kernels="auto")
