"""PSNR, SSIM and LPIPS per image, and the protocols that published figures were computed by."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.data.images import to_float, to_uint8


def psnr(a: jax.Array, b: jax.Array, *, least_error: float = 0.0) -> jax.Array:
    """20 log10(255 / rmse) of each image, [B], in dB, of uint8 images [B, H, W, C].

    Args:
      least_error: that a mean squared error (of pixels in [0, 1]) is raised to; 0: equal images
        have infinite PSNR.
    """
    error = jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(1, 2, 3))
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, least_error * 255**2))


def ssim(
    a: jax.Array, b: jax.Array, *, low: float = 0.0, high: float = 255.0, border: str = "reflect"
) -> jax.Array:
    """Structural similarity of each image, [B], of images [B, H, W, C] clamped to [low, high].

    Gaussian window 11 x 11 with deviation 1.5, k1 = 0.01, k2 = 0.03, per channel, population
    variances (Wang et al. 2004). The figure depends on where the range lies, not only on its
    width: [-1, 1] gives other values than [0, 1] for the same pixels.

    Args:
      border: "reflect": the whole map is averaged over reflected borders, as torchmetrics does |
        "valid": the part of it that needs none, as scikit-image (gaussian_weights=True,
        use_sample_covariance=False) does.

    Raises:
      ValueError: for another border, or images smaller than what it needs.
    """
    if border not in ("reflect", "valid"):
        raise ValueError(f"ssim: border is {border!r}; use 'reflect' or 'valid'")
    least = 11 if border == "valid" else 6
    if min(a.shape[1:3]) < least:
        raise ValueError(
            f"ssim: images are {a.shape[1]} x {a.shape[2]}; with border {border!r} both sides must "
            f"be at least {least}"
        )
    offsets = np.arange(-5, 6)
    window = np.exp(-np.square(offsets / 1.5) / 2)
    window = jnp.asarray(window / window.sum(), jnp.float32)

    def blur(x):
        if border == "reflect":
            x = jnp.pad(x, ((0, 0), (5, 5), (5, 5), (0, 0)), mode="reflect")
        height, width = x.shape[1] - 10, x.shape[2] - 10
        x = sum(window[i] * x[:, i : i + height] for i in range(11))
        return sum(window[i] * x[:, :, i : i + width] for i in range(11))

    x, y = (jnp.clip(z.astype(jnp.float32), low, high) / (high - low) for z in (a, b))
    mean_x, mean_y = blur(x), blur(y)
    var_x = jnp.maximum(blur(x * x) - mean_x**2, 0)
    var_y = jnp.maximum(blur(y * y) - mean_y**2, 0)
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    map_ = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return jnp.mean(map_, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What PSNR, SSIM and LPIPS of a reconstruction are computed on; PSNR always on uint8.

    Attributes:
      quantiser: of the reconstruction, a name of `data.images.QUANTISERS`.
      on: "float": SSIM and LPIPS see the reconstruction as the decoder gave it, SSIM clamped to
        [-1, 1] and with that range, LPIPS not clamped | "uint8": both see quantised pixels, SSIM
        in [0, 1].
      least_error: see `psnr`.
    """

    quantiser: str
    on: str
    least_error: float


PROTOCOLS = {
    # LightningDiT's evaluate_tokenizer.py, which GAE's tables are assumed to follow [inferred]
    "lightningdit_recon": Protocol("floor128", "float", 0.0),
    "rae_recon": Protocol("trunc255", "uint8", 1e-10),
}


def reconstruction_scores(
    protocol: str,
    images: jax.Array,
    found: jax.Array,
    *,
    lpips: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scores of each image, and the pixels that rFID is to see; traceable.

    Args:
      protocol: a name of `PROTOCOLS`.
      images: uint8 [B, H, W, 3], what was encoded.
      found: the decoder's output [B, H, W, 3], about [-1, 1].
      lpips: distances [B] of images in [-1, 1]; None leaves LPIPS out.

    Returns:
      ({"psnr", "ssim", "lpips": [B] float32}, uint8 [B, H, W, 3]).
    """
    rules = PROTOCOLS[protocol]
    pixels = to_uint8(found, rules.quantiser)
    scores = {"psnr": psnr(pixels, images, least_error=rules.least_error)}
    real = to_float(images)
    if rules.on == "float":
        seen = found.astype(jnp.float32)
        scores["ssim"] = ssim(seen, real, low=-1.0, high=1.0)
    else:
        seen = to_float(pixels)
        scores["ssim"] = ssim(pixels, images)
    if lpips is not None:
        scores["lpips"] = lpips(seen, real)
    return scores, pixels
