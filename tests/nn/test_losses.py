"""Loss terms against hand-made values, and finite where they could blow up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.nn import losses


def test_hinge():
    real, fake = jnp.array([2.0, 0.0]), jnp.array([-2.0, 1.0])
    np.testing.assert_allclose(losses.hinge_discriminator(real, fake), 0.5 * (0.5 + 1.0))
    np.testing.assert_allclose(losses.hinge_generator(fake), 0.5)


def test_vanilla():
    real, fake = jnp.array([0.0, 3.0]), jnp.array([0.0, -1.0])
    expected = 0.5 * np.mean([np.log(2), np.log1p(np.exp(-3))])
    expected += 0.5 * np.mean([np.log(2), np.log1p(np.exp(-1))])
    np.testing.assert_allclose(losses.vanilla_discriminator(real, fake), expected, rtol=1e-6)
    far = losses.vanilla_discriminator(jnp.array([-1e4]), jnp.array([1e4]))
    np.testing.assert_allclose(far, 1e4)  # where log(1 + exp(x)) is infinite


def test_adaptive_weight_is_a_clipped_constant():
    np.testing.assert_allclose(losses.adaptive_weight(jnp.array(2.0), jnp.array(0.5)), 2 / 0.5001)
    assert losses.adaptive_weight(jnp.array(2.0), jnp.array(0.0)) == 1e4
    assert losses.adaptive_weight(jnp.array(0.0), jnp.array(0.0)) == 0
    small = losses.adaptive_weight(jnp.array(2.0), jnp.array(0.0), eps=0.5, largest=3.0)
    assert small == 3
    np.testing.assert_array_equal(
        jax.grad(losses.adaptive_weight, (0, 1))(jnp.array(2.0), jnp.array(0.5)), (0, 0)
    )


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


def random_tokens(count=2):
    return jax.random.normal(jax.random.key(0), (count, 2, 5, 8))


def test_vf_loss_is_zero_within_its_margins():
    found, target = random_tokens()
    assert losses.vf_loss(found, 3 * found) == 0
    assert losses.vf_loss(found, target, cos_margin=2.0, distance_margin=2.0) == 0


def test_vf_loss_by_hand():
    """Two tokens: both of the target point along x, one of those found along y."""
    target = jnp.array([[[1.0, 0.0], [2.0, 0.0]]])
    found = jnp.array([[[3.0, 0.0], [0.0, 5.0]]])
    # cosines (1, 0) and the margin 0.5; S is the identity instead of all ones, margin 0.25
    apart, unlike = (0 + 0.5) / 2, 2 * 0.75 / 4
    np.testing.assert_allclose(losses.vf_loss(found, target), apart + unlike, rtol=1e-6)
    weighted = losses.vf_loss(found, target, cos_weight=0.1, distance_weight=10.0)
    np.testing.assert_allclose(weighted, 0.1 * apart + 10 * unlike, rtol=1e-6)
    wide = losses.vf_loss(found, target, cos_margin=0.75, distance_margin=0.5)
    np.testing.assert_allclose(wide, 0.25 / 2 + 2 * 0.5 / 4, rtol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_vf_loss_has_a_gradient_at_zero_tokens(which):
    tokens = random_tokens()
    tokens = tokens.at[which, 0, :2].set(0).at[1 - which, 1, :3].set(0)
    value, grads = jax.value_and_grad(losses.vf_loss, (0, 1))(*tokens)
    assert jnp.isfinite(value)
    assert all(jnp.all(jnp.isfinite(grad)) for grad in grads)


def test_kl_of_a_gaussian():
    mean, logvar = jnp.array([0.0, 2.0]), jnp.array([0.0, np.log(4.0)])
    expected = 0.5 * np.mean([0, 4 + 4 - 1 - np.log(4)])
    np.testing.assert_allclose(losses.gaussian_kl(mean, logvar), expected, rtol=1e-6)
    zero = jnp.zeros(1)
    low, high = (losses.gaussian_kl(zero, jnp.array([x])) for x in (-1e6, 1e6))
    np.testing.assert_allclose([low, high], [14.5, 0.5 * (np.exp(20) - 21)], rtol=1e-6)
