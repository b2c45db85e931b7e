"""Samplers over a velocity: plain functions that know nothing of networks.

``velocity(x, t)`` takes x [B, ...] and a scalar time t (0 noise, 1 data) and is called once per
step. Guidance is a wrapper around it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gae_jax.flow import score_of_velocity

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def noise_for(keys: jax.Array, shape: tuple[int, ...], index=0) -> jax.Array:
    """Independent normal noise [B, *shape], one key per sample: devices do not matter."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def euler(velocity: Velocity, x: jax.Array, grid: jax.Array) -> jax.Array:
    """First-order ODE solver; ``len(grid) - 1`` calls."""

    def step(x, times):
        t, end = times
        return x + (end - t) * velocity(x, t), None

    return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]


def heun(velocity: Velocity, x: jax.Array, grid: jax.Array) -> jax.Array:
    """Second-order ODE solver (explicit trapezoid); ``2 (len(grid) - 1)`` calls."""

    def step(x, times):
        t, end = times
        first = velocity(x, t)
        second = velocity(x + (end - t) * first, end)
        return x + (end - t) * (first + second) / 2, None

    return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]


def euler_maruyama(
    velocity: Velocity,
    x: jax.Array,
    grid: jax.Array,
    *,
    noise: Callable[[jax.Array], jax.Array],
    last_step: float,
    last_time: float | None = None,
) -> jax.Array:
    """SDE sampler dx = (v + g s) dt + sqrt(2 g) dW with g = (1 - t) / t ("SBDM").

    After the grid one deterministic step of size ``last_step`` follows the same drift ("Mean").
    ``len(grid)`` calls: the score s comes from the velocity.

    Args:
      noise: step index -> standard normal array of x's shape.
      last_step: size of the last step.
      last_time: time at which the last drift is evaluated; None: where the grid ends. The
        released sampler evaluates it at 1 - last_step although its shifted grid ends earlier.
    """

    def drift(x, t):
        v = velocity(x, t)
        g = (1 - t) / t
        return v + g * score_of_velocity(v, x, t), g

    def step(x, inputs):
        index, t, end = inputs
        h = end - t
        move, g = drift(x, t)
        return x + h * move + jnp.sqrt(2 * g * h) * noise(index), None

    steps = (jnp.arange(len(grid) - 1), grid[:-1], grid[1:])
    x = jax.lax.scan(step, x, steps)[0]
    last = grid[-1] if last_time is None else jnp.asarray(last_time, grid.dtype)
    return x + last_step * drift(x, last)[0]


def guided(
    conditional: Velocity, both: Callable, *, scale: float, start: float, end: float
) -> Velocity:
    """Classifier-free guidance u + scale (c - u) for start <= t <= end, c alone outside.

    Args:
      conditional: the conditional velocity c.
      both: (x, t) -> (c, u), in one call of the network on a doubled batch.
    """

    def velocity(x, t):
        def inside(x):
            c, u = both(x, t)
            return u + scale * (c - u)

        # cond, not where: outside the interval nothing unconditional is computed
        return jax.lax.cond((t >= start) & (t <= end), inside, lambda x: conditional(x, t), x)

    return velocity
