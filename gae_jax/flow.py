"""Flow matching on the linear path. t = 0 is noise, t = 1 is data.

x_t = t x1 + (1 - t) x0 with x0 ~ N(0, I), and the network learns the velocity u = x1 - x0.
"""

import jax
import jax.numpy as jnp

from gae_jax.losses import cosine_distance, mse


def shift_time(t: jax.Array, shift: float) -> jax.Array:
    """shift * t / (1 + (shift - 1) t): below 1 it moves times towards noise; 1 is none."""
    return shift * t / (1 + (shift - 1) * t)


def sample_time(key: jax.Array, batch: int, *, mean: float, std: float, shift: float) -> jax.Array:
    """Logit-normal times in (0, 1), shifted: [batch]."""
    t = jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,)))
    return shift_time(t, shift)


def interpolate(noise: jax.Array, data: jax.Array, t: jax.Array) -> jax.Array:
    """x_t for times t [B]."""
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return t * data + (1 - t) * noise


def flow_loss(
    velocity: jax.Array, noise: jax.Array, data: jax.Array, *, cosine_weight: float = 1.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error plus the weighted cosine distance over channels, and both terms."""
    target = data - noise
    terms = {"mse": mse(velocity, target), "cosine": cosine_distance(velocity, target)}
    return terms["mse"] + cosine_weight * terms["cosine"], terms


def score_of_velocity(velocity: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """The score of x_t from the velocity, in closed form: (t v - x) / (1 - t)."""
    return (t * velocity - x) / (1 - t)


def time_grid(points: int, *, shift: float = 1.0, start: float = 0.0, end: float = 1.0):
    """``points`` times from start to end, then shifted. [points]

    As in the released sampler the shift is applied to the grid as a whole, so a grid that ends
    before 1 ends even earlier after a shift below 1 (0.996 becomes 0.990 at shift 0.4).
    """
    return shift_time(jnp.linspace(start, end, points), shift)
