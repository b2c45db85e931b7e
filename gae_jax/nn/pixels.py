"""Conversion of pixels: uint8 images to floats in [-1, 1] and back."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

# The normalisation of torchvision's ImageNet models, which DINOv2 was trained with.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def to_float(images: jax.Array) -> jax.Array:
    """Convert uint8 [0, 255] to fp32 [-1, 1], any shape."""
    return images.astype(jnp.float32) / 127.5 - 1


def as_float(images: jax.Array) -> jax.Array:
    """Return uint8 images as fp32 in [-1, 1]; floats, which are in [-1, 1], stay."""
    return to_float(images) if images.dtype == jnp.uint8 else images


def _floor128(x: jax.Array) -> jax.Array:
    return jnp.clip(127.5 * x + 128, 0, 255)


def _trunc255(x: jax.Array) -> jax.Array:
    return jnp.clip((x + 1) / 2, 0, 1) * 255


def _round(x: jax.Array) -> jax.Array:
    return jnp.clip((x + 1) / 2, 0, 1) * 255 + 0.5


# fp32 values in [-1, 1] -> values in [0, 256), which are then truncated to levels.
QUANTISERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "floor128": _floor128,
    "trunc255": _trunc255,
    "round": _round,
}


def to_uint8(images: jax.Array, quantiser: str = "floor128") -> jax.Array:
    """Quantise values in [-1, 1] to uint8 of the same shape; values outside saturate.

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
    """Preprocess images for DINOv2 as FD-DINOv2 does, on the host.

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
