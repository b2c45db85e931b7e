"""The training state, and the update of its parameters by an optimizer and of their EMA."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from gae_jax.nn.network import Network, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes; dicts are keyed by network ("tokenizer", ...)."""

    step: jax.Array  # int32, number of updates made
    params: dict[str, Params]
    rest: dict[str, Params]  # batch statistics and fixed tables
    opt: dict[str, optax.OptState]
    ema: dict[str, Params]  # moving average of params, for the networks that have one


def make_state(
    key: jax.Array,
    networks: dict[str, Network],
    optimizers: dict[str, optax.GradientTransformation],
    *,
    ema: tuple[str, ...] = (),
) -> TrainState:
    """Make the state at step 0; traceable, so that it can be created with its target sharding."""
    params, rest = {}, {}
    for index, (name, network) in enumerate(networks.items()):
        params[name], rest[name] = network.init(jax.random.fold_in(key, index))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        rest=rest,
        opt={name: optimizers[name].init(params[name]) for name in networks},
        ema={name: jax.tree.map(jnp.copy, params[name]) for name in ema},
    )


def apply_gradients(
    state: TrainState,
    network: str,
    grads: Params,
    optimizer: optax.GradientTransformation,
    *,
    trainable: str = "",
) -> TrainState:
    """Apply one optimizer step to one network; the caller advances the step counter.

    Args:
      trainable: regex of the parameters that learn, searched in paths such as
        ``tokenizer/decoder/blocks/0/attn/qkv/kernel``. The others stay as they are, bit for bit,
        weight decay included; their moments see gradients of zero.
    """
    params = state.params[network]
    grads = where_trainable(grads, jax.tree.map(jnp.zeros_like, grads), network, trainable)
    updates, opt = optimizer.update(grads, state.opt[network], params)
    new = optax.apply_updates(params, updates)
    new = where_trainable(new, params, network, trainable)
    return dataclasses.replace(
        state, params={**state.params, network: new}, opt={**state.opt, network: opt}
    )


def where_trainable(new: Params, old: Params, network: str, trainable: str) -> Params:
    """Take the leaves of ``new`` whose path the regex matches, those of ``old`` elsewhere.

    Args:
      network, trainable: as `apply_gradients`.
    """
    pattern = re.compile(trainable)

    def choose(path, new, old):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return new if pattern.search(f"{network}/{name}") else old

    return jax.tree_util.tree_map_with_path(choose, new, old)


def ema_update(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """Compute decay * ema + (1 - decay) * params, with a shorter memory in the first steps.

    The decay is min(decay, (1 + step) / (10 + step)), so that early averages are not dominated
    by the initial parameters.
    """
    step = step.astype(jnp.float32)
    share = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: share * old + (1 - share) * new, ema, params)
