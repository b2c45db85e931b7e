"""Crops and resizes of decoded images, and the maps between uint8 and [-1, 1]."""

from collections.abc import Callable

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


def to_uint8(images: jax.Array, quantiser: str = "floor128") -> jax.Array:
    """[-1, 1] -> uint8 by one of `QUANTISERS`; computed in fp32, since bf16 changes many pixels.

    "floor128", the released code's, and "round" give back every level of `to_float`; "trunc255",
    RAE's, is 0.49 levels too dark on average and loses 63 of 256.
    """
    return QUANTISERS[quantiser](images.astype(jnp.float32)).astype(jnp.uint8)


def _floor128(x):
    return jnp.clip(127.5 * x + 128, 0, 255)


def _unit(x):
    return jnp.clip((x + 1) / 2, 0, 1) * 255


QUANTISERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "floor128": _floor128,  # GAE, LightningDiT
    "trunc255": _unit,  # RAE
    "round": lambda x: jnp.floor(_unit(x) + 0.5),  # VAR
}


def bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights [size_out, size_in] of torch's antialiased bilinear interpolation.

    A triangle, widened when shrinking, normalised over the pixels that exist; align_corners=False.
    """
    step = size_in / size_out
    centers = ((np.arange(size_out) + 0.5) * step - 0.5)[:, None]
    weights = np.maximum(1 - np.abs(np.arange(size_in) - centers) / max(step, 1.0), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def lightningdit_crop(image: Image.Image, size: int) -> np.ndarray:
    """The crop of LightningDiT's tokenizer evaluation, float32 [size, size, 3] in [-1, 1].

    ToTensor, torchvision's Resize of the tensor (bilinear, antialiased; the long side truncated)
    and CenterCrop. It is 27 to 42 dB away from `center_crop` on photographs: as far as good
    reconstructions are, so a figure of one crop says nothing about the other.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    height, width = pixels.shape[:2]
    short = min(height, width)
    shape = tuple(size if x == short else int(size * x / short) for x in (height, width))
    if (height, width) != shape:
        rows, columns = (
            bilinear_matrix(*pair) for pair in zip((height, width), shape, strict=True)
        )
        pixels = np.einsum("ih,hwc,jw->ijc", rows, pixels, columns, optimize=True)
    top, left = (round((x - size) / 2.0) for x in shape)
    cut = pixels[top : top + size, left : left + size]
    return (2 * cut - 1).astype(np.float32)


def lightningdit_pixels(image: Image.Image, size: int) -> np.ndarray:
    """`lightningdit_crop` as uint8, so that input, target and reference are one array."""
    return np.asarray(to_uint8(lightningdit_crop(image, size)))


# Crops of evaluation by name: PIL image, size -> uint8 [size, size, 3].
CROPS: dict[str, Callable[[Image.Image, int], np.ndarray]] = {
    "adm": center_crop,  # guided-diffusion, GAE's extraction, RAE
    "lightningdit": lightningdit_pixels,
}
