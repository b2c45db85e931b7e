"""Noise on the latents for the decoder (Figure 4), shared by all levels."""

import jax
import numpy as np

from gae_jax.runtime.errors import ConfigError


def standard_noise(ids: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sample N(0, 1) of ``shape`` for each image, [B, *shape] float32.

    An image's noise depends on ``key`` and its id alone: not on its batch, nor on the devices.

    Args:
      ids: uint32 [B], an image's position in the complete set.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def noisy_latents(
    latents: jax.Array, ids: jax.Array, level: jax.Array | float, key: jax.Array
) -> jax.Array:
    """Return z + level * eps, eps ~ N(0, I) per image; level 0 gives exactly z.

    One key gives every level the same eps (common random numbers), so that a curve over levels is
    smooth and its levels can be compared with few images. In float32 or the latents' wider type.

    Args:
      latents: [B, h, w, d], modes of the posterior.
      ids: uint32 [B], see `standard_noise`.
      level: std of the noise.
    """
    return latents + level * standard_noise(ids, key, latents.shape[1:])


def area_under(levels, values) -> np.ndarray:
    """Integrate a curve over noise levels by trapezoids, in float64.

    Curves over other ranges of levels have other areas; divide by the range to compare them.

    Args:
      levels: [n], increasing.
      values: [..., n].

    Returns:
      [...], in units of ``values`` (levels have none).

    Raises:
      ConfigError: unless there are two levels or more, increasing.
      ValueError: if ``values`` are not as many as levels.
    """
    levels, values = np.asarray(levels, np.float64), np.asarray(values, np.float64)
    if levels.ndim != 1 or len(levels) < 2 or np.any(np.diff(levels) <= 0):
        raise ConfigError(
            f"noise levels {levels.tolist()} enclose no area; give two or more that increase"
        )
    if values.ndim == 0 or values.shape[-1] != len(levels):
        raise ValueError(f"values {list(values.shape)} need one entry for each of {len(levels)}")
    return np.trapezoid(values, levels, axis=-1)
