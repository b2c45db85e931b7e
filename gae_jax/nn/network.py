"""Networks as a static graph and nested dicts of arrays."""

import hashlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx

Params = dict[str, Any]  # nested dicts with arrays as leaves
Arrays = tuple[Params, Params]  # of a network: (parameters, rest)

M = TypeVar("M", bound=nnx.Module)
N = TypeVar("N", bound=nnx.Module)


class Keys:
    """Provides the keys of ``nnx.Rngs(key)``, one stream for all names, counted in Python.

    `nnx.Rngs` counts in an array whose sharding it inspects after every key. Under jit that raises
    an internal error, for which JAX formats everything traced so far: tracing PAE's modules took
    nine seconds instead of half a second.
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


class Network(Generic[M]):
    """A module without its arrays; ``Network`` alone, not ``Network[GAE]``, is of any module.

    Args:
      build: makes the module from ``rngs``; called abstractly here, and with real arrays in `init`.
    """

    def __init__(self, build: Callable[..., M]):
        self._build = build
        abstract = nnx.eval_shape(lambda: build(rngs=Keys(0)))
        self._graph, *states = nnx.split(abstract, nnx.Param, ...)
        params, rest = states
        self._keys = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        self.abstract = _named(params), _named(rest)

    def init(self, key: jax.Array) -> Arrays:
        """Initialize arrays: (parameters, rest)."""
        return variables_of(self._build(rngs=Keys(key)))

    def __call__(self, params: Params, rest: Params) -> M:
        """Build the module with these arrays."""
        params, rest = map(_with_keys_of, self._keys, (params, rest))
        return nnx.merge(self._graph, params, rest)

    def changed(self, change: Callable[[M], N]) -> "Network[N]":
        """Return the network whose modules are ``change`` of this one's."""
        return Network(lambda rngs: change(self._build(rngs=rngs)))

    @property
    def size(self) -> int:
        """Number of parameters and fixed table entries."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract))


def variables_of(module: nnx.Module) -> Arrays:
    """Return (parameters, rest) of a module as nested dicts of arrays."""
    _, *states = nnx.split(module, nnx.Param, ...)
    params, rest = map(_named, states)
    return params, rest


def _named(state: nnx.State) -> Params:
    """Return nested dicts with string keys, as checkpoints have them (NNX lists use integers)."""

    def name(tree):
        return {str(k): name(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return name(nnx.to_pure_dict(state))


def _with_keys_of(template, tree):
    """Give a tree the keys of the template.

    With string keys NNX would order the items of a list "0", "1", "10", "2", ... and so swap the
    weights of ten or more blocks.
    """
    if not isinstance(template, dict):
        return tree
    if tree.keys() != {str(key) for key in template}:
        raise ValueError(
            f"arrays {sorted(tree)} do not fit a module with {sorted(template, key=str)}"
        )
    return {key: _with_keys_of(value, tree[str(key)]) for key, value in template.items()}


def fingerprint(tree) -> str:
    """Hash the names, shapes and exact values of all leaves: 16 hex digits that identify weights.

    Leaves on devices of several processes must be fetched first (`mesh.to_host`).
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


Loaded = tuple[Network, Arrays]
