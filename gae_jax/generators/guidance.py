"""Guidance of a velocity, with a scale that depends on time.

The scale is given as its excess over 1, a function of times: 0 where nothing is guided, -1 for
the velocity without a class. A scale of 1 is no guidance, 0 is the unconditional velocity, and
more than 1 extrapolates beyond the conditional one.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
Excess = Callable[[jax.Array], jax.Array]


def in_interval(scale, start: float = 0.0, end: float = 1.0) -> Excess:
    """Guide with one scale for start <= t <= end, times in the direction of the flow (1: data)."""
    return lambda t: jnp.where((t >= start) & (t <= end), scale - 1, 0)


def in_parts(parts: Sequence[tuple[float, float]]) -> Excess:
    """Guide with a scale for every part of the time.

    Args:
      parts: (last time, scale) one after the other, from t = 0 on.
    """
    ends, scales = (np.asarray(column, np.float32) for column in zip(*parts, strict=True))

    def excess(t):
        later = jnp.asarray(t, jnp.float32)[..., None] > ends[:-1]
        return jnp.asarray(scales - 1)[jnp.sum(later, axis=-1)]

    return excess


def guided(
    conditional: Velocity,
    both: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    excess: Excess,
    *,
    channels: int = 0,
) -> Velocity:
    """Return the velocity u + scale (c - u); where the scale is 1 only c is computed.

    Args:
      conditional: the velocity c.
      both: (x, t) -> (c, u). u is the velocity without a class (classifier-free guidance), or that
        of a weaker model (autoguidance, arXiv 2406.02507).
      excess: times -> scale - 1.
      channels: guide only the first so many channels; the rest is c. 0: all. (Some released code
        has 3.)
    """

    def velocity(x, t):
        weight = excess(t)

        def inside(x):
            c, u = both(x, t)
            out = jnp.where(weight == -1, u, c + weight * (c - u))  # exactly u at scale 0
            if channels:
                out = jnp.concatenate([out[..., :channels], c[..., channels:]], axis=-1)
            return out

        # cond, not where: at scale 1 nothing but c is computed
        return jax.lax.cond(weight != 0, inside, lambda x: conditional(x, t), x)

    return velocity


def calls_at(excess: Excess) -> Callable[[jax.Array], jax.Array]:
    """Return times -> network calls of a `guided` velocity: two where it guides, else one."""
    return lambda t: 1 + (excess(t) != 0).astype(np.int32)
