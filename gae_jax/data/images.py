"""Crops of decoded images, and the one pair of maps between uint8 and [-1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """ADM's resize: halve with a box filter while that is possible, then bicubic to ``size``."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = tuple(round(x * scale) for x in image.size)
    return image.resize(shape, resample=Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop, uint8 [size, size, 3]. (guided-diffusion, image_datasets.py)"""
    array = np.asarray(resize_short_side(image, size))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """ADM's random crop: the short side is first resized to size .. size / 0.8."""
    array = np.asarray(resize_short_side(image, int(rng.integers(size, int(size / 0.8) + 1))))
    top = int(rng.integers(array.shape[0] - size + 1))
    left = int(rng.integers(array.shape[1] - size + 1))
    return array[top : top + size, left : left + size]


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> fp32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8 by clamp(127.5 x + 128, 0, 255), truncated: the released quantiser.

    Computed in fp32; in bf16 it would change a large share of the pixels.
    """
    return jnp.clip(127.5 * images.astype(jnp.float32) + 128, 0, 255).astype(jnp.uint8)
