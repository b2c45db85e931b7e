"""Flow matching on spheres: every token of a latent lies on one, so let the flow stay there.

GAE's latents are RMS-normalised, a token of d channels has length sqrt(d). Here noise is uniform on
that sphere, a path is the geodesic (great circle) from noise to data at constant speed, and a
velocity is tangential. Riemannian flow matching (arXiv 2302.03660) with the sphere's closed forms;
our own variant, no part of the paper. Arrays are [..., d], each last axis a token.
"""

import math

import jax
import jax.numpy as jnp

from gae_jax.nn.layers import rms_norm

EPS = 1e-6


def onto(x: jax.Array) -> jax.Array:
    """x at length sqrt(d); of normal noise this is uniform on the sphere."""
    return rms_norm(x)


def project(x: jax.Array, v: jax.Array) -> jax.Array:
    """The part of v that is tangential at x on the sphere."""
    return v - x * jnp.mean(x * v, axis=-1, keepdims=True)


def geodesic(noise: jax.Array, data: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x_t, its velocity) on the great circle from noise (t = 0) to data (t = 1).

    The speed is the angle between the two; of opposite tokens, which no two draws are, any great
    circle would do.

    Args:
      noise, data: on the sphere, [B, ..., d].
      t: [B].
    """
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    cosine = jnp.mean(noise * data, axis=-1, keepdims=True)
    angle = jnp.arccos(jnp.clip(cosine, -1 + EPS, 1 - EPS))
    sine = jnp.sin(angle)
    x = (jnp.sin((1 - t) * angle) * noise + jnp.sin(t * angle) * data) / sine
    slope = (jnp.cos(t * angle) * data - jnp.cos((1 - t) * angle) * noise) * angle / sine
    x = onto(x)
    return x, project(x, slope)


def exponential(x: jax.Array, v: jax.Array) -> jax.Array:
    """Where the geodesic that starts in x with the tangential v is after unit time."""
    angle = jnp.sqrt(jnp.mean(jnp.square(v), axis=-1, keepdims=True))
    # sin(a) / a, also at 0
    return onto(jnp.cos(angle) * x + jnp.sinc(angle / math.pi) * v)
