"""PSNR, SSIM, quantisers and crops against scikit-image, torchmetrics and torchvision.

``golden/reconstruction.safetensors`` holds what torchmetrics 1.9.0 and torchvision 0.28.0 gave
(``golden/make_reconstruction.py``).
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gae_jax.data.images import CROPS, QUANTISERS, lightningdit_crop, to_float, to_uint8
from gae_jax.evaluation.reconstruction import PROTOCOLS, psnr, reconstruction_scores, ssim

GOLDEN = load_file(Path(__file__).parent / "golden" / "reconstruction.safetensors")


def noisy_pair(size=40):
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (3, size // 4, size // 4, 3)).repeat(4, 1).repeat(4, 2)
    noisy = np.clip(clean + rng.normal(0, 12, clean.shape), 0, 255)
    return clean.astype(np.uint8), noisy.astype(np.uint8)


def skimage_ssim(x, y, **more):
    return structural_similarity(
        x, y, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False, **more
    )


def test_psnr_is_scikit_images_of_each_image():
    a, b = noisy_pair()
    expected = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-6)
    assert np.isinf(psnr(a, a)).all()
    np.testing.assert_allclose(psnr(a, a, least_error=1e-10), 100, rtol=1e-6)


def test_the_mean_of_psnrs_is_not_that_of_the_mean_error():
    """torchmetrics pools the error over a batch first."""
    pixels = to_uint8(GOLDEN["found"])
    pooled = float(GOLDEN["psnr_of_all"][0])
    error = np.mean((np.asarray(pixels, np.float64) - GOLDEN["images"]) ** 2)
    np.testing.assert_allclose(10 * np.log10(255**2 / error), pooled, rtol=1e-5)
    each = np.asarray(psnr(pixels, GOLDEN["images"]), np.float64)
    assert each.mean() > pooled + 1e-4  # Jensen


def test_ssim_is_torchmetrics():
    real = to_float(GOLDEN["images"])
    signed = ssim(GOLDEN["found"], real, low=-1.0, high=1.0)
    np.testing.assert_allclose(signed, GOLDEN["ssim_signed"], atol=5e-6)
    unit = ssim(to_uint8(GOLDEN["found"]), GOLDEN["images"])
    np.testing.assert_allclose(unit, GOLDEN["ssim_unit"], atol=5e-6)
    assert np.abs(np.asarray(signed) - np.asarray(unit)).min() > 1e-3, "the range matters"


def test_ssim_without_borders_is_scikit_images():
    a, b = noisy_pair()
    expected = [skimage_ssim(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b, border="valid"), expected, atol=1e-6)
    assert np.abs(np.asarray(ssim(a, b)) - expected).max() > 1e-5


def test_ssim_refuses_what_it_cannot_do():
    small = np.zeros((1, 8, 8, 3), np.uint8)
    assert ssim(small, small).shape == (1,)
    with pytest.raises(ValueError, match="8 x 8; with border 'valid' both sides must be"):
        ssim(small, small, border="valid")
    with pytest.raises(ValueError, match="border is 'zero'"):
        ssim(small, small, border="zero")


@pytest.mark.parametrize(("name", "lost", "bias"), [("floor128", 0, 0), ("round", 0, 0)])
def test_quantisers_that_return_every_level(name, lost, bias):
    levels = np.arange(256, dtype=np.uint8)
    found = np.asarray(to_uint8(to_float(levels), name), int)
    assert (found != levels).sum() == lost
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 3.0]), name), [0, 255])


def test_the_truncating_quantiser_is_darker():
    """RAE's, as the spec of evaluation measured it: 63 levels lost, half a level of bias."""
    levels = np.arange(256, dtype=np.uint8)
    assert (np.asarray(to_uint8(to_float(levels), "trunc255")) != levels).sum() == 63
    x = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    exact = (x.astype(np.float64) + 1) / 2 * 255
    bias = {name: np.mean(np.asarray(to_uint8(x, name)) - exact) for name in QUANTISERS}
    np.testing.assert_allclose(bias["trunc255"], -0.5, atol=0.01)
    assert max(abs(bias["floor128"]), abs(bias["round"])) < 0.01


def test_half_precision_is_widened_before_it_is_quantised():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, 4_000), jnp.bfloat16)
    wide = np.clip(127.5 * np.asarray(x, np.float32) + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(x), wide)
    narrow = jnp.clip(127.5 * x + 128, 0, 255).astype(jnp.uint8)
    assert np.mean(np.asarray(narrow) != wide) > 0.2


@pytest.mark.parametrize("name", ["wide", "tall", "small"])
def test_lightningdits_crop_is_torchvisions(name):
    photo = Image.fromarray(GOLDEN[f"{name}_photo"])
    found = lightningdit_crop(photo, 32)
    np.testing.assert_allclose(found, GOLDEN[f"{name}_crop"], atol=1e-5)
    pixels = CROPS["lightningdit"](photo, 32)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - (found + 1) * 127.5).max() <= 0.5 + 1e-3


def test_the_adm_crop_is_pils():
    """As guided-diffusion's center_crop_arr: halve by boxes, then bicubic, then the middle."""
    photo = Image.fromarray(GOLDEN["tall_photo"])  # 150 x 67: halved once
    half = photo.resize((33, 75), Image.Resampling.BOX)
    scale = 32 / 33
    small = half.resize((round(33 * scale), round(75 * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(small)
    top = (array.shape[0] - 32) // 2
    np.testing.assert_array_equal(CROPS["adm"](photo, 32), array[top : top + 32])


def test_protocols_look_at_what_they_say():
    """LightningDiT's SSIM and LPIPS see the decoder's floats, RAE's the truncated pixels."""
    images, found = GOLDEN["images"], GOLDEN["found"]
    seen = {}

    def distance(a, b):
        seen[name] = np.asarray(a)
        return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))

    for name in PROTOCOLS:
        scores, pixels = reconstruction_scores(name, images, found, lpips=distance)
        assert set(scores) == {"psnr", "ssim", "lpips"}
        np.testing.assert_array_equal(pixels, to_uint8(found, PROTOCOLS[name].quantiser))
    np.testing.assert_array_equal(seen["lightningdit_recon"], found)
    assert np.abs(seen["rae_recon"]).max() <= 1 < np.abs(found).max()
    np.testing.assert_allclose(
        reconstruction_scores("lightningdit_recon", images, found)[0]["ssim"],
        GOLDEN["ssim_signed"],
        atol=5e-6,
    )
    perfect, _ = reconstruction_scores("rae_recon", images, to_float(images) + 1e-3)
    assert np.isfinite(perfect["psnr"]).all()
