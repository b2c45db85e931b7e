"""PSNR, SSIM and LPIPS per image, and the frozen protocols under which they are published."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.nn.pixels import to_float, to_uint8

RADIUS = 5  # of SSIM's window: int(3.5 * 1.5 + 0.5)


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a published reconstruction metric is computed on. Not to be edited: add another one.

    A mean over images is one of per-image scores; LightningDiT's mean over batches of 8 is the
    same where all batches are full. Which latent is decoded, the posterior's mode or a sample of
    it (LightningDiT's script), is no part of a preset: record it with the scores.

    Attributes:
      name: of the protocol, to be printed with every figure.
      crop: of the encoder's input, PSNR's target and rFID's reference, in `data.images.CROPS`.
      quantiser: of the reconstruction, in `data.images.QUANTISERS`. A target in [-1, 1] is always
        quantised by "floor128", which gives every level back.
      ssim, lpips: "float" compares the unquantised arrays in [-1, 1], "uint8" the quantised ones,
        for LPIPS mapped to [-1, 1]. LPIPS clamps neither.
      ssim_range: the dynamic range, to which SSIM clamps what it compares. SSIM is not the same
        for [-1, 1] as for [0, 1]: its luminance term knows where zero is.
      least_error: PSNR's lower bound of the mean squared error, of pixels in [0, 1].
      front_end: of rFID, in `pretrained.inception.FRONT_ENDS`.
    """

    name: str
    crop: str
    quantiser: str
    ssim: Literal["float", "uint8"]
    ssim_range: tuple[float, float]
    lpips: Literal["float", "uint8"]
    least_error: float
    front_end: str


PRESETS = {
    preset.name: preset
    for preset in (
        # evaluate_tokenizer.py of LightningDiT (2725fed); of GAE's tables by inference, as its
        # authors released no script: their row of VA-VAE is LightningDiT's
        Preset(
            name="lightningdit_recon",
            crop="lightningdit",
            quantiser="floor128",
            ssim="float",
            ssim_range=(-1.0, 1.0),
            lpips="float",
            least_error=0.0,
            front_end="pytorch_fid",
        ),
        # RAE (a4d18c4)
        Preset(
            name="rae_recon",
            crop="adm",
            quantiser="trunc255",
            ssim="uint8",
            ssim_range=(0.0, 255.0),
            lpips="uint8",
            least_error=1e-10,
            front_end="tf",
        ),
    )
}


def psnr(a: jax.Array, b: jax.Array, *, least_error: float = 0.0) -> jax.Array:
    """Compute 20 log10(255 / rmse) of each image, [B], in dB; infinite for equal images.

    Args:
      a, b: uint8 images [B, H, W, C] of one crop.
      least_error: the smallest mean squared error that counts, of pixels in [0, 1]: 1e-10 gives
        equal images 100 dB.
    """
    _check_shapes(a, b)
    error = jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(1, 2, 3))
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, least_error * 255.0**2))


def ssim(a: jax.Array, b: jax.Array, low: float = 0.0, high: float = 255.0) -> jax.Array:
    """Compute the structural similarity of each image, [B] (Wang et al. 2004).

    Gaussian window 11 x 11 with std 1.5, k1 = 0.01, k2 = 0.03, per channel, population
    moments, variances not below 0; images are padded by reflection, and the map of the full size
    and its channels are averaged, as torchmetrics does.

    Args:
      a, b: images [B, H, W, C] of one crop, clamped to [low, high].
      low, high: the dynamic range. Images in [-1, 1] have another SSIM than the same in [0, 1].

    Raises:
      ValueError: if the shapes differ, or the images are too small for the window.
    """
    _check_shapes(a, b)
    if min(a.shape[1:3]) <= RADIUS:  # reflection takes pixels at up to RADIUS from the edge
        raise ValueError(
            f"SSIM needs sides of at least {RADIUS + 1} pixels, got images {list(a.shape)}"
        )
    offsets = np.arange(-RADIUS, RADIUS + 1)
    weights = np.exp(-np.square(offsets / 1.5) / 2)
    window = jnp.asarray(weights / weights.sum(), jnp.float32)

    def blur(x):
        height, width = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0)), mode="reflect")
        x = sum(window[i] * x[:, i : i + height] for i in range(len(window)))
        return sum(window[i] * x[:, :, i : i + width] for i in range(len(window)))

    # SSIM does not depend on the unit of the pixels
    x, y = (jnp.clip(image.astype(jnp.float32), low, high) / (high - low) for image in (a, b))
    mean_x, mean_y = blur(x), blur(y)
    var_x = jnp.maximum(blur(x * x) - mean_x**2, 0)
    var_y = jnp.maximum(blur(y * y) - mean_y**2, 0)
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    map_ = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return jnp.mean(map_, axis=(1, 2, 3))


def reconstruction_scores(
    preset: Preset,
    target: jax.Array,
    reconstruction: jax.Array,
    lpips: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Compute the scores of each image under a preset, and the pixels for rFID; can be jitted.

    Means are the caller's: in float64 on the host, without padded rows.

    Args:
      preset: of `PRESETS`; static where this is jitted.
      target: [B, H, W, 3] as the preset's crop left them: uint8, or floats in about [-1, 1].
      reconstruction: [B, H, W, 3], the decoder's output in about [-1, 1], not clamped.
      lpips: distances [B] of two batches in [-1, 1] (`pretrained.lpips.LPIPS`); None leaves them
        out.

    Returns:
      ({"psnr": dB, "ssim", "lpips": float32 [B]}, uint8 reconstruction [B, H, W, 3]).

    Raises:
      ValueError: if the shapes differ or the reconstruction is not of floats.
    """
    if not jnp.issubdtype(reconstruction.dtype, jnp.floating):
        raise ValueError(
            f"the reconstruction is {reconstruction.dtype}; pass the decoder's output in [-1, 1], "
            "before any quantiser"
        )
    if target.dtype == jnp.uint8:
        real = {"uint8": target, "float": to_float(target)}
    else:
        real = {"uint8": to_uint8(target), "float": target.astype(jnp.float32)}
    pixels = to_uint8(reconstruction, preset.quantiser)
    restored = {"uint8": pixels, "float": reconstruction.astype(jnp.float32)}
    scores = {
        "psnr": psnr(pixels, real["uint8"], least_error=preset.least_error),
        "ssim": ssim(restored[preset.ssim], real[preset.ssim], *preset.ssim_range),
    }
    if lpips is not None:
        pair = (restored[preset.lpips], real[preset.lpips])
        scores["lpips"] = lpips(*map(to_float, pair) if preset.lpips == "uint8" else pair)
    return scores, pixels


def _check_shapes(a, b):
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(
            f"the images must have one shape [B, H, W, C], not {list(a.shape)} and {list(b.shape)}"
        )
