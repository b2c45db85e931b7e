"""Samplers, guidance and likelihood against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.generators import flow, guidance, samplers

# Data ~ N(0, s^2) per coordinate: velocity and score of x_t are known, and the flow maps N(0, 1)
# to N(0, s^2) linearly.
SCALE = 0.5


def gaussian_velocity(x, t, path=flow.LINEAR):
    variance = (path.alpha(t) * SCALE) ** 2 + path.sigma(t) ** 2
    slope = path.alpha(t) * path.d_alpha(t) * SCALE**2 + path.sigma(t) * path.d_sigma(t)
    return x * slope / variance


def keys_of(count):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(count))


@pytest.mark.parametrize(
    ("solver", "order"),
    [(samplers.euler, 1), (samplers.heun, 2), (samplers.adams_bashforth, 2)],
    ids=["euler", "heun", "adams_bashforth"],
)
def test_solvers_converge_at_their_order(solver, order):
    x = jnp.array([1.5])

    def error(steps):
        found = solver(gaussian_velocity, x, flow.time_grid(steps + 1))
        return float(jnp.abs(found - x * SCALE)[0])

    np.testing.assert_allclose(error(80) / error(160), 2**order, rtol=0.1)


def test_the_multistep_solver_knows_uneven_steps():
    """Of dx/dt = t it makes no error but that of its first step, which is Euler's."""
    grid = flow.time_grid(9, shift=0.3)
    found = samplers.adams_bashforth(lambda x, t: jnp.full_like(x, t), jnp.zeros(2), grid)
    np.testing.assert_allclose(found, 0.5 - grid[1] ** 2 / 2, rtol=1e-6)


def test_dopri5_keeps_its_tolerance_and_counts_its_calls():
    x, called = jnp.linspace(-2, 2, 7), []

    def velocity(x, t):
        jax.debug.callback(lambda: called.append(None))
        return gaussian_velocity(x, t)

    loose = samplers.dopri5(velocity, x, 0.0, 1.0, rtol=1e-4)
    jax.effects_barrier()
    assert len(called) == loose.calls
    np.testing.assert_allclose(loose.x, SCALE * x, atol=2e-3)
    tight = samplers.dopri5(gaussian_velocity, x, 0.0, 1.0, rtol=1e-6)
    np.testing.assert_allclose(tight.x, SCALE * x, atol=5e-6)
    assert tight.calls > loose.calls
    given_up = samplers.dopri5(gaussian_velocity, x, 0.0, 1.0, rtol=1e-6, max_calls=10)
    assert jnp.all(jnp.isnan(given_up.x))


@pytest.mark.parametrize("name", flow.PATHS)
def test_every_path_ends_at_the_data(name):
    path, x = flow.PATHS[name], jnp.array([-1.0, 0.5])
    grid = flow.time_grid(201, end=flow.time_range(name, "velocity")[1])
    found = samplers.heun(lambda x, t: gaussian_velocity(x, t, path), x, grid)
    # VP starts at a variance of nearly 1
    np.testing.assert_allclose(found, SCALE * x, rtol=5e-3)


def sde_deviation(last_step="mean", method="euler", form="sbdm", steps=150, **more):
    keys = keys_of(8000)
    grid = flow.time_grid(steps, start=1e-3, end=0.985)
    found = samplers.sde(
        gaussian_velocity,
        samplers.noise_for(keys, (2,)),
        grid,
        noise=lambda index: samplers.noise_for(keys, (2,), index + 1),
        method=method,
        form=form,
        last_step=last_step,
        **more,
    )
    np.testing.assert_allclose(jnp.mean(found), 0, atol=0.02)
    return float(jnp.std(found))


def methods_and_forms():
    """All pairs; the form enters each method as the same factor, so most with Heun are slow."""
    for method, form in itertools.product(samplers.SDE_METHODS, samplers.FORMS):
        dear = method != samplers.SDE_METHODS[0] and form != samplers.FORMS[0]
        yield pytest.param(method, form, marks=[pytest.mark.slow] * dear)


@pytest.mark.parametrize(("method", "form"), list(methods_and_forms()))
def test_the_sde_reaches_the_data_with_every_diffusion(method, form):
    # "mean" would take the drift against noise that is no longer added
    found = sde_deviation("euler", method=method, form=form)
    np.testing.assert_allclose(found, SCALE, rtol=0.04)


@pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie"])
def test_last_steps_end_at_the_data(last_step):
    np.testing.assert_allclose(sde_deviation(last_step), SCALE, rtol=0.04)


def test_no_last_step_leaves_the_noise_of_the_last_time():
    end = 0.985
    expected = np.sqrt((end * SCALE) ** 2 + (1 - end) ** 2)
    np.testing.assert_allclose(sde_deviation("none"), expected, rtol=0.04)


def test_the_reference_step_stops_where_the_released_sampler_does():
    """Of the path, 0.990 + 0.004; on data of one value it shows as 0.6 % too little."""
    grid = flow.time_grid(250, start=1e-5, end=0.996, shift=0.4)
    keys = keys_of(64)

    def end(last_step):
        found = samplers.sde(
            lambda x, t: (1 - x) / (1 - t),  # data is 1
            samplers.noise_for(keys, (64,)),
            grid,
            noise=lambda index: samplers.noise_for(keys, (64,), index + 1),
            last_step=last_step,
            last_step_size=0.004,
        )
        return float(jnp.mean(found))

    assert abs(end("mean") - 1) < 5e-3
    assert abs(end("tweedie") - 1) < 1e-5


def test_one_call_per_step_equals_the_two_calls_of_the_released_code():
    called = []
    grid = flow.time_grid(250, start=1e-3, end=0.996, shift=0.4)
    x = jax.random.normal(jax.random.key(0), (4, 3))
    kicks = jax.random.normal(jax.random.key(1), (249, 4, 3))

    def velocity(x, t):
        jax.debug.callback(lambda: called.append(None))
        return gaussian_velocity(x, t)

    found = samplers.sde(velocity, x, grid, noise=lambda index: kicks[index])
    jax.effects_barrier()
    assert len(called) == 250

    def two_calls(x, t):
        score = flow.score_of_velocity(gaussian_velocity(x, t), x, t)
        return gaussian_velocity(x, t) + (1 - t) / t * score

    for kick, t, end in zip(kicks, grid[:-1], grid[1:], strict=True):
        x = x + (end - t) * two_calls(x, t) + jnp.sqrt(2 * (1 - t) / t * (end - t)) * kick
    x = x + (1 - grid[-1]) * two_calls(x, grid[-1])
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_noise_depends_on_the_sample_alone():
    keys = keys_of(6)
    whole = samplers.noise_for(keys, (3,), 2)
    np.testing.assert_array_equal(samplers.noise_for(keys[4:], (3,), 2), whole[4:])
    assert len(np.unique(whole)) == whole.size


def test_guidance_inside_its_interval_only():
    called = []

    def both(x, t):
        jax.debug.callback(lambda: called.append(float(t)))
        return x, 0 * x + 1

    velocity = guidance.guided(lambda x, t: x, both, guidance.in_interval(3.0, 0.3, 0.8))
    x = jnp.array([2.0])
    for t, expected in ((0.2, 2.0), (0.3, 4.0), (0.8, 4.0), (0.9, 2.0)):
        np.testing.assert_allclose(velocity(x, jnp.float32(t)), expected)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(called), [0.3, 0.8], rtol=1e-6)


def test_guidance_of_scale_one_is_none_and_of_some_channels_leaves_the_others():
    c, u = jax.random.normal(jax.random.key(0), (2, 5, 4))
    t = jnp.float32(0.5)
    none = guidance.guided(lambda x, t: c, lambda x, t: (c, u), guidance.in_interval(1.0))
    np.testing.assert_array_equal(none(c, t), c)
    some = guidance.guided(
        lambda x, t: c, lambda x, t: (c, u), guidance.in_interval(2.5), channels=3
    )
    np.testing.assert_allclose(some(c, t)[:, :3], (u + 2.5 * (c - u))[:, :3], rtol=1e-5)
    np.testing.assert_array_equal(some(c, t)[:, 3:], c[:, 3:])


@pytest.mark.parametrize(("method", "calls"), [("euler", 10 + 5), ("heun", 20 + 11)])
def test_calls_of_networks(method, calls):
    times = samplers.times_of(method, np.linspace(0, 1, 11, dtype=np.float32))
    assert guidance.calls_at(guidance.in_interval(2.0, 0.45, 1.0))(times).sum() == calls
    assert guidance.calls_at(guidance.in_interval(2.0, 2.0, 1.0))(times).sum() == len(times)


def test_dopri5_counts_both_calls_of_a_guided_velocity():
    """Every call of the guided velocity is one of the conditional network and, inside, two."""
    called = []

    def conditional(x, t):
        jax.debug.callback(lambda: called.append(1))
        return gaussian_velocity(x, t)

    def both(x, t):
        jax.debug.callback(lambda: called.append(2))
        return gaussian_velocity(x, t), jnp.zeros_like(x)

    excess = guidance.in_interval(2.0, start=0.3, end=0.6)
    velocity = guidance.guided(conditional, both, excess)
    found = samplers.dopri5(
        velocity, jnp.ones((2, 3)), 0.0, 1.0, calls_at=guidance.calls_at(excess)
    )
    jax.effects_barrier()
    assert 1 in called
    assert 2 in called
    assert sum(called) == found.calls


def test_likelihood_of_a_gaussian():
    """The Jacobian is diagonal, so that one draw of signs gives the divergence exactly."""
    x = jax.random.normal(jax.random.key(0), (5, 3, 2)) * SCALE
    found, noise = samplers.log_likelihood(
        gaussian_velocity, x, flow.time_grid(101), jax.random.rademacher(jax.random.key(1), x.shape)
    )
    exact = jnp.sum(jax.scipy.stats.norm.logpdf(x, scale=SCALE), axis=(1, 2))
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    np.testing.assert_allclose(noise, x / SCALE, rtol=1e-3)


def test_the_trace_of_a_matrix_is_found_on_average():
    matrix = jax.random.normal(jax.random.key(0), (3, 3)) / 3
    x = jnp.zeros((4000, 3))
    found, _ = samplers.log_likelihood(
        lambda x, t: x @ matrix.T,
        x,
        flow.time_grid(11),
        jax.random.rademacher(jax.random.key(1), x.shape),
    )
    prior = -1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(jnp.mean(found), prior - jnp.trace(matrix), atol=0.03)


# FAE's, in the direction of the flow: .9 near noise, none, then 2.5.
PARTS = ((0.1, 0.9), (0.3, 1.0), (1.0, 2.5))


def test_a_scale_for_every_part_of_the_time():
    times = np.array([0.05, 0.1, 0.2, 0.3, 0.5, 1.0], np.float32)
    np.testing.assert_allclose(1 + guidance.in_parts(PARTS)(times), [0.9, 0.9, 1, 1, 2.5, 2.5])
    c, u = jax.random.normal(jax.random.key(0), (2, 5, 4))
    called = []

    def both(x, t):
        jax.debug.callback(lambda t: called.append(float(t)), t)
        return c, u

    velocity = guidance.guided(lambda x, t: c, both, guidance.in_parts(PARTS))
    for t, scale in ((0.05, 0.9), (0.2, 1.0), (0.5, 2.5)):
        np.testing.assert_allclose(velocity(c, jnp.float32(t)), u + scale * (c - u), rtol=1e-4,
                                   atol=1e-6)  # fmt: skip
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(called), [0.05, 0.5], rtol=1e-6)  # no call where it is 1
    some = guidance.guided(
        lambda x, t: c, lambda x, t: (c, u), guidance.in_parts(PARTS), channels=3
    )
    np.testing.assert_array_equal(some(c, jnp.float32(0.5))[:, 3:], c[:, 3:])


def test_a_scale_of_one_everywhere_is_the_conditional_model():
    c, u = jax.random.normal(jax.random.key(0), (2, 5, 4))
    parts = ((0.5, 1.0), (1.0, 1.0))
    velocity = guidance.guided(lambda x, t: c, lambda x, t: (c, u), guidance.in_parts(parts))
    for t in (0.1, 0.9):
        np.testing.assert_array_equal(velocity(c, jnp.float32(t)), c)


def test_an_sde_without_noise_is_the_ode():
    x, grid = jnp.array([1.5, -0.3]), flow.time_grid(9, start=1e-3)
    quiet = dict(noise=lambda index: jnp.ones(2), form="sigma", norm=0.0, last_step="none")
    got = samplers.sde(gaussian_velocity, x, grid, **quiet)
    np.testing.assert_allclose(got, samplers.euler(gaussian_velocity, x, grid), rtol=1e-6)
