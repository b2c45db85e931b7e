"""Starting a tokenizer from weights of the run's backbone and teacher."""

import dataclasses

import jax
import jax.numpy as jnp

from gae_jax.runtime.errors import ConfigError
from gae_jax.train.state import TrainState

OWN = ("lora",)  # parts of an encoder that no backbone has


def lend(state: TrainState, params: dict, rest: dict) -> TrainState:
    """Replace the arrays of the tokenizer's encoder by a backbone's, matched by name.

    Args:
      params, rest: of the backbone. An array may be trainable in one and frozen in the other; the
        encoder's `OWN` arrays stay as they are.

    Raises:
      ValueError: if an array is missing in the backbone or has another shape.
    """
    lent = _merged(params, rest)

    def filled(networks: dict, name: str) -> dict:
        if "encoder" not in networks.get(name, {}):
            return networks
        network = {**networks[name], "encoder": _filled(networks[name]["encoder"], lent, "encoder")}
        return {**networks, name: network}

    return dataclasses.replace(
        state,
        params=filled(state.params, "tokenizer"),
        ema=filled(state.ema, "tokenizer"),
        rest=filled(filled(state.rest, "tokenizer"), "snapshot"),
    )


def start_from(state: TrainState, teacher: dict, parts) -> TrainState:
    """Replace parts of the tokenizer's parameters by the teacher's.

    Args:
      parts: pairs (path in the tokenizer, path in the teacher), such as
        ("pae/latent_compressor", "latent_compressor").

    Raises:
      ConfigError: if there is no such part, or they do not fit.
    """

    def at(tree, path: str, whose: str):
        for name in path.split("/"):
            if not isinstance(tree, dict) or name not in tree:
                raise ConfigError(
                    f"tokenizer.from_teacher names {path!r}, which the {whose} does not have"
                )
            tree = tree[name]
        return tree

    def put(tree, names, value):
        first, *rest = names
        return {**tree, first: put(tree[first], rest, value) if rest else value}

    params = state.params["tokenizer"]
    for path, teacher_path in parts:
        part, source = at(params, path, "tokenizer"), at(teacher, teacher_path, "teacher")
        try:
            filled = _filled(part, source, path, "teacher")
        except ValueError as error:
            raise ConfigError(
                f"tokenizer.from_teacher: {teacher_path!r} does not fit {path!r}: {error}"
            ) from None
        params = put(params, path.split("/"), filled)
    ema = state.ema
    if "tokenizer" in ema:
        ema = {**ema, "tokenizer": jax.tree.map(jnp.copy, params)}
    return dataclasses.replace(state, params={**state.params, "tokenizer": params}, ema=ema)


def _merged(a: dict, b: dict) -> dict:
    """Merge two nested dicts that share no leaf."""
    both = {k: _merged(a[k], b[k]) for k in a.keys() & b.keys()}
    return {**a, **b, **both}


def _filled(template, source, path: str, whose: str = "backbone"):
    """Copy the leaves of ``source`` that ``template`` has, sharded like the template's."""
    if isinstance(template, dict):
        known = (*source, *OWN) if isinstance(source, dict) else ()
        missing = template.keys() - set(known)
        if missing:
            raise ValueError(
                f"the {whose} has no {path}/{min(missing)}, which the tokenizer has there"
            )
        return {
            k: v if k in OWN else _filled(v, source[k], f"{path}/{k}", whose)
            for k, v in template.items()
        }
    if isinstance(source, dict) or template.shape != source.shape:
        shape = "no array" if isinstance(source, dict) else list(source.shape)
        raise ValueError(
            f"{path} is {shape} in the {whose} and {list(template.shape)} in the tokenizer; "
            f"import or train the {whose} that this config describes"
        )
    # a copy: the step donates the state's arrays
    return jax.device_put(jnp.copy(source), template.sharding)
