"""The likelihood command: its figures, and what they must not depend on."""

import math
import shutil

import jax
import numpy as np
import pytest

from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.files import read_json
from gae_jax.stages import likelihood


def session(config, path, devices=1):
    return Session(config, Run(path), devices=tuple(jax.devices()[:devices]))


def test_figures_of_a_run(small_run, tmp_path, config):
    run = shutil.copytree(small_run, tmp_path / "run")
    folder = likelihood.run(session(config, run))
    result = read_json(folder.path / "result.json")
    with np.load(folder.path / "nats.npz") as file:
        nats = file["nats"]
    assert len(nats) == result["images"] == 20
    np.testing.assert_allclose(result["nats"], nats.mean())
    np.testing.assert_allclose(result["nats_standard_error"], nats.std(ddof=1) / math.sqrt(20))
    bits = -nats.mean() / math.log(2) / result["dimensions"]
    np.testing.assert_allclose(result["bits_per_dimension"], bits)
    assert result["dimensions"] == 4 * 4 * 4
    assert result["network_calls"] == 4


def test_one_image_has_a_likelihood_without_an_error_bar(small_run, tmp_path, config, monkeypatch):
    run = shutil.copytree(small_run, tmp_path / "run")
    config.likelihood.images = 1
    monkeypatch.setattr(likelihood, "log_likelihoods", lambda *arguments: np.array([-3.0]))
    result = read_json(likelihood.run(session(config, run)).path / "result.json")
    assert (result["images"], result["nats"]) == (1, -3.0)
    assert "nats_standard_error" not in result


def test_it_depends_neither_on_devices_nor_on_batches(small_run, config):
    found = []
    for devices, size in ((1, 16), (8, 8)):
        config.likelihood.batch_size = size
        here = session(config, small_run, devices)
        images, labels = here.images("holdout", 20)
        found.append(likelihood.log_likelihoods(here, images, labels))
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_model_that_does_nothing_has_the_density_of_a_normal(small_run, tmp_path, config):
    """Zero velocity: latents are N(mean, std), whatever the label."""
    run = shutil.copytree(small_run, tmp_path / "run")
    here = session(config, run)
    networks = likelihood.load_networks(here)
    params, rest = networks.diffusion[1]
    params = jax.tree.map(lambda x: x, params)
    last = params["dit"]["final_layer"]["linear"]
    last["kernel"], last["bias"] = 0 * last["kernel"], 0 * last["bias"]
    still = networks._replace(diffusion=(networks.diffusion[0], (params, rest)))
    images, labels = here.images("holdout", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "load_networks", lambda _: still)
        found = likelihood.log_likelihoods(here, images, labels)
    tokenizer = networks.tokenizer[0](*networks.tokenizer[1])
    latents = np.asarray(tokenizer.encode(images.astype(np.float32) / 127.5 - 1))
    mean, std = (np.asarray(rest[name], np.float64) for name in ("latent_mean", "latent_std"))
    density = -0.5 * ((latents - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(found, density.sum(axis=(1, 2, 3)), rtol=1e-5)


def test_a_model_on_a_sphere_is_refused(small_run, tmp_path, config):
    run = shutil.copytree(small_run, tmp_path / "run")
    path = run / "diffusion" / "config.json"
    path.write_text(path.read_text().replace('"geometry": "flat"', '"geometry": "sphere"'))
    with pytest.raises(ConfigError, match="only a model with 'flat' has a density"):
        likelihood.run(session(config, run))
