"""`nearest_images`: which real image is closest to a generated one, by cosine similarity."""

import numpy as np
import pytest

from gae_jax.evaluation.nearest import nearest_images


def test_the_nearest_of_all_batches_is_kept():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(23, 5)).astype(np.float32)
    images = np.arange(23, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    queries = 3.0 * features[[17, 2, 9]] + 0.01 * rng.normal(size=(3, 5))
    parts = [(images[a:b], features[a:b]) for a, b in ((0, 10), (10, 20), (20, 23))]
    found, similarity = nearest_images(queries, parts)
    assert found[:, 0, 0, 0].tolist() == [17, 2, 9]
    assert (similarity > 0.99).all()
    cosine = queries @ features.T
    cosine /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(features, axis=1)
    np.testing.assert_allclose(similarity, cosine.max(axis=1), rtol=1e-5)


def test_zeros_and_no_images():
    image, zeros = np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 4))
    assert nearest_images(zeros, [(image, zeros)])[1] == [0]
    with pytest.raises(ValueError, match="no real images"):
        nearest_images(zeros, [])


def test_the_page_of_a_run_shows_them(small_run):
    with np.load(small_run / "evaluate" / "pictures.npz") as file:
        assert file["generated_ode"].shape == file["nearest_ode"].shape
        assert len(file["nearest_ode"]) == 3
    page = (small_run / "report.html").read_text()
    assert page.count("nearest in training") >= 2
    assert "Nearest training images" in page
