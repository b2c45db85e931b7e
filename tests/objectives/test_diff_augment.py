"""What a discriminator's images go through."""

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.objectives import diff_augment

KEY = jax.random.key(0)


def test_images_are_moved_by_an_eighth_at_most_each_by_its_own():
    point = jnp.zeros((64, 16, 16, 3)).at[:, 8, 8].set(1.0)
    found = np.asarray(diff_augment.translation(point, KEY))
    images, rows, columns, _ = np.nonzero(found)
    assert len(images) == 64 * 3  # nothing is lost or doubled
    moves = np.stack([rows, columns]) - 8
    assert (moves.min(), moves.max()) == (-2, 2)
    assert len({*zip(*moves, strict=True)}) > 15
    corner = diff_augment.translation(jnp.ones((64, 16, 16, 3)), KEY)
    assert 0 < np.mean(np.asarray(corner) == 0) < 0.3  # zeros come in


def test_colours_change_within_their_ranges():
    images = jax.random.uniform(KEY, (400, 4, 4, 3), minval=-1)
    flat = np.reshape(diff_augment.brightness(images, KEY) - images, (400, -1))
    np.testing.assert_allclose(flat, flat[:, :1] * np.ones_like(flat), atol=1e-6)
    np.testing.assert_allclose([flat.min(), flat.max()], [-0.5, 0.5], atol=0.01)

    def ratios(found, mean):
        scale = (found - mean) / (images - mean)
        return np.median(np.reshape(scale, (400, -1)), axis=1)

    grey, mean = images.mean(-1, keepdims=True), images.mean((1, 2, 3), keepdims=True)
    found = ratios(diff_augment.saturation(images, KEY), grey)
    np.testing.assert_allclose([found.min(), found.max()], [0, 2], atol=0.02)
    found = ratios(diff_augment.contrast(images, KEY), mean)
    np.testing.assert_allclose([found.min(), found.max()], [0.5, 1.5], atol=0.01)


def test_names_are_applied_in_turn_and_none_is_none():
    images = jax.random.uniform(KEY, (3, 8, 8, 3), minval=-1)
    assert diff_augment.augment(images, KEY, ()) is images
    both = diff_augment.augment(images, KEY, ("contrast", "translation"))
    first = diff_augment.contrast(images, jax.random.fold_in(KEY, 0))
    want = diff_augment.translation(first, jax.random.fold_in(KEY, 1))
    np.testing.assert_allclose(both, want, atol=1e-6)


def test_gradients_pass_through():
    names = tuple(diff_augment.OPERATIONS)
    images = jnp.ones((2, 8, 8, 3)) * jnp.linspace(-1, 1, 8)[:, None, None]
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(diff_augment.augment(x, KEY, names))))(images)
    assert np.all(np.isfinite(gradient))
    assert np.mean(np.asarray(gradient) != 0) > 0.5
