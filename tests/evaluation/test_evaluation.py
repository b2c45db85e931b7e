"""The judge of digits, probes and the Frechet distance against closed forms."""

import jax
import numpy as np
import pytest

from gae_jax.evaluation.frechet import frechet_distance
from gae_jax.evaluation.judge import Judge, small_grey
from gae_jax.evaluation.probe import linear_probe, pixel_probe
from gae_jax.run.generation_judge import judge_samples


@pytest.mark.parametrize("count", [40, 20_000])
def test_frechet_distance_of_gaussians(count):
    """Both forms (few and many samples) against the closed form of the sample moments."""
    rng = np.random.default_rng(0)
    d = 50
    a = rng.normal(0, 1, (count, d))
    b = rng.normal(0.5, 2, (count, d))
    if count > d:
        expected = d * (0.25 + 1)  # |mu|^2 + (1 - 2)^2 per dimension
        np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=0.02)
    # a shift changes the distance by the shift alone, exactly
    np.testing.assert_allclose(frechet_distance(a, a + 2), 4 * d, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(a, a), 0, atol=1e-5)
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-6)


def test_both_forms_of_the_frechet_distance_agree():
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(8, 8))
    a, b = rng.normal(size=(300, 8)) @ mix, rng.normal(1, 1, size=(200, 8))
    from scipy.linalg import sqrtm

    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)


def test_probes_find_what_is_linear():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2, 2, 3))
    y = (x[:, 0, 0, 0] > 0).astype(int)
    train, test = (x[:300], y[:300]), (x[300:], y[300:])
    assert linear_probe(train, test) > 0.9
    assert linear_probe(train, (x[300:], rng.permutation(y[300:]))) < 0.7
    assert pixel_probe(train, test, 12) > 0.9


@pytest.mark.filterwarnings("error")
def test_probes_of_images_that_are_all_the_same_are_at_chance():
    same, labels = np.full((8, 16, 16, 3), 90, np.uint8), np.arange(8) % 2
    assert linear_probe((same, labels), (same, labels)) == 0.5
    assert pixel_probe((same, labels), (same, labels), 12) == 0.5


@pytest.mark.parametrize("edge", [4, 7])
def test_the_judge_sees_images_smaller_than_its_blocks(edge):
    dark, bright = (
        np.zeros((4, edge, edge, 3), np.uint8),
        np.full((4, edge, edge, 3), 200, np.uint8),
    )
    images, labels = np.concatenate([dark, bright]), np.repeat([0, 1], 4)
    assert small_grey(images).shape == (8, edge * edge)
    assert np.all(Judge(images, labels).predict(images) == labels)


def test_a_set_of_one_image_is_judged_without_a_distance():
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2
    images[1::2] = 200
    figures = judge_samples(Judge(images, labels), images[:1], labels[:1], images)
    assert figures["accuracy"] == 1
    assert "fd" not in figures


def test_small_grey_averages_blocks():
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[0, :2, :2] = 255
    grey = small_grey(image)
    assert grey.shape == (1, 64)
    np.testing.assert_allclose(grey[0, :2], [1, 0])


def test_the_judge_knows_digits():
    from gae_jax.data.pipeline import ImageData

    data = ImageData("digits", "", 0.2, 32, "center", False, "error", 2)
    sets = []
    for split in ("train", "holdout"):
        batches = list(data.ordered(data.source(split), 256))
        valid = np.concatenate([b["valid"] for b in batches])
        sets.append(
            [np.concatenate([b[key] for b in batches])[valid] for key in ("image", "label")]
        )
    judge = Judge(*sets[0])
    assert (judge.predict(sets[1][0]) == sets[1][1]).mean() > 0.95
    features = judge.features(sets[1][0])
    assert features.shape == (len(sets[1][1]), 128)
    extractor = judge.extractor()
    traced = jax.jit(extractor.run)(extractor.arrays, sets[1][0])["pool"]
    np.testing.assert_allclose(traced, features, rtol=1e-4, atol=1e-4)
    noise = np.random.default_rng(0).integers(0, 256, sets[1][0].shape).astype(np.uint8)
    assert (judge.predict(noise) == sets[1][1]).mean() < 0.3
