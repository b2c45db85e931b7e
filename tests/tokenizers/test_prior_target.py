"""PAE's structural target: against the same done at the image's resolution, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from gae_jax.runtime.mesh import make_mesh, put_batch
from gae_jax.tokenizers import pae_target
from gae_jax.tokenizers.pae_target import structural_target

GRID, SIZE, WIDTH = 4, 16, 5


def draw(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


FEATURES = draw(0, (2, GRID**2, WIDTH))
IMAGES = np.tanh(draw(1, (2, SIZE, SIZE, 3)))


def bilinear_up(tokens):
    wide = jax.image.resize(tokens.reshape(2, GRID, GRID, WIDTH), (2, SIZE, SIZE, WIDTH), "linear")
    return np.asarray(wide, np.float64)


def guided_up(tokens, *, reach=1.0, colour=0.1):
    """Pixel by pixel."""
    patch, images = SIZE // GRID, (IMAGES.astype(np.float64) + 1) / 2
    means = images.reshape(2, GRID, patch, GRID, patch, 3).mean(axis=(2, 4))
    found = np.zeros((2, SIZE, SIZE, WIDTH))
    for b, y, x in np.ndindex(2, SIZE, SIZE):
        weights = np.zeros((GRID, GRID))
        for i, j in np.ndindex(GRID, GRID):
            d = ((y + 0.5) / patch - i - 0.5) ** 2 + ((x + 0.5) / patch - j - 0.5) ** 2
            c = np.sum((images[b, y, x] - means[b, i, j]) ** 2)
            weights[i, j] = np.exp(-d / (2 * reach**2) - c / (2 * colour**2))
        found[b, y, x] = (weights / weights.sum()).ravel() @ tokens[b]
    return found


def low_passed(wide, low_pass, strength=0.4):
    if low_pass == "blur":  # half a token of 4 pixels; scipy's "mirror" repeats no edge
        sigmas = (0, SIZE / GRID / 2, SIZE / GRID / 2, 0)
        blurred = gaussian_filter(wide, sigmas, mode="mirror", truncate=4.0)
        return (1 - strength) * wide + strength * blurred
    mean = wide.mean(axis=(1, 2), keepdims=True)
    return (wide - strength * mean) / np.sqrt(wide.var(axis=(1, 2), keepdims=True) + 1e-6)


def down(wide):
    """Bilinear without antialias: the mean of the four pixels in the middle of a token."""
    parts = wide.reshape(2, GRID, 4, GRID, 4, WIDTH)[:, :, 1:3, :, 1:3]
    return parts.mean(axis=(2, 4)).reshape(2, GRID**2, WIDTH)


@pytest.mark.parametrize("low_pass", pae_target.LOW_PASSES)
@pytest.mark.parametrize(
    ("reference", "up"), [("bilinear", bilinear_up), ("image_guided", guided_up)]
)
def test_the_target_is_that_of_the_image_s_resolution(reference, up, low_pass):
    found = structural_target(FEATURES, IMAGES, reference=reference, low_pass=low_pass)
    np.testing.assert_allclose(found, down(low_passed(up(FEATURES), low_pass)), atol=2e-5)


def test_raw_tokens_are_left_alone():
    found = structural_target(FEATURES, IMAGES, reference="raw")
    np.testing.assert_array_equal(found, FEATURES)


def test_the_image_guides():
    """Tokens of one colour are mixed, those of another stay out."""
    image = np.full((1, SIZE, SIZE, 3), -1, np.float32)
    image[:, :, SIZE // 2 :] = 1
    tokens = np.zeros((1, GRID, GRID, 1), np.float32)
    tokens[:, :, GRID // 2 :] = 1
    found = structural_target(tokens.reshape(1, -1, 1), image, strength=0.0)
    np.testing.assert_allclose(found.reshape(1, GRID, GRID, 1), tokens, atol=1e-6)
    other = structural_target(tokens.reshape(1, -1, 1), 0 * image, strength=0.0)
    assert 0.1 < other.reshape(GRID, GRID)[1, 1] < 0.4
    noise = draw(2, (1, GRID**2, 1))  # inside of one colour neighbours are averaged
    assert np.std(structural_target(noise, image, strength=0.0)) < 0.7 * np.std(noise)


def test_constant_tokens_stay_and_strength_smooths():
    same = np.ones((2, GRID**2, 1), np.float32)
    for reference in ("bilinear", "image_guided"):
        np.testing.assert_allclose(
            structural_target(same, IMAGES, reference=reference), 1, rtol=1e-5
        )
    spread = [
        np.std(structural_target(FEATURES, IMAGES, reference="bilinear", strength=s))
        for s in (0.0, 0.4, 1.0)
    ]
    assert spread[0] > spread[1] > spread[2]


def test_matrices():
    up = pae_target.linear_matrix(4, 16)
    np.testing.assert_allclose(up.sum(axis=1), 1, rtol=1e-6)
    want = jax.image.resize(jnp.eye(4), (16, 4), "linear")
    np.testing.assert_allclose(up, want, atol=1e-6)
    np.testing.assert_array_equal(pae_target.linear_matrix(5, 5), np.eye(5))
    np.testing.assert_allclose(pae_target.gauss_matrix(16, 2.0).sum(axis=1), 1, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="reference is 'anyup'; use one of raw, bilinear, image_g"):
        structural_target(FEATURES, IMAGES, reference="anyup")
    with pytest.raises(ValueError, match="low_pass is 'off'; use one of blur, zscore"):
        structural_target(FEATURES, IMAGES, low_pass="off")
    with pytest.raises(ValueError, match=r"16 tokens do not form a square grid .* of 18 pixels"):
        structural_target(FEATURES, np.zeros((2, 18, 18, 3)))


def test_devices_share_the_images():
    """Split over eight devices it is the same, and stays split: no device has all upsamplings."""
    features, images = (np.concatenate([x] * 4) for x in (FEATURES, IMAGES))
    mesh = make_mesh(devices=jax.devices())
    run = jax.jit(structural_target).lower(*put_batch((features, images), mesh)).compile()
    found = run(*put_batch((features, images), mesh))
    np.testing.assert_allclose(found[:2], structural_target(FEATURES, IMAGES), atol=1e-5)
    assert "all-gather" not in run.as_text()
    assert found.sharding.shard_shape(found.shape) == (1, GRID**2, WIDTH)
