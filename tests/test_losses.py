"""Loss terms against hand-made values, and finite where they could blow up."""

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax import losses


def test_hinge():
    real, fake = jnp.array([2.0, 0.0]), jnp.array([-2.0, 1.0])
    np.testing.assert_allclose(losses.hinge_discriminator(real, fake), 0.5 * (0.5 + 1.0))
    np.testing.assert_allclose(losses.hinge_generator(fake), 0.5)


def test_cosine_distance():
    a, b = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[0.0, 2.0], [3.0, 3.0]])
    np.testing.assert_allclose(losses.cosine_distance(a, b), 0.5, atol=1e-6)


def test_cross_entropy_with_smoothing():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    np.testing.assert_allclose(
        losses.cross_entropy(logits, jnp.array([0])), -np.log(0.7), rtol=1e-6
    )
    target = np.array([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    expected = -np.sum(target * np.log([0.7, 0.2, 0.1]))
    smooth = losses.cross_entropy(logits, jnp.array([0]), smoothing=0.1)
    np.testing.assert_allclose(smooth, expected, rtol=1e-6)


def test_feature_distance_ignores_scale_and_has_a_gradient_at_zero():
    maps = [jax.random.normal(jax.random.key(i), (2, 4, 8)) for i in range(3)]
    scaled = [3 * m for m in maps]
    np.testing.assert_allclose(losses.feature_distance(maps, scaled), 0, atol=1e-6)
    opposite = [-m for m in maps]
    np.testing.assert_allclose(losses.feature_distance(maps, opposite), 4, rtol=1e-5)
    grad = jax.grad(lambda x: losses.feature_distance([x], [maps[0]]))(jnp.zeros((2, 4, 8)))
    assert jnp.all(jnp.isfinite(grad))
