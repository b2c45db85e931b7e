"""PAE's prior losses against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.nn.layers import rms_norm
from gae_jax.tokenizers import pae_kind, pae_losses

SHAPE = (3, 4, 4, 32)


def draw(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def latents(seed):
    return rms_norm(draw(seed))


def rotation(seed=0):
    return jnp.asarray(np.linalg.qr(draw(seed, (32, 32)))[0])


def tokens(x):
    return np.asarray(x, np.float64).reshape(3, 16, 32)


def test_structure_is_the_mean_of_squared_differences_of_cosines():
    z, target = draw(0), draw(1)  # not on the sphere: the cosines are of their directions
    grams = []
    for x in (z, target):
        unit = tokens(x) / np.linalg.norm(tokens(x), axis=-1, keepdims=True)
        grams.append(unit @ unit.transpose(0, 2, 1))
    want = np.mean((grams[0] - grams[1]) ** 2)
    np.testing.assert_allclose(pae_losses.structure(z, target), want, rtol=1e-5)
    np.testing.assert_allclose(
        pae_losses.structure(z.reshape(3, 16, 32), target.reshape(3, 16, 32)), want, rtol=1e-5
    )
    # a closed form: two tokens at right angles against two alike
    apart, alike = jnp.eye(2)[None], jnp.ones((1, 2, 2))
    np.testing.assert_allclose(pae_losses.structure(apart, alike), 0.5, rtol=1e-6)


def test_structure_does_not_see_a_rotation_that_semantics_sees():
    z = latents(0)
    turned = z @ rotation()
    for other in (z, turned):
        np.testing.assert_allclose(pae_losses.structure(z, other), 0, atol=1e-10)
    assert pae_losses.semantics(turned, z) > 0.5


def test_structure_is_of_pairs():
    z, target = tokens(latents(0)), tokens(latents(1))
    order = np.random.default_rng(2).permutation(16)
    one = pae_losses.structure(z, target)
    both = pae_losses.structure(z[:, order], target[:, order])
    np.testing.assert_allclose(both, one, rtol=1e-5)
    assert abs(pae_losses.structure(z[:, order], target) - one) > 1e-4


def test_semantics():
    z, target = latents(0), latents(1)

    def one_minus_cosine(a, b):
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return np.mean(1 - np.sum(a * b, axis=-1) / lengths)

    want = one_minus_cosine(tokens(z), tokens(target))
    want += one_minus_cosine(tokens(z).mean(axis=1), tokens(target).mean(axis=1))
    np.testing.assert_allclose(pae_losses.semantics(z, target), want, rtol=1e-5)
    np.testing.assert_allclose(pae_losses.semantics(z, z), 0, atol=1e-6)
    np.testing.assert_allclose(pae_losses.semantics(z, -z), 4, rtol=1e-6)
    # other tokens with the same mean: the pooled term alone is blind to them
    swapped = z[:, ::-1]
    assert pae_losses.semantics(swapped, z) > 0.5


def test_lengths_of_tokens_count_in_the_pooled_term_only():
    z, target = latents(0), latents(1)
    lengths = jnp.exp(draw(2, (*SHAPE[:-1], 1)))
    np.testing.assert_allclose(
        pae_losses.semantics(7 * z, target), pae_losses.semantics(z, target), rtol=1e-5
    )
    single = z[:, :1, :1], target[:, :1, :1]  # one token: both terms are the same
    per_token = pae_losses.semantics(lengths[:, :1, :1] * single[0], single[1])
    np.testing.assert_allclose(per_token, pae_losses.semantics(*single), rtol=1e-5)
    assert abs(pae_losses.semantics(lengths * z, z)) > 1e-3


@pytest.mark.parametrize("term", [pae_losses.structure, pae_losses.semantics])
def test_the_target_has_no_gradient(term):
    found, target = jax.grad(term, argnums=(0, 1))(latents(0), latents(1))
    np.testing.assert_array_equal(target, 0)
    assert jnp.max(jnp.abs(found)) > 0
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.grad(term, (0, 1))(latents(0), latents(0)))


def degrees_between(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    along = np.mean(a * b, axis=-1)
    across = np.sqrt(np.mean((b - along[..., None] * a) ** 2, axis=-1))
    return np.degrees(np.arctan2(across, along))


def test_latents_are_turned_by_the_angles_of_the_paper():
    assert pae_kind.ANGLES == (42.5, 85.0)
    z = latents(0)
    direction = pae_losses.tangent_noise(jax.random.key(0), z)
    np.testing.assert_allclose(jnp.mean(direction * z, axis=-1), 0, atol=2e-6)
    np.testing.assert_allclose(jnp.mean(direction**2, axis=-1), 1, rtol=1e-5)
    found = [pae_losses.turn(z, direction, angle) for angle in (0.0, *pae_kind.ANGLES)]
    np.testing.assert_allclose(found[0], z, atol=1e-5)
    for angle, turned in zip(pae_kind.ANGLES, found[1:], strict=True):
        np.testing.assert_allclose(degrees_between(z, turned), angle, atol=1e-3)
        np.testing.assert_allclose(jnp.mean(turned**2, axis=-1), 1, rtol=1e-5)
        tangent = rms_norm(z + np.tan(np.radians(angle)) * direction)
        np.testing.assert_allclose(turned, tangent, atol=1e-5)
    # all of a token lie on one great circle
    planes = np.stack([tokens(x) for x in found], axis=2)
    assert np.linalg.svd(planes, compute_uv=False)[..., 2].max() < 1e-4
    again = pae_losses.tangent_noise(jax.random.key(0), z)
    np.testing.assert_array_equal(again, direction)
    assert jnp.std(direction) > 0.9  # every element is drawn
    assert abs(np.corrcoef(direction[0].ravel(), direction[1].ravel())[0, 1]) < 0.2


def squared(a, b):
    """A stand-in for LPIPS: one number per image."""
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))


def test_continuity_is_a_cascade():
    restored, middle, far = (jnp.full((2, 4, 4, 3), x) for x in (0.5, 0.25, 0.75))
    found = pae_losses.continuity(restored, middle, far, squared)
    np.testing.assert_allclose(found, 0.25 + 0.25**2 + 0.5 + 0.5**2)
    # against the restored image in both terms it would be another number
    assert abs(found - (0.25 + 0.25**2 + 0.25 + 0.25**2)) > 0.1
    np.testing.assert_array_equal(pae_losses.continuity(far, far, far, squared), 0)


def test_gradients_of_continuity_go_down_the_cascade_only():
    images = [jax.random.uniform(jax.random.key(n), (2, 4, 4, 3)) for n in range(3)]

    def loss(*images):
        return pae_losses.continuity(*images, squared)

    restored, middle, far = jax.grad(loss, argnums=(0, 1, 2))(*images)
    np.testing.assert_array_equal(restored, 0)
    assert jnp.max(jnp.abs(far)) > 0
    # the second term gives none to the middle: it is the same whatever the far image is
    other = jax.grad(loss, argnums=1)(*images[:2], 1 - images[2])
    np.testing.assert_array_equal(middle, other)


def test_continuity_of_latents_that_are_not_turned_or_not_looked_at():
    z = latents(0)
    direction = pae_losses.tangent_noise(jax.random.key(0), z)

    def loss(decode, angles):
        turned = (pae_losses.turn(z, direction, angle) for angle in angles)
        return pae_losses.continuity(decode(z), *map(decode, turned), squared)

    def look(z):
        return z[..., :3] / 4 + 0.5

    np.testing.assert_allclose(loss(look, (0.0, 0.0)), 0, atol=1e-5)
    assert loss(look, pae_kind.ANGLES) > 0.1
    assert loss(lambda z: jnp.zeros((*z.shape[:-1], 3)), pae_kind.ANGLES) == 0


def test_laws_of_the_perturbation():
    """One draw for both angles; isotropic noise meets them on average, jitter shrinks them."""
    z, key = latents(0), jax.random.key(5)
    middle, far = pae_losses.perturbed(key, z)
    for angle, turned in zip(pae_kind.ANGLES, (middle, far), strict=True):
        np.testing.assert_allclose(degrees_between(z, turned), angle, atol=1e-3)
    planes = np.stack([tokens(x) for x in (z, middle, far)], axis=2)
    assert np.linalg.svd(planes, compute_uv=False)[..., 2].max() < 1e-4
    loose = pae_losses.perturbed(key, z, noise="isotropic")
    for angle, turned in zip(pae_kind.ANGLES, loose, strict=True):
        found = degrees_between(z, turned)
        assert found.std() > 1
        assert abs(found.mean() - angle) < 3
        np.testing.assert_allclose(jnp.mean(turned**2, axis=-1), 1, rtol=1e-4)
    planes = np.stack([tokens(x) for x in (z, *loose)], axis=2)
    assert np.linalg.svd(planes, compute_uv=False)[..., 2].max() < 1e-4
    found = [degrees_between(z, x) for x in pae_losses.perturbed(key, z, jitter=0.5)]
    shares = found[0] / 42.5
    np.testing.assert_allclose(found[1], 85 * shares, rtol=1e-4)  # of both angles alike
    np.testing.assert_allclose(np.ptp(shares, axis=(1, 2)), 0, atol=1e-4)  # one for an image
    assert shares.min() > 0.5
    assert shares.max() <= 1
    assert np.ptp(shares) > 0.02
    with pytest.raises(ValueError, match="noise is 'off'; use one of tangent, isotropic"):
        pae_losses.perturbed(key, z, noise="off")
