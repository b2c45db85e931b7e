"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738).

The operations and their strengths are those of RAE's released discriminator. Each is a function
of (images [B, S, S, 3] in [-1, 1], key) and samples separately for every image.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

SHIFT = 0.125  # of the edge, at most, in integer pixels


def _uniform(key: jax.Array, images: jax.Array, low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, (len(images), 1, 1, 1), minval=low, maxval=high)


def translation(images: jax.Array, key: jax.Array) -> jax.Array:
    """Translate by up to `SHIFT` of the edge either way; zeros come in."""
    size = images.shape[1]
    most = int(size * SHIFT + 0.5)
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)

    def cut(image, start):
        return jax.lax.dynamic_slice(image, (*start, 0), (size, size, image.shape[-1]))

    return jax.vmap(cut)(padded, starts)


def brightness(images: jax.Array, key: jax.Array) -> jax.Array:
    """Add up to 0.5 either way."""
    return images + _uniform(key, images, -0.5, 0.5)


def saturation(images: jax.Array, key: jax.Array) -> jax.Array:
    """Multiply the distance from the pixel's grey by 0 to 2."""
    grey = jnp.mean(images, axis=-1, keepdims=True)
    return (images - grey) * _uniform(key, images, 0, 2) + grey


def contrast(images: jax.Array, key: jax.Array) -> jax.Array:
    """Multiply the distance from the image's mean by 0.5 to 1.5."""
    mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return (images - mean) * _uniform(key, images, 0.5, 1.5) + mean


OPERATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "translation": translation,
    "brightness": brightness,
    "saturation": saturation,
    "contrast": contrast,
}


def augment(images: jax.Array, key: jax.Array, names: Sequence[str]) -> jax.Array:
    """Apply the operations of these names, one after the other."""
    for index, name in enumerate(names):
        images = OPERATIONS[name](images, jax.random.fold_in(key, index))
    return images
