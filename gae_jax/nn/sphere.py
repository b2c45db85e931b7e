"""Flow matching on spheres: the flow stays on the sphere on which every latent token lies.

GAE's latents are RMS-normalised: a token of d channels has length sqrt(d). Here noise is uniform on
that sphere, a path is the geodesic (great circle) from noise to data at constant speed, and a
velocity is tangential. This is Riemannian flow matching (arXiv 2302.03660) with the sphere's closed
forms; our own variant, not in the paper. Arrays are [..., d], the last axis being a token.
"""

import math

import jax
import jax.numpy as jnp

from gae_jax.nn.layers import rms_norm

EPS = 1e-6


def onto(x: jax.Array) -> jax.Array:
    """Scale x to length sqrt(d); normal noise becomes uniform on the sphere."""
    return rms_norm(x)


def project(x: jax.Array, v: jax.Array) -> jax.Array:
    """Project v onto the tangent space at x on the sphere."""
    return v - x * jnp.mean(x * v, axis=-1, keepdims=True)


def geodesic(noise: jax.Array, data: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (x_t, its velocity) on the great circle from noise (t = 0) to data (t = 1).

    The speed is the angle between the two. For exactly opposite tokens, which random draws never
    are, the great circle is arbitrary.

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
    """Follow the geodesic from x with the tangential velocity v for unit time."""
    angle = jnp.sqrt(jnp.mean(jnp.square(v), axis=-1, keepdims=True))
    # sin(a) / a, also at 0
    return onto(jnp.cos(angle) * x + jnp.sinc(angle / math.pi) * v)
