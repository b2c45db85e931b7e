"""Gradients of a batch that is too large to be computed at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate(
    gradients: Callable, batch, rest: Any, key: jax.Array, parts: int
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Means of gradients and figures over parts of a batch, computed one after the other.

    Every part holds rows of every device.

    Args:
      gradients: (part of the batch, rest, key) -> (gradients, rest, figures).
      batch: arrays whose leading axis is divisible by ``parts``.
      rest: what moves once per part, such as batch statistics, or None.
    """
    if parts == 1:
        return gradients(batch, rest, key)

    def split(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def one(carry, item):
        index, part = item
        grads, rest, figures = gradients(part, carry[1], jax.random.fold_in(key, index))
        total = jax.tree.map(lambda a, b: a + b / parts, carry[0], (grads, figures))
        return (total, rest), None

    shapes = jax.eval_shape(
        lambda: gradients(jax.tree.map(lambda x: split(x)[0], batch), rest, key)
    )
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[2]))
    items = jnp.arange(parts), jax.tree.map(split, batch)
    ((grads, figures), rest), _ = jax.lax.scan(one, (zero, rest), items)
    return grads, rest, figures
