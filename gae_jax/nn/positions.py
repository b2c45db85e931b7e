"""PyTorch's bicubic resize, of images and of learned position tables."""

import jax
import jax.numpy as jnp
import numpy as np


def resize_positions(
    table: jax.Array,
    grid: tuple[int, int],
    *,
    leading: int = 1,
    antialias: bool,
    offset: float = 0.0,
) -> jax.Array:
    """Resize a position table [1, leading + G*G, C] to another grid: fp32 [1, leading + h*w, C].

    Args:
      grid: (h, w).
      leading: positions that stay as they are: 1 with a CLS token, else 0.
      antialias, offset: as `resize_matrix`.
    """
    side = round((table.shape[1] - leading) ** 0.5)
    if grid == (side, side):
        return table
    rows, columns = (resize_matrix(side, size, antialias=antialias, offset=offset) for size in grid)
    patches = table[0, leading:].astype(jnp.float32).reshape(side, side, -1)
    resized = jnp.einsum(
        "ij,kl,jlc->ikc", rows, columns, patches, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.concatenate([table[:, :leading], resized.reshape(1, grid[0] * grid[1], -1)], axis=1)


def resize_images(images: jax.Array, size: int, *, antialias: bool) -> jax.Array:
    """Resize images [B, H, W, C] to [B, size, size, C] in fp32, as `resize_matrix`."""
    images = images.astype(jnp.float32)
    if images.shape[1:3] == (size, size):
        return images
    rows, columns = (resize_matrix(edge, size, antialias=antialias) for edge in images.shape[1:3])
    return jnp.einsum(
        "ih,jw,bhwc->bijc", rows, columns, images, precision=jax.lax.Precision.HIGHEST
    )


def resize_matrix(
    size_in: int, size_out: int, *, antialias: bool, offset: float = 0.0
) -> np.ndarray:
    """Return the weights [size_out, size_in] of PyTorch's bicubic resize, align_corners=False.

    Without antialias it is the cubic kernel with a = -0.75 at the four nearest points, edges
    repeated; with antialias it is a = -0.5, widened when shrinking, normalised over the points
    that exist. (jax.image.resize knows only a = -0.5.)

    Args:
      offset: 0 takes the ratio of the sizes as the scale; the DINOv2 of the hub (facebookresearch
        dinov2, `interpolate_pos_encoding`) takes (size_out + offset) / size_in.
    """
    step = size_in / (size_out + offset)
    centers = ((np.arange(size_out) + 0.5) * step - 0.5)[:, None]
    if antialias:
        weights = _cubic((np.arange(size_in) - centers) / max(step, 1.0), -0.5)
        weights /= weights.sum(axis=1, keepdims=True)
    else:
        points = np.floor(centers).astype(int) + np.arange(-1, 3)
        weights = np.zeros((size_out, size_in))
        rows = np.broadcast_to(np.arange(size_out)[:, None], points.shape)
        np.add.at(weights, (rows, points.clip(0, size_in - 1)), _cubic(points - centers, -0.75))
    return weights.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Compute Keys' cubic convolution kernel at distances x, any shape."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
