"""Noise on latents: exact at level 0, one draw for all levels, whatever the batches and devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.evaluation.noise import area_under, noisy_latents, standard_noise
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.mesh import make_mesh, put_batch

KEY = jax.random.key(3)
SHAPE = (4, 4, 3)
LATENTS = np.random.default_rng(0).normal(size=(16, *SHAPE)).astype(np.float32)
IDS = np.arange(16, dtype=np.uint32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_level_0_gives_the_latents_exactly(dtype):
    latents = jnp.asarray(LATENTS, dtype)
    found = noisy_latents(latents, IDS, 0.0, KEY)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, latents.astype(jnp.float32))


def test_levels_share_their_noise():
    zero = jnp.zeros_like(LATENTS)
    small = noisy_latents(zero, IDS, 0.25, KEY)
    np.testing.assert_array_equal(4 * small, noisy_latents(zero, IDS, 1.0, KEY))
    np.testing.assert_array_equal(4 * small, standard_noise(IDS, KEY, SHAPE))
    # also with the level traced, as in a loop over levels
    mapped = jax.lax.map(lambda level: noisy_latents(zero, IDS, level, KEY), jnp.array([0.25, 1]))
    np.testing.assert_array_equal(mapped[0] * 4, mapped[1])
    # images have noise of their own, and another key gives other noise
    noise = np.asarray(small).reshape(16, -1)
    assert np.abs(np.corrcoef(noise) - np.eye(16)).max() < 0.7
    assert np.abs(noisy_latents(zero, IDS, 0.25, jax.random.key(4)) - small).min() > 0


def test_the_noise_is_normal():
    zero, ids = np.zeros((500, *SHAPE), np.float32), np.arange(500, dtype=np.uint32)
    noise = np.asarray(noisy_latents(zero, ids, 0.4, KEY)).reshape(-1, 3)
    np.testing.assert_allclose(noise.std(axis=0), 0.4, rtol=0.03)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.02)
    kurtosis = np.mean((noise / 0.4) ** 4)
    np.testing.assert_allclose(kurtosis, 3, rtol=0.05)


def test_noise_depends_on_neither_batches_nor_devices():
    whole = noisy_latents(LATENTS, IDS, 0.3, KEY)
    order = np.random.default_rng(1).permutation(16)
    parts = [noisy_latents(LATENTS[i], IDS[i], 0.3, KEY) for i in np.split(order, [3, 8])]
    np.testing.assert_array_equal(np.concatenate(parts), whole[order])
    run = jax.jit(lambda latents, ids: noisy_latents(latents, ids, 0.3, KEY))
    for devices in (1, 2, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        np.testing.assert_array_equal(run(*put_batch((LATENTS, IDS), mesh)), run(LATENTS, IDS))
    np.testing.assert_allclose(run(LATENTS, IDS), whole, rtol=1e-6, atol=1e-7)


def test_area_under_a_curve():
    levels = np.array([0, 0.1, 0.4, 0.5])
    np.testing.assert_allclose(area_under(levels, 2 * levels + 1), 0.75, rtol=1e-12)
    curves = np.stack([np.ones(4), levels**2])
    by_hand = sum((a * a + b * b) / 2 * (b - a) for a, b in itertools.pairwise(levels))
    expected = [0.5, by_hand]
    np.testing.assert_allclose(area_under(levels, curves), expected, rtol=1e-12)
    for bad in ([0.1], [0, 0.2, 0.2, 0.5], [[0, 1]]):
        with pytest.raises(ConfigError, match="two or more that increase"):
            area_under(bad, np.ones(4))
    with pytest.raises(ValueError, match=r"values \[3\] need one entry for each of 4"):
        area_under(levels, np.ones(3))
