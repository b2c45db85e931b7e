"""Gradient accumulation: a batch too large to compute at once, in parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate(
    gradients: Callable, batch, rest: Any, key: jax.Array, parts: int
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Average gradients and metrics over parts of a batch, computed one after the other.

    Every part holds rows of every device.

    Args:
      gradients: (part of the batch, rest, key) -> (gradients, rest, metrics).
      batch: arrays whose leading axis is divisible by ``parts``.
      rest: what changes with every part, such as batch statistics, or None.

    Returns:
      (gradients, rest after the last part, metrics).
    """
    if parts == 1:
        return gradients(batch, rest, key)

    def split(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def add_part(carry, item):
        index, part = item
        grads, rest, figures = gradients(part, carry[1], jax.random.fold_in(key, index))
        total = jax.tree.map(lambda a, b: a + b / parts, carry[0], (grads, figures))
        return (total, rest), None

    shapes = jax.eval_shape(
        lambda: gradients(jax.tree.map(lambda x: split(x)[0], batch), rest, key)
    )
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[2]))
    items = jnp.arange(parts), jax.tree.map(split, batch)
    ((grads, figures), rest), _ = jax.lax.scan(add_part, (zero, rest), items)
    return grads, rest, figures
