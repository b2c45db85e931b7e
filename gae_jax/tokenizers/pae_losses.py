"""The prior losses of PAE (arXiv 2605.07915): structure, continuity and semantics of its latents.

Pure functions of arrays, all means. Latents are [B, h, w, d] or [B, N, d], every token on the
sphere of mean square 1; the target is the latent of the frozen teacher, and gets no gradient.

The training code is not released. The paper leaves open how the Gram matrices are scaled, and the
law of the perturbation; our choices for those are marked as such.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from gae_jax.nn import sphere
from gae_jax.nn.losses import cosine_distance, cosines, l1, mse
from gae_jax.tokenizers.pae_kind import ANGLES, NOISES


def _tokens(latents: jax.Array) -> jax.Array:
    """Flatten [B, ..., d] -> [B, N, d]."""
    return rearrange(latents, "b ... d -> b (...) d")


def structure(latents: jax.Array, target: jax.Array) -> jax.Array:
    """Compute SSR: mean (cos(z_i, z_j) - cos(t_i, t_j))^2 over pairs of tokens, and images.

    The paper writes squared differences of Gram matrices. With cosines instead of inner products,
    and the mean instead of the sum (our choice), its weight of 0.2 is commensurate with the other
    terms; for tokens on the sphere only a constant factor differs. Rotating all tokens alike
    changes nothing.
    """
    return mse(cosines(_tokens(latents)), jax.lax.stop_gradient(cosines(_tokens(target))))


def semantics(latents: jax.Array, target: jax.Array) -> jax.Array:
    """Compute SCR, in [0, 4]: mean 1 - cos over tokens, plus that of the images' mean tokens."""
    latents, target = _tokens(latents), jax.lax.stop_gradient(_tokens(target))
    pooled = cosine_distance(jnp.mean(latents, axis=1), jnp.mean(target, axis=1))
    return cosine_distance(latents, target) + pooled


def tangent_noise(key: jax.Array, latents: jax.Array) -> jax.Array:
    """Sample a tangent direction of the sphere for every token, with mean square 1.

    Normal noise, less its part along the token (our choice). One sample serves all angles.
    """
    noise = sphere.project(latents, jax.random.normal(key, latents.shape, latents.dtype))
    return sphere.onto(noise)


def turn(latents: jax.Array, direction: jax.Array, degrees: jax.Array | float) -> jax.Array:
    """Rotate tokens on the sphere by an angle: cos(a) z + sin(a) direction.

    It is z + tan(a) direction, brought back to mean square 1 (our choice: the paper does not say
    whether the sum is). ``direction`` is that of `tangent_noise`; the angle is below 90, one number
    or one that broadcasts.
    """
    return sphere.exponential(latents, degrees * (math.pi / 180) * direction)


def perturbed(
    key: jax.Array,
    latents: jax.Array,
    *,
    angles: tuple[float, ...] = ANGLES,
    noise: str = "tangent",
    jitter: float = 0.0,
) -> list[jax.Array]:
    """Perturb latents by each angle, all along one sample of noise.

    Args:
      latents: [B, ..., d], tokens of mean square 1.
      angles: in degrees, each below 90.
      noise: "tangent": every token is turned by just the angle (`turn`). "isotropic": normal noise
        times tan(angle) is added and the sum brought back to mean square 1, so that the angle is
        met on average only, as in Sphere Encoder (arXiv 2602.15030, read second hand).
      jitter: each image's angles are multiplied by one number, uniform in [1 - jitter, 1].

    Raises:
      ValueError: for an unknown noise.
    """
    if noise not in NOISES:
        raise ValueError(f"noise is {noise!r}; use one of {', '.join(NOISES)}")
    draw, shrink = jax.random.split(key)
    if noise == "tangent":
        direction = tangent_noise(draw, latents)
    else:
        direction = jax.random.normal(draw, latents.shape, latents.dtype)
    share = jnp.ones(())
    if jitter:
        shape = len(latents), *[1] * (latents.ndim - 1)
        share = 1 - jitter * jax.random.uniform(shrink, shape, latents.dtype)

    def by(degrees):
        if noise == "tangent":
            return turn(latents, direction, share * degrees)
        return sphere.onto(latents + jnp.tan(share * (math.pi / 180) * degrees) * direction)

    return [by(degrees) for degrees in angles]


def continuity(
    restored: jax.Array,
    middle: jax.Array,
    far: jax.Array,
    distance: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Compute MCR: images of perturbed latents stay near those of less perturbed ones.

    |middle - restored| + distance(middle, restored) + |far - middle| + distance(far, middle),
    each a mean, the second of each pair without gradient. The original image takes no part.

    Args:
      restored, middle, far: images [B, H, W, 3] in [0, 1], decoded from the latents as they are
        and turned by the two `ANGLES`, all in one direction.
      distance: of two batches of images in [0, 1], such as LPIPS: a number, or one per image.
    """

    def step(images, anchor):
        anchor = jax.lax.stop_gradient(anchor)
        return l1(images, anchor) + jnp.mean(distance(images, anchor))

    return step(middle, restored) + step(far, middle)
