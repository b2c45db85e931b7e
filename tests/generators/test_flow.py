"""Paths, predictions, losses and times of flow matching against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.generators import flow

SCALE = 0.5  # data ~ N(0, SCALE^2) per coordinate
TIMES = (0.1, 0.5, 0.9)


def gaussian(path, x, t):
    """Velocity and score of x_t ~ N(0, alpha^2 s^2 + sigma^2)."""
    variance = (path.alpha(t) * SCALE) ** 2 + path.sigma(t) ** 2
    slope = path.alpha(t) * path.d_alpha(t) * SCALE**2 + path.sigma(t) * path.d_sigma(t)
    return x * slope / variance, -x / variance


def test_linear_path_ends_are_noise_and_data():
    noise, data = jnp.zeros((2, 3)), jnp.ones((2, 3))
    np.testing.assert_array_equal(
        flow.interpolate(noise, data, jnp.array([0.0, 1.0])), [[0] * 3, [1] * 3]
    )


@pytest.mark.parametrize("name", flow.PATHS)
def test_slopes_of_a_path(name):
    path = flow.PATHS[name]
    # the noise of VP is gone at t = 1, its data almost at t = 0
    np.testing.assert_allclose([path.alpha(1.0), path.sigma(1.0)], [1, 0], atol=1e-6)
    np.testing.assert_allclose([path.alpha(0.0), path.sigma(0.0)], [0, 1], atol=0.01)
    for t in map(jnp.float32, TIMES):
        np.testing.assert_allclose(path.d_alpha(t), jax.grad(path.alpha)(t), rtol=1e-4)
        np.testing.assert_allclose(path.d_sigma(t), jax.grad(path.sigma)(t), rtol=1e-4)
        np.testing.assert_allclose(path.log_slope(t), path.d_alpha(t) / path.alpha(t), rtol=1e-4)
        drift = path.log_slope(t) * path.sigma(t) ** 2 - path.sigma(t) * path.d_sigma(t)
        np.testing.assert_allclose(path.drift(t), drift, rtol=1e-4)


@pytest.mark.parametrize("name", flow.PATHS)
def test_velocity_score_noise_and_data_follow_from_each_other(name):
    path = flow.PATHS[name]
    x = jnp.linspace(-2, 2, 9)
    for t in map(jnp.float32, TIMES):
        velocity, score = gaussian(path, x, t)
        close = dict(rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(flow.score_of_velocity(velocity, x, t, path), score, **close)
        np.testing.assert_allclose(flow.velocity_of_score(score, x, t, path), velocity, **close)
        noise = -path.sigma(t) * score
        data = flow.data_of_velocity(velocity, x, t, path)
        np.testing.assert_allclose(path.alpha(t) * data + path.sigma(t) * noise, x, **close)
        for prediction, output in (("velocity", velocity), ("score", score), ("noise", noise)):
            found = flow.velocity_of(output, x, t, path=path, prediction=prediction)
            np.testing.assert_allclose(found, velocity, **close)


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


def test_grids_are_those_of_torch_to_the_bit():
    """torch.linspace(0, 1, 37) and its shift by 0.4, at places where roundings differ."""
    torch = pytest.importorskip("torch", reason="the released grids are made by torch")
    for points, start, end in ((37, 0, 1), (250, 1e-5, 0.996), (1000, 0, 1)):
        for shift in (1.0, 0.4, 0.7):
            t = torch.linspace(start, end, points)
            if shift != 1:
                t = torch.tensor([(shift * x) / (1 + (shift - 1) * x) for x in t])
            grid = flow.time_grid(points, start=start, end=end, shift=shift)
            np.testing.assert_array_equal(grid, t.numpy())


def test_loss_is_zero_for_the_true_velocity_and_finite_at_zero():
    noise, data = jax.random.normal(jax.random.key(0), (2, 4, 4, 4, 3))
    t = jnp.linspace(0.1, 0.9, 4)
    loss, _ = flow.flow_loss(data - noise, noise, data, t)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    grad = jax.grad(lambda v: flow.flow_loss(v, noise, data, t)[0])(jnp.zeros_like(data))
    assert jnp.all(jnp.isfinite(grad))


@pytest.mark.parametrize("name", flow.PATHS)
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_losses_of_noise_and_score(name, prediction):
    path = flow.PATHS[name]
    noise, data, miss = jax.random.normal(jax.random.key(0), (3, 4, 2, 2, 3))
    t = jnp.linspace(0.2, 0.8, 4)
    sigma, g = path.sigma(t), path.drift(t)
    wide = sigma[:, None, None, None]
    right = noise if prediction == "noise" else -noise / wide
    error = miss if prediction == "noise" else miss * wide
    squares = jnp.mean(error**2, axis=(1, 2, 3))
    for weighting, weight in (
        ("none", 1),
        ("velocity", (g / sigma) ** 2),
        ("likelihood", g / sigma**2),
    ):
        more = dict(path=path, prediction=prediction, weighting=weighting)
        np.testing.assert_allclose(flow.flow_loss(right, noise, data, t, **more)[0], 0, atol=1e-5)
        loss, terms = flow.flow_loss(right + miss, noise, data, t, **more)
        np.testing.assert_allclose(loss, jnp.mean(weight * squares), rtol=1e-4)
        np.testing.assert_allclose(terms["mse"], jnp.mean(squares), rtol=1e-4)


def test_likelihood_weighting_of_noise_on_vp_is_the_elbo():
    """g / sigma^2 = beta / (2 sigma^2), the weight of Song et al. 2021 (arXiv 2101.09258)."""
    path, t = flow.PATHS["vp"], jnp.array([0.3])
    beta = 0.1 + 0.7 * (20 - 0.1)
    loss, _ = flow.flow_loss(
        jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.zeros((1, 1)), t,
        path=path, prediction="noise", weighting="likelihood",
    )  # fmt: skip
    np.testing.assert_allclose(loss, beta / 2 / path.sigma(t)[0] ** 2, rtol=1e-5)


def test_logit_normal_times():
    t = flow.sample_time(jax.random.key(0), 50_000, mean=0.3, std=0.8, shift=1.0)
    logits = jnp.log(t / (1 - t))
    np.testing.assert_allclose([jnp.mean(logits), jnp.std(logits)], [0.3, 0.8], atol=0.02)
    shifted = flow.sample_time(jax.random.key(0), 50_000, mean=0.3, std=0.8, shift=0.7)
    np.testing.assert_allclose(shifted, flow.shift_time(t, 0.7), rtol=1e-6)


def test_logit_normal_times_are_cut_off():
    """RAE's: with t = 1 as noise, at most 0.999 before the shift by sqrt(48)."""
    cut = dict(mean=0.0, std=1.0, shift=1.0, least=0.2)
    t = flow.sample_time(jax.random.key(0), 50_000, **cut)
    assert jnp.min(t) >= 0.2
    whole = flow.sample_time(jax.random.key(1), 200_000, mean=0.0, std=1.0, shift=1.0)
    given = whole[whole > 0.2]  # a condition, not a clamp
    at = jnp.array([0.02, 0.25, 0.5, 0.75, 0.98])
    np.testing.assert_allclose(jnp.quantile(t, at), jnp.quantile(given, at), atol=0.01)
    rae = flow.sample_time(
        jax.random.key(0), 50_000, mean=0.0, std=1.0, shift=1 / np.sqrt(48), least=1e-3
    )
    assert jnp.all(jnp.isfinite(rae))
    assert jnp.min(rae) >= flow.shift_time(1e-3, 1 / np.sqrt(48))


def test_shifts_of_the_neighbours_in_both_directions():
    """They count t from data to noise: a shift s here is 1 / s there."""
    t = np.linspace(0, 1, 11)
    for shift in (0.4, 1 / np.sqrt(48)):
        np.testing.assert_allclose(
            flow.shift_time(t, shift), 1 - flow.shift_time(1 - t, 1 / shift), atol=1e-12
        )
    np.testing.assert_allclose(flow.shift_time(0.5, 0.4), 0.2857, atol=1e-4)
    np.testing.assert_allclose(flow.shift_time(0.5, 2.5), 0.7143, atol=1e-4)
    a = np.sqrt(48)  # 16 * 16 * 768 numbers over 4096
    np.testing.assert_allclose(flow.shift_time(0.5, a), 0.8739, atol=1e-4)
    assert flow.shift_time(0.0, a) == 0
    assert flow.shift_time(1.0, a) == 1
    s = flow.shift_time(t[1:], a)
    np.testing.assert_allclose((1 - s) / s, (1 - t[1:]) / (a * t[1:]))
    grid = flow.time_grid(50, shift=1 / a, end=0.999)  # RAE's 49 calls
    np.testing.assert_allclose(1 - grid[-1], 0.00689, atol=1e-5)


def test_uniform_times_stay_within_the_bounds():
    bounds = flow.time_range("gvp", "noise")
    assert bounds == (1e-3, 1 - 1e-3)
    t = flow.sample_time(
        jax.random.key(0), 50_000, mean=9.0, std=9.0, shift=1.0, kind="uniform", bounds=bounds
    )
    assert bounds[0] <= jnp.min(t) < jnp.max(t) <= bounds[1]
    np.testing.assert_allclose(jnp.quantile(t, jnp.array([0.25, 0.5])), [0.25, 0.5], atol=0.02)
    assert flow.time_range("linear", "velocity") == (0.0, 1.0)
    assert flow.time_range("vp", "velocity") == (0.0, 1 - 1e-5)
