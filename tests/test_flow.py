"""Flow matching and samplers against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax import flow, samplers


def test_path_ends_are_noise_and_data():
    noise, data = jnp.zeros((2, 3)), jnp.ones((2, 3))
    np.testing.assert_array_equal(
        flow.interpolate(noise, data, jnp.array([0.0, 1.0])), [[0] * 3, [1] * 3]
    )


def test_shift_moves_towards_noise_and_inverts():
    t = jnp.linspace(0, 1, 11)
    assert jnp.all(flow.shift_time(t, 0.4)[1:-1] < t[1:-1])
    np.testing.assert_allclose(flow.shift_time(t, 1.0), t)
    np.testing.assert_allclose(flow.shift_time(flow.shift_time(t, 0.4), 2.5), t, atol=1e-6)
    np.testing.assert_allclose(
        flow.shift_time(t, 0.4), 1 - flow.shift_time(1 - t, 1 / 0.4), atol=1e-6
    )


def test_released_grid_really_ends_at_0990():
    np.testing.assert_allclose(
        flow.time_grid(250, start=1e-5, end=0.996, shift=0.4)[-1], 0.990, atol=1e-4
    )


def test_loss_is_zero_for_the_true_velocity_and_finite_at_zero():
    noise, data = jax.random.normal(jax.random.key(0), (2, 4, 4, 4, 3))
    loss, _ = flow.flow_loss(data - noise, noise, data)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    grad = jax.grad(lambda v: flow.flow_loss(v, noise, data)[0])(jnp.zeros_like(data))
    assert jnp.all(jnp.isfinite(grad))


# Data ~ N(0, s^2) per coordinate: x_t ~ N(0, t^2 s^2 + (1-t)^2), so velocity and score are known.
SCALE = 0.5


def gaussian_velocity(x, t):
    variance = t**2 * SCALE**2 + (1 - t) ** 2
    return x * (t * SCALE**2 - (1 - t)) / variance


def test_score_follows_from_the_velocity():
    x = jnp.linspace(-2, 2, 9)
    for t in (0.1, 0.5, 0.9):
        score = flow.score_of_velocity(gaussian_velocity(x, t), x, t)
        np.testing.assert_allclose(score, -x / (t**2 * SCALE**2 + (1 - t) ** 2), rtol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [(samplers.euler, 1), (samplers.heun, 2)])
def test_solvers_converge_at_their_order(solver, order):
    x = jnp.array([1.5])
    exact = x * SCALE  # the flow maps N(0, 1) to N(0, s^2) linearly

    def error(steps):
        return float(jnp.abs(solver(gaussian_velocity, x, flow.time_grid(steps + 1)) - exact)[0])

    ratio = error(40) / error(80)
    np.testing.assert_allclose(ratio, 2**order, rtol=0.15)


def test_sde_reaches_the_data_distribution():
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(20_000))
    grid = flow.time_grid(200, start=1e-3, end=0.98)
    out = samplers.euler_maruyama(
        gaussian_velocity,
        samplers.noise_for(keys, (2,)),
        grid,
        noise=lambda index: samplers.noise_for(keys, (2,), index + 1),
        last_step=1 - grid[-1],
    )
    np.testing.assert_allclose(jnp.mean(out), 0, atol=0.015)
    np.testing.assert_allclose(jnp.std(out), SCALE, rtol=0.03)


def test_noise_depends_on_the_sample_alone():
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(6))
    whole = samplers.noise_for(keys, (3,), 2)
    np.testing.assert_array_equal(samplers.noise_for(keys[4:], (3,), 2), whole[4:])
    assert len(np.unique(whole)) == whole.size


def test_guidance_inside_its_interval_only():
    velocity = samplers.guided(
        lambda x, t: x, lambda x, t: (x, 0 * x + 1), scale=3.0, start=0.3, end=0.8
    )
    x = jnp.array([2.0])
    for t, expected in ((0.2, 2.0), (0.3, 4.0), (0.8, 4.0), (0.9, 2.0)):
        np.testing.assert_allclose(velocity(x, jnp.float32(t)), expected)


def test_logit_normal_times():
    t = flow.sample_time(jax.random.key(0), 50_000, mean=0.0, std=1.0, shift=1.0)
    logits = jnp.log(t / (1 - t))
    np.testing.assert_allclose([jnp.mean(logits), jnp.std(logits)], [0, 1], atol=0.02)
