"""PSNR and SSIM per image, between uint8 images [B, H, W, C] of the same crop."""

import jax
import jax.numpy as jnp
import numpy as np


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """20 log10(255 / rmse) of each image, [B], in dB; infinite for equal images."""
    error = jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(1, 2, 3))
    return 10 * jnp.log10(255.0**2 / error)


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of each image, [B], on pixels in [0, 1].

    Gaussian window 11 x 11 with deviation 1.5, k1 = 0.01, k2 = 0.03, per channel; borders are
    reflected and the whole map is averaged, as torchmetrics does (Wang et al. 2004).
    """
    offsets = np.arange(-5, 6)
    window = np.exp(-np.square(offsets / 1.5) / 2)
    window = jnp.asarray(window / window.sum(), jnp.float32)

    def blur(x):
        x = jnp.pad(x, ((0, 0), (5, 5), (5, 5), (0, 0)), mode="reflect")
        height, width = x.shape[1] - 10, x.shape[2] - 10
        x = sum(window[i] * x[:, i : i + height] for i in range(11))
        return sum(window[i] * x[:, :, i : i + width] for i in range(11))

    x, y = a.astype(jnp.float32) / 255, b.astype(jnp.float32) / 255
    mean_x, mean_y = blur(x), blur(y)
    var_x = jnp.maximum(blur(x * x) - mean_x**2, 0)
    var_y = jnp.maximum(blur(y * y) - mean_y**2, 0)
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    map_ = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return jnp.mean(map_, axis=(1, 2, 3))
