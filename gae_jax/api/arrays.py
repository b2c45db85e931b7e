"""What callers give, as arrays: images, latents, labels and times, checked before any work."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from gae_jax.data.decoding import to_rgb
from gae_jax.runtime.errors import UserError


def as_images(images: Any, size: int, what: str = "images") -> np.ndarray:
    """Return images as one array, uint8 or float32 in [-1, 1], [B, size, size, 3].

    Args:
      images: an array [B, S, S, 3] of uint8, or of floats in [-1, 1]; or a sequence of PIL images
        of any mode, which become RGB.
      size: S that the run's networks were made for.
      what: the argument's name, for messages.

    Raises:
      UserError: for another shape, dtype or range, or no images.
    """
    if isinstance(images, Image.Image):
        raise UserError(f"{what} is one PIL image; give a list of them: [{what}]")
    if isinstance(images, list | tuple) and any(isinstance(x, Image.Image) for x in images):
        images = _of_pil(images, size, what)
    array = _array(images, what)
    if array.ndim != 4 or array.shape[1:] != (size, size, 3):
        raise UserError(
            f"{what} has shape {list(array.shape)}; this run takes [B, {size}, {size}, 3]"
            + _shape_remedy(array.shape, size, what)
        )
    _require_rows(array, what)
    if array.dtype == np.uint8:
        return array
    if not _is_float(array):
        raise UserError(
            f"{what} has dtype {array.dtype}; give uint8 in [0, 255] ({what}.astype('uint8') if "
            "the values are those), or floats in [-1, 1]"
        )
    array = array.astype(np.float32, copy=False)
    low, high = float(array.min()), float(array.max())  # NaN if any is
    if not (low >= -1 and high <= 1):
        remedy = (
            "replace the NaNs"
            if np.isnan(low)
            else f"give uint8 instead: {what}.astype('uint8')"
            if low >= 0 and high <= 255
            else f"clip them: {what}.clip(-1, 1)"
        )
        raise UserError(
            f"{what} has values from {low:g} to {high:g}; floats must be in [-1, 1]: {remedy}"
        )
    return array


def _of_pil(images: Sequence[Any], size: int, what: str) -> np.ndarray:
    """Stack PIL images of size x size pixels: uint8 [B, size, size, 3]."""
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise UserError(f"{what}[{index}] is {type(image).__name__}, but others are PIL images")
        if image.size != (size, size):
            width, height = image.size
            raise UserError(
                f"{what}[{index}] has {width} x {height} pixels; this run takes {size} x {size}: "
                f"PIL.ImageOps.fit(image, ({size}, {size})) crops and resizes it"
            )
    return np.stack([np.asarray(to_rgb(image)) for image in images])


def _shape_remedy(shape: tuple[int, ...], size: int, what: str) -> str:
    if shape == (size, size, 3):
        return f"; one image is {what}[None]"
    if len(shape) == 4 and shape[1] == 3:
        return f"; channels come last: {what}.transpose(0, 2, 3, 1)"
    if len(shape) == 4 and shape[3] == 3:
        return "; resize or crop them, PIL.ImageOps.fit does both"
    return ""


def as_latents(latents: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Return latents as float32 [B, h, w, d].

    Args:
      latents: floats.
      shape: (h, w, d) of the run.
      what: the argument's name, for messages.

    Raises:
      UserError: for another shape or dtype, values that are not finite, or no latents.
    """
    array = _array(latents, what)
    if array.ndim != 4 or array.shape[1:] != tuple(shape):
        expected = ", ".join(map(str, shape))
        one = f"; one latent is {what}[None]" if array.shape == tuple(shape) else ""
        raise UserError(
            f"{what} has shape {list(array.shape)}; this run's latents are [B, {expected}]{one}"
        )
    _require_rows(array, what)
    if not _is_float(array):
        raise UserError(f"{what} has dtype {array.dtype}; give floats, as `encode` returns them")
    array = array.astype(np.float32, copy=False)
    if bad := _first_bad(array):
        raise UserError(f"{what}{bad} has a NaN or an infinity; leave it out")
    return array


def as_times(t: Any, count: int) -> np.ndarray:
    """Return times in [0, 1], one or one for each of ``count`` rows, as float32 [count].

    Raises:
      UserError: for another shape or range.
    """
    times = _array(t, "t")
    if times.shape not in ((), (count,)):
        raise UserError(
            f"t has shape {list(times.shape)}; give one time, or one per row, [{count}]"
        )
    if not (np.issubdtype(times.dtype, np.integer) or _is_float(times)):
        raise UserError(f"t has dtype {times.dtype}; give floats from 0 (noise) to 1 (data)")
    times = np.broadcast_to(times.astype(np.float32), (count,))
    outside = ~((times >= 0) & (times <= 1))
    if outside.any():
        raise UserError(f"t is {times[outside][0]:g}; times go from 0 (noise) to 1 (data)")
    return times


def _array(value: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{what} cannot be made an array: {error}") from None
    if array.dtype == object:
        raise UserError(f"{what} is {type(value).__name__} of objects; give an array of numbers")
    return array


def _is_float(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))  # knows bfloat16 too


def _require_rows(array: np.ndarray, what: str) -> None:
    if not len(array):
        raise UserError(f"{what} is empty, shape {list(array.shape)}; give at least one")


def _first_bad(array: np.ndarray) -> str:
    """Index, as "[3]", of the first row that is not finite; "" if all are."""
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    return f"[{int(bad.argmax())}]" if bad.any() else ""
