"""The flow on the sphere against closed forms, and a run that uses it."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.commands.cli import run_command
from gae_jax.config.validate import validate
from gae_jax.evaluation.sample_files import load_set
from gae_jax.generators import flow, samplers
from gae_jax.nn import sphere
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError


def tokens(count=5):
    noise, data = jax.random.normal(jax.random.key(0), (2, count, 3, 8))
    return sphere.onto(noise), sphere.onto(data)


def test_geodesics_stay_on_the_sphere_and_lead_from_noise_to_data():
    noise, data = tokens()
    for t, end in ((0.0, noise), (1.0, data)):
        np.testing.assert_allclose(sphere.geodesic(noise, data, jnp.full(5, t))[0], end, atol=1e-4)
    x, velocity = sphere.geodesic(noise, data, jnp.linspace(0.1, 0.9, 5))
    np.testing.assert_allclose(jnp.mean(x**2, -1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(x * velocity, -1), 0, atol=1e-5)
    angle = jnp.arccos(jnp.mean(noise * data, -1))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(velocity**2, -1)), angle, rtol=1e-4)


def test_the_velocity_is_the_slope_and_one_exponential_step_reaches_the_data():
    noise, data = tokens()
    t, h = jnp.full(5, 0.4), 1e-2
    after, before = (sphere.geodesic(noise, data, t + s)[0] for s in (h, -h))
    x, velocity = sphere.geodesic(noise, data, t)
    np.testing.assert_allclose((after - before) / (2 * h), velocity, atol=2e-3)
    np.testing.assert_allclose(sphere.exponential(x, 0.6 * velocity), data, atol=1e-4)
    np.testing.assert_allclose(sphere.exponential(x, 0 * velocity), x, atol=1e-5)


def test_euler_follows_a_geodesic_exactly():
    noise, data = tokens()
    grid = flow.time_grid(4, shift=0.5)

    def velocity(x, t):
        """To the data at the speed that arrives at t = 1."""
        angle = jnp.arccos(jnp.clip(jnp.mean(x * data, -1, keepdims=True), -1, 1))
        away = sphere.project(x, data)
        return away / jnp.sqrt(jnp.mean(away**2, -1, keepdims=True)) * angle / (1 - t)

    found = samplers.euler(velocity, noise, grid, move=sphere.exponential)
    np.testing.assert_allclose(found, data, atol=1e-3)


@pytest.mark.slow  # its loss and its samplers are above
def test_a_run_on_the_sphere_gives_latents_on_it(small_run, tmp_path, config):
    run = tmp_path / "run"
    for stage in ("tokenizer", "latents"):
        shutil.copytree(small_run / stage, run / stage)
    config.diffusion.flow.geometry = "sphere"
    config.sample.sets = ("ode",)
    session = Session(config, Run(run), devices=tuple(jax.devices()[:1]))
    for command in ("diffusion", "sample"):
        run_command(command, session)
    images, _, manifest = load_set(Run(run).stage("sample").path, "ode")
    assert images.shape == (20, 16, 16, 3)
    assert manifest["network_calls"] == 3


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("diffusion.flow.prediction", "noise", "has one path and predicts its velocity"),
        ("sample.sets", ("sde", "ode"), "has one sampler"),
        ("tokenizer.model.bottleneck", "kl", "lie on no sphere"),
    ],
)
def test_what_the_sphere_has_not_is_refused(config, path, value, says):
    config.diffusion.flow.geometry = "sphere"
    config.sample.sets = ("ode",)
    *sections, leaf = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[leaf] = value
    with pytest.raises(ConfigError, match=says):
        validate(config)
