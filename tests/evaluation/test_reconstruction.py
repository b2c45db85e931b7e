"""PSNR, SSIM and LPIPS against scikit-image, torchmetrics and lpips, and the presets.

tests/golden/make_reconstruction.py made what the last two say.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from scipy.ndimage import correlate1d
from skimage import data as photographs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_metric_parity import channels_last, config_of, formula, load, lpips_shape, lpips_weight

from gae_jax.data.images import CROPS
from gae_jax.evaluation.reconstruction import PRESETS, psnr, reconstruction_scores, ssim
from gae_jax.interop import metric_tables
from gae_jax.nn.pixels import QUANTISERS, to_float, to_uint8
from gae_jax.pretrained.inception import FRONT_ENDS

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(FOLDER / "reconstruction.safetensors")
CLEAN = GOLDEN["ssim.clean"]
RECONSTRUCTION = GOLDEN["ssim.reconstruction"].astype(np.float32)  # partly beyond [-1, 1]


def noisy_pair(size=40):
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (3, size // 4, size // 4, 3)).repeat(4, 1).repeat(4, 2)
    noisy = np.clip(clean + rng.normal(0, 12, clean.shape), 0, 255)
    return clean.astype(np.uint8), noisy.astype(np.uint8)


def photograph_pair(size=256):
    """Two photographs of ``size`` pixels and the same with noise of 10 and 30 levels."""
    clean = np.stack(
        [image()[:size, :size] for image in (photographs.astronaut, photographs.coffee)]
    )
    noise = (
        np.random.default_rng(0).normal(0, 1, clean.shape) * np.array([10, 30])[:, None, None, None]
    )
    return clean, np.clip(clean + noise, 0, 255).astype(np.uint8)


def exact_ssim(a, b, low, high, *, border="reflect"):
    """The definition in float64."""
    x, y = (np.clip(image.astype(np.float64), low, high) for image in (a, b))
    window = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    window /= window.sum()

    def blur(z):
        z = correlate1d(
            correlate1d(z, window, axis=1, mode="mirror"), window, axis=2, mode="mirror"
        )
        return z if border == "reflect" else z[:, 5:-5, 5:-5]

    c1, c2 = (0.01 * (high - low)) ** 2, (0.03 * (high - low)) ** 2
    u, v = blur(x), blur(y)
    cov = blur(x * y) - u * v
    spread = blur(x * x) - u**2 + blur(y * y) - v**2
    found = (2 * u * v + c1) * (2 * cov + c2) / ((u**2 + v**2 + c1) * (spread + c2))
    return found.mean(axis=(1, 2, 3))


@pytest.mark.parametrize("pair", [noisy_pair, photograph_pair])
def test_psnr_is_scikit_images(pair):
    a, b = pair()
    expected = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.jit(psnr)(a, b), expected, rtol=0, atol=1e-5)


def test_psnr_of_equal_images():
    assert np.isinf(psnr(CLEAN, CLEAN)).all()
    np.testing.assert_allclose(psnr(CLEAN, CLEAN, least_error=1e-10), 100, rtol=1e-6)
    one_level = np.where(CLEAN == 0, CLEAN + 1, CLEAN - 1)
    np.testing.assert_allclose(
        psnr(one_level, CLEAN, least_error=1e-10), 20 * np.log10(255), rtol=1e-6
    )


def test_a_mean_of_psnrs_is_not_that_of_the_pooled_error():
    """torchmetrics' PSNR pools the error of the batch; papers report the mean over images."""
    scores = np.asarray(psnr(to_uint8(RECONSTRUCTION), CLEAN), np.float64)
    pooled = -10 * np.log10(np.mean(10 ** (-scores / 10)))
    np.testing.assert_allclose(pooled, GOLDEN["psnr.pooled"][0], atol=1e-4)
    assert scores.mean() - pooled > 1


def test_ssim_is_torchmetrics():
    """Of floats beyond the range (-1, 1), and of levels in [0, 1]."""
    got = ssim(RECONSTRUCTION, to_float(CLEAN), -1, 1)
    np.testing.assert_allclose(got, GOLDEN["ssim.signed"], rtol=0, atol=5e-6)
    got = ssim(to_uint8(RECONSTRUCTION), CLEAN)
    np.testing.assert_allclose(got, GOLDEN["ssim.unit"], rtol=0, atol=5e-5)  # its fp32: 2e-5


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 255), (-1.5, 0.5)])
def test_ssim_is_its_definition(low, high):
    pairs = {
        (0, 255): (np.asarray(to_uint8(RECONSTRUCTION)), CLEAN),
        (-1, 1): (RECONSTRUCTION, np.asarray(to_float(CLEAN))),
        (-1.5, 0.5): (RECONSTRUCTION, np.asarray(to_float(CLEAN))),
    }
    a, b = pairs[low, high]
    want = exact_ssim(a, b, low, high)
    np.testing.assert_allclose(ssim(a, b, low, high), want, rtol=0, atol=4e-6)
    assert np.all(np.abs(ssim(a, a, low, high) - 1) < 1e-6)


def test_ssim_without_its_border_is_scikit_images():
    """scikit-image averages where the window fits; the definition here is checked against it."""
    for clean, noisy in (
        noisy_pair(),
        photograph_pair(96),
        (CLEAN, np.asarray(to_uint8(RECONSTRUCTION))),
    ):
        want = [
            structural_similarity(
                x, y, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False,
                data_range=255,
            )
            for x, y in zip(clean, noisy, strict=True)
        ]  # fmt: skip
        got = exact_ssim(clean, noisy, 0, 255, border="valid")
        np.testing.assert_allclose(got, want, rtol=0, atol=4e-6)
        assert np.max(np.abs(ssim(clean, noisy) - np.array(want))) > 2e-4  # another score


def test_ssim_knows_where_zero_is():
    signed = ssim(to_float(to_uint8(RECONSTRUCTION)), to_float(CLEAN), -1, 1)
    assert np.max(np.abs(signed - ssim(to_uint8(RECONSTRUCTION), CLEAN))) > 4e-3


def test_ssim_and_psnr_refuse_what_they_cannot_compare():
    a = np.zeros((1, 5, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="sides of at least 6 pixels"):
        ssim(a, a)
    for function in (ssim, psnr):
        with pytest.raises(ValueError, match="must have one shape"):
            function(CLEAN, CLEAN[:1])
        with pytest.raises(ValueError, match="must have one shape"):
            function(CLEAN[0], CLEAN[0])


def test_lpips_with_its_own_heads():
    """The trunk of tests/golden/lpips_vgg, whose activations stay near 1, and lpips's heads."""
    config = config_of("lpips_vgg")
    path = FOLDER / "lpips_heads.safetensors"
    with safe_open(path, "numpy") as file:
        facts = file.metadata()
    assert (
        facts["md5"] == "d507d7349b931f0638a25a48a722f98a"
    )  # also of taming-transformers' vgg_lpips
    golden = load_file(path)
    want = golden.pop("distance")
    state = {
        name: lpips_weight(name, formula(i + config["seed"], lpips_shape(name, []))).astype("f4")
        for i, name in enumerate(config["weight_order"])
        if name.startswith("net")
    }
    assert all(np.all(head > 0) for head in golden.values())
    io = load_file(FOLDER / "lpips_vgg.safetensors")
    model = load(metric_tables.LPIPS, state | golden)
    run = nnx.jit(lambda model, a, b: model(a, b))
    got = run(model, channels_last(io["io.a"]), channels_last(io["io.b"]))
    np.testing.assert_allclose(got, want, rtol=5e-6)


def test_presets_are_frozen_and_name_what_there_is():
    assert {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()} == {
        "lightningdit_recon": dict(
            name="lightningdit_recon", crop="lightningdit", quantiser="floor128", ssim="float",
            ssim_range=(-1.0, 1.0), lpips="float", least_error=0.0, front_end="pytorch_fid",
        ),
        "rae_recon": dict(
            name="rae_recon", crop="adm", quantiser="trunc255", ssim="uint8",
            ssim_range=(0.0, 255.0), lpips="uint8", least_error=1e-10, front_end="tf",
        ),
    }  # fmt: skip
    for preset in PRESETS.values():
        assert preset.crop in CROPS
        assert preset.quantiser in QUANTISERS
        assert preset.front_end in FRONT_ENDS
        with pytest.raises(dataclasses.FrozenInstanceError):
            preset.crop = "adm"


def far(a, b):
    """Stands in for LPIPS: the largest values that it is shown."""
    return jnp.max(a, axis=(1, 2, 3)) + 10 * jnp.max(b, axis=(1, 2, 3))


@pytest.mark.parametrize("as_float", [False, True])
def test_scores_of_lightningdit(as_float):
    target = np.asarray(to_float(CLEAN)) if as_float else CLEAN
    run = jax.jit(lambda a, b: reconstruction_scores(PRESETS["lightningdit_recon"], a, b, far))
    scores, pixels = run(target, RECONSTRUCTION)
    levels = np.clip(127.5 * RECONSTRUCTION + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels, levels)
    expected = [peak_signal_noise_ratio(x, y) for x, y in zip(CLEAN, levels, strict=True)]
    np.testing.assert_allclose(scores["psnr"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores["ssim"], GOLDEN["ssim.signed"], rtol=0, atol=5e-6)
    # LPIPS sees the floats, not clamped
    expected = RECONSTRUCTION.max(axis=(1, 2, 3)) + 10 * to_float(CLEAN).max(axis=(1, 2, 3))
    assert RECONSTRUCTION.max() > 1
    np.testing.assert_allclose(scores["lpips"], expected, rtol=1e-6)
    assert {name: value.dtype for name, value in scores.items()} == dict.fromkeys(
        scores, jnp.float32
    )


def test_scores_of_rae():
    run = jax.jit(lambda a, b: reconstruction_scores(PRESETS["rae_recon"], a, b, far))
    scores, pixels = run(CLEAN, RECONSTRUCTION)
    levels = (np.clip((RECONSTRUCTION + 1) / 2, 0, 1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels, levels)
    error = np.square(levels / 255 - CLEAN / 255).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(scores["psnr"], -10 * np.log10(error), rtol=0, atol=1e-5)
    want = exact_ssim(levels / 255, CLEAN / 255, 0, 1)
    np.testing.assert_allclose(scores["ssim"], want, rtol=0, atol=4e-6)
    expected = (levels / 127.5 - 1).max(axis=(1, 2, 3)) + 10 * to_float(CLEAN).max(axis=(1, 2, 3))
    np.testing.assert_allclose(scores["lpips"], expected, rtol=1e-6)
    scores, _ = run(CLEAN[:1], to_float(CLEAN[:1]) + 1e-4)
    np.testing.assert_allclose(scores["psnr"], 100, rtol=1e-6)


def test_lpips_is_left_out_where_it_is_not_given():
    scores, _ = reconstruction_scores(PRESETS["rae_recon"], CLEAN, RECONSTRUCTION)
    assert scores.keys() == {"psnr", "ssim"}


def test_quantised_reconstructions_are_refused():
    with pytest.raises(ValueError, match="before any quantiser"):
        reconstruction_scores(PRESETS["rae_recon"], CLEAN, CLEAN)
