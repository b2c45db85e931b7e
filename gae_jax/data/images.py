"""Crops of decoded images, resizing for DINOv2, and the maps between uint8 and [-1, 1]."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

# The normalisation of torchvision's ImageNet models, which DINOv2 was trained with.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


class Crop(NamedTuple):
    """One image as its crop leaves it; all that is compared with it must come from this pair.

    Attributes:
      pixels: uint8 [S, S, 3], what PSNR and FID see.
      values: float32 [S, S, 3] in [-1, 1], what an encoder sees.
    """

    pixels: np.ndarray
    values: np.ndarray


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


def adm_crop(image: Image.Image, size: int) -> Crop:
    """`center_crop` of an RGB image: of GAE's extraction, of RAE and of ADM's statistics."""
    pixels = center_crop(image, size)
    return Crop(pixels, pixels.astype(np.float32) / np.float32(127.5) - 1)


def lightningdit_crop(image: Image.Image, size: int) -> Crop:
    """The crop of LightningDiT's evaluation of tokenizers, of an RGB image.

    torchvision's ToTensor, Resize(size), CenterCrop(size) and Normalize(0.5, 0.5), in this order:
    the short side is resized on float32 values, bilinear with antialiasing (the default since
    torchvision 0.17), the long side is rounded down. ``values`` keep what lies between two levels;
    ``pixels`` are they after LightningDiT's quantiser, as its script writes them to disk.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(size * long / short)
    shape = (size, longer) if width <= height else (longer, size)
    array = np.asarray(image, np.float32) / 255
    if image.size != shape:
        # in mode F, PIL neither rounds nor clamps: the same weighted sums as torch's
        channels = [
            Image.fromarray(array[..., channel]).resize(shape, Image.Resampling.BILINEAR)
            for channel in range(3)
        ]
        array = np.stack([np.asarray(channel) for channel in channels], axis=-1)
    # torchvision rounds half offsets to the even side
    top, left = (round((edge - size) / 2) for edge in array.shape[:2])
    values = 2 * array[top : top + size, left : left + size] - 1
    pixels = np.clip(127.5 * values + 128, 0, 255).astype(np.uint8)
    return Crop(pixels, values)


CROPS: dict[str, Callable[[Image.Image, int], Crop]] = {
    "adm": adm_crop,
    "lightningdit": lightningdit_crop,
}


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> fp32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def _floor128(x: jax.Array) -> jax.Array:
    return jnp.clip(127.5 * x + 128, 0, 255)


def _trunc255(x: jax.Array) -> jax.Array:
    return jnp.clip((x + 1) / 2, 0, 1) * 255


def _round(x: jax.Array) -> jax.Array:
    return jnp.clip((x + 1) / 2, 0, 1) * 255 + 0.5


# fp32 values in [-1, 1] -> values that are then truncated to levels.
QUANTISERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "floor128": _floor128,
    "trunc255": _trunc255,
    "round": _round,
}


def to_uint8(images: jax.Array, quantiser: str = "floor128") -> jax.Array:
    """[-1, 1] -> uint8 of the same shape; values outside saturate.

    Computed in fp32; in bf16 it would change a large share of the pixels.

    Args:
      quantiser: "floor128", clamp(127.5 x + 128, 0, 255) truncated: the released quantiser, of
        LightningDiT and of Stable Diffusion's VAE; "trunc255", 255 clamp((x + 1) / 2, 0, 1)
        truncated, as RAE does, which darkens by half a level on average and does not give every
        level of `to_float` back; "round", the same rounded half up, as VAR does.

    Raises:
      ValueError: if there is no such quantiser.
    """
    if quantiser not in QUANTISERS:
        raise ValueError(f"no quantiser {quantiser!r}; there are {sorted(QUANTISERS)}")
    # The cast would truncate by itself, but XLA's CPU compiler (jaxlib 0.10.2) drops a pair of
    # casts fp32 -> uint8 -> fp32 before a reduction: a PSNR would see unquantised pixels.
    return jnp.floor(QUANTISERS[quantiser](images.astype(jnp.float32))).astype(jnp.uint8)


def dinov2_preprocess(images: np.ndarray, size: int = 224) -> np.ndarray:
    """Images as FD-DINOv2 shows them to DINOv2, on the host.

    PIL's bicubic resize of the uint8 pixels to a square, then ImageNet's normalisation: what
    dgm-eval's DINOv2 encoder does unless asked for its "clean" resize, which does not round.

    Args:
      images: uint8 [B, H, W, 3].

    Returns:
      float32 [B, size, size, 3].

    Raises:
      ValueError: if the images are not uint8 [B, H, W, 3].
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"dinov2_preprocess takes uint8 images [B, H, W, 3], not {images.dtype} "
            f"{list(images.shape)}"
        )
    resized = [
        np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
        for image in images
    ]
    return (np.stack(resized).astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
