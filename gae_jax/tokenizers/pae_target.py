"""The structural target H_ref that the latents of PAE's prior refinement imitate.

The paper (arXiv 2605.07915, read second hand) upsamples the frozen encoder's tokens to the image's
resolution with AnyUp, an image-guided network, applies a "low-pass spatial normalisation" of
strength 0.4, and brings the result back to the tokens' grid. AnyUp's weights are not part of this
project. It is replaced by our JOINT BILATERAL UPSAMPLING (after Kopf et al. 2007), or a
plain bilinear one. The low-pass is read in two ways, both offered: a Gaussian blur that the tokens
are mixed with, and a subtraction of their mean over positions (as iREPA, arXiv 2512.10794).

All of it is linear in the tokens given the image, except for a division by standard deviations. So
no array has the image's resolution and all channels: an upsampling is a matrix [pixels, tokens],
of which only the product with the downsampling is stored.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

REFERENCES = ("raw", "bilinear", "image_guided")
LOW_PASSES = ("blur", "zscore")
_HIGHEST = jax.lax.Precision.HIGHEST


def structural_target(
    features: jax.Array,
    images: jax.Array,
    *,
    reference: str = "image_guided",
    low_pass: str = "blur",
    strength: float = 0.4,
    blur: float = 0.5,
    reach: float = 1.0,
    colour: float = 0.1,
) -> jax.Array:
    """Compute H_ref [B, N, C] in fp32.

    Args:
      features: the encoder's tokens [B, N, C] of a square grid.
      images: [B, S, S, 3] in [-1, 1]; S is a multiple of the grid.
      reference: "raw": the tokens as they are, nothing else is done; "bilinear" or "image_guided":
        the way up. The way down is bilinear, without antialias.
      low_pass: "blur": (1 - strength) H + strength * Gauss(H); "zscore": (H - strength * mean) /
        std, both over the pixels of an image, per channel.
      strength: of the low-pass; 0.4 in the paper, second hand.
      blur: std of the Gaussian, in tokens (ours).
      reach: of "image_guided": std of the weights over distance, in tokens (ours).
      colour: of "image_guided": std of the weights over differences in colour between a pixel
        and the mean of a token's patch, RGB in [0, 1] (ours).

    Raises:
      ValueError: for an unknown name, or images that the grid does not divide.
    """
    check(reference, low_pass)
    features = features.astype(jnp.float32)
    if reference == "raw":
        return features
    grid, size = math.isqrt(features.shape[1]), images.shape[1]
    if grid**2 != features.shape[1] or size % grid:
        raise ValueError(
            f"{features.shape[1]} tokens do not form a square grid that divides images of {size} "
            "pixels"
        )
    down = linear_matrix(size, grid)
    ways = [down, down @ gauss_matrix(size, blur * size / grid)] if low_pass == "blur" else [down]
    if reference == "bilinear":
        back, moments = _bilinear(ways, grid, size)
    else:
        back, moments = _guided(
            (images + 1) / 2, np.stack(ways), low_pass == "zscore", reach, colour
        )
    targets = jnp.einsum("kbmn,bnc->kbmc", back, features, precision=_HIGHEST)
    if low_pass == "blur":
        return (1 - strength) * targets[0] + strength * targets[1]
    mean = jnp.einsum("bn,bnc->bc", moments[0], features, precision=_HIGHEST)[:, None]
    seconds = jnp.einsum("bnm,bmc->bnc", moments[1], features, precision=_HIGHEST)
    power = jnp.sum(features * seconds, axis=1, keepdims=True)
    std = jnp.sqrt(jnp.maximum(power - jnp.square(mean), 0) + 1e-6)
    return (targets[0] - strength * mean) / std


def check(reference: str, low_pass: str) -> None:
    """Raise ValueError unless both are names of `REFERENCES` and `LOW_PASSES`."""
    for name, value, known in (
        ("reference", reference, REFERENCES),
        ("low_pass", low_pass, LOW_PASSES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}")


def _bilinear(ways: list[np.ndarray], grid: int, size: int):
    """Compute `_guided` of a bilinear upsampling, the same for all images."""
    up = linear_matrix(grid, size)
    back = np.stack([np.kron(way @ up, way @ up) for way in ways])[:, None]
    inner = up.T @ up / size
    return back, (np.kron(up.mean(axis=0), up.mean(axis=0))[None], np.kron(inner, inner)[None])


def _guided(images: jax.Array, ways: np.ndarray, moments: bool, reach: float, colour: float):
    """Return (tokens -> tokens [K, B, N, N] up and by each way back, moments over the pixels).

    The moments are (mean [B, N], mean of products [B, N, N]) of the upsampling's rows. The image is
    taken in bands of one row of tokens: all of its upsampling would have pixels * tokens entries.

    Args:
      images: [B, S, S, 3] in [0, 1].
      ways: from pixels to tokens in one direction, [K, grid, S].
    """
    count, size, grid = len(images), images.shape[1], ways.shape[1]
    tokens = grid**2
    bands = rearrange(images, "b (g p) x c -> g b p x c", g=grid)
    rows = rearrange(ways, "k i (g p) -> g k i p", g=grid)
    means = patch_means(images, grid)

    def add(sums, band):
        index, pixels, way = band
        up = guided_weights(pixels, means, index, reach=reach, colour=colour)
        across = jnp.einsum("kjx,bpxn->kbpjn", ways, up, precision=_HIGHEST)
        back = sums[0] + jnp.einsum("kip,kbpjn->kbijn", way, across, precision=_HIGHEST)
        if not moments:
            return (back, *sums[1:]), None
        products = jnp.einsum("bpxn,bpxm->bnm", up, up, precision=_HIGHEST)
        return (back, sums[1] + up.sum(axis=(1, 2)), sums[2] + products), None

    sums = (
        jnp.zeros((len(ways), count, grid, grid, tokens)),
        jnp.zeros((count, tokens)),
        jnp.zeros((count, tokens, tokens) if moments else ()),
    )
    (back, mean, products), _ = jax.lax.scan(add, sums, (jnp.arange(grid), bands, rows))
    back = back.reshape(len(ways), count, tokens, tokens)
    return back, (mean / size**2, products / size**2)


def patch_means(images: jax.Array, grid: int) -> jax.Array:
    """Compute the mean colours [B, grid, grid, 3] of the tokens' patches; images [B, S, S, 3]."""
    return rearrange(images, "b (h p) (w q) c -> b h p w q c", h=grid, w=grid).mean(axis=(2, 4))


def guided_weights(
    pixels: jax.Array, means: jax.Array, row: jax.Array | int, *, reach: float, colour: float
) -> jax.Array:
    """Compute the joint bilateral upsampling of one row of patches: weights [B, p, S, N], sum 1.

    A pixel's value is the mean of the tokens, weighted by exp(-d^2 / 2 reach^2) over its distance d
    from their centres in tokens and by exp(-c^2 / 2 colour^2) over the distance c of its colour
    from the mean colour of their patches.

    Args:
      pixels: [B, p, S, 3] in [0, 1], the pixels of the tokens' row of this number.
      means: as `patch_means` gives them.
    """
    patch, size, grid = pixels.shape[1], pixels.shape[2], means.shape[1]
    centres = np.arange(grid) + 0.5
    down = row + (np.arange(patch) + 0.5) / patch
    down = jnp.square(down[:, None] - centres)[:, None, :, None]
    across = np.square((np.arange(size)[:, None] + 0.5) / patch - centres)[:, None, :]
    unlike = jnp.sum(jnp.square(pixels[:, :, :, None, None] - means[:, None, None]), axis=-1)
    weights = -unlike / (2 * colour**2) - down / (2 * reach**2) - across / (2 * reach**2)
    return jax.nn.softmax(weights.reshape(*weights.shape[:3], -1), axis=-1)


def linear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Return the weights [size_out, size_in] of PyTorch's bilinear interpolation in one direction.

    align_corners=False, no antialias: the two nearest points, edges repeated.
    """
    at = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    at = np.clip(at, 0, size_in - 1)
    first = np.minimum(np.floor(at).astype(int), max(size_in - 2, 0))
    weights = np.zeros((size_out, size_in))
    rows = np.arange(size_out)
    np.add.at(weights, (rows, first), 1 - (at - first))
    np.add.at(weights, (rows, np.minimum(first + 1, size_in - 1)), at - first)
    return weights.astype(np.float32)


def gauss_matrix(size: int, sigma: float) -> np.ndarray:
    """Return a Gaussian blur [size, size] in one direction, cut at 4 sigma, edges reflected."""
    radius = min(math.ceil(4 * sigma), size - 1)
    kernel = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / sigma))
    points = np.abs(np.arange(size)[:, None] + np.arange(-radius, radius + 1))
    points = np.where(points > size - 1, 2 * (size - 1) - points, points)
    weights = np.zeros((size, size))
    np.add.at(weights, (np.arange(size)[:, None], points), kernel / kernel.sum())
    return weights.astype(np.float32)
