"""Velocities, likelihoods, features and distances of a loaded run."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import gae_jax
from gae_jax.evaluation.frechet import frechet_distance
from gae_jax.evaluation.judge import Judge
from gae_jax.nn.network import Network
from gae_jax.run import judges
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.stages import likelihood

ONE = jax.devices()[:1]
STATES = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def run(small_run):
    return gae_jax.load(small_run, devices=ONE)


@pytest.fixture(scope="module")
def model(run):
    network, arrays = load(run._session.run.stage("diffusion"), run.mesh)
    return network(*arrays)


def test_velocities_are_those_of_the_model(run, model):
    found = run.velocity(STATES, 0.3, 7)
    assert (found.dtype, found.shape) == (np.float32, STATES.shape)
    expected = model.velocity(STATES, np.float32(0.3), np.full(3, 7))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    mixed = run.velocity(STATES, [0.3, 0.5, 1.0], ["7", 2, "none"])
    np.testing.assert_allclose(mixed[0], found[0], rtol=1e-4, atol=1e-5)
    last = model.velocity(STATES[2:], np.float32(1), np.full(1, 10))
    np.testing.assert_allclose(mixed[2:], last, rtol=1e-4, atol=1e-5)
    without = run.velocity(STATES, 1)
    np.testing.assert_allclose(without[2], mixed[2], rtol=1e-4, atol=1e-5)


def test_latents_are_normalised_as_the_model_does(run, model):
    found = run.normalize(STATES)
    np.testing.assert_allclose(found, model.normalize(STATES), rtol=1e-5, atol=1e-6)
    assert np.abs(found - STATES).max() > 0.01
    np.testing.assert_allclose(run.denormalize(found), STATES, rtol=1e-4, atol=1e-5)


def test_likelihoods_are_those_of_the_command(small_run, tmp_path, config):
    path = shutil.copytree(small_run, tmp_path / "run")
    session = Session(config, Run(path), devices=tuple(ONE))
    folder = likelihood.run(session)
    images, labels = session.images("holdout", 20)
    with np.load(folder.path / "nats.npz") as file:
        expected = file["nats"]
    run = gae_jax.load(path, devices=ONE)
    found = run.log_likelihood(images, labels)
    assert (found.dtype, found.shape) == (np.float64, (20,))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    floats = images[:5].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(run.log_likelihood(floats, labels[:5]), expected[:5], rtol=1e-4)


def test_a_model_on_a_sphere_has_no_likelihood(small_run, tmp_path):
    for stage in ("tokenizer", "diffusion"):
        shutil.copytree(small_run / stage, tmp_path / stage)
    path = tmp_path / "diffusion" / "config.json"
    made = read_json(path)
    made["config"]["diffusion"]["flow"]["geometry"] = "sphere"
    write_json(path, made)
    with pytest.raises(UserError, match="only a model with 'flat' has a density"):
        gae_jax.load(tmp_path).log_likelihood(np.zeros((1, 16, 16, 3), np.uint8), 3)


def test_distances_of_features():
    a, b = np.random.default_rng(0).normal(size=(2, 20, 3))
    assert gae_jax.metrics.frechet(a, b) == frechet_distance(a, b)
    with pytest.raises(UserError, match=r"pass run=gae_jax.load\(PATH\)"):
        gae_jax.metrics.frechet(a, b, features="vgg16")


def test_distances_by_the_judge_are_those_of_evaluate(run):
    images, labels = run._session.images("train", run._session.config.evaluate.probe_images)
    judge = Judge(images, labels)
    a, b = images[:30], images[30:55]
    found = gae_jax.metrics.frechet(a, b, features="judge", run=run)
    np.testing.assert_allclose(
        found, frechet_distance(judge.features(a), judge.features(b)), rtol=1e-4
    )


class Maps(nnx.Module):
    """The interface of `LPIPS` that VGG16's features need: pixels as the only map."""

    def features(self, images):
        return [images]


def test_networks_that_the_run_imported_compare_images(run, small_run, tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3)).astype(np.uint8)
    lacking = "lpips does not exist; run first: python -m gae_jax import-torch .*import_torch.vgg="
    with pytest.raises(UserError, match=lacking):
        run.features(images)
    for name in ("inception", "efficientnet_lite0"):
        with pytest.raises(UserError, match=r"does not exist; run first: .*import-torch"):
            run.features(images, name)
    shutil.copytree(small_run / "tokenizer", tmp_path / "tokenizer")
    folder = Run(tmp_path).stage("lpips")
    folder.open({}, {}, fresh=False)
    folder.finish(fingerprint="abc", weights="params")
    loads = []

    def load_maps(folder, mesh, **how):
        loads.append(how)
        return Network(lambda rngs: Maps()), ({}, {})

    monkeypatch.setattr(judges, "load", load_maps)
    other = gae_jax.load(tmp_path)
    means = (images.astype(np.float64) / 127.5 - 1).mean(axis=(1, 2))
    found = other.features(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, means, atol=1e-5)
    a, b = images[:6], images[6:]
    distance = gae_jax.metrics.frechet(a, b, features="vgg16", run=other)
    np.testing.assert_allclose(distance, frechet_distance(means[:6], means[6:]), rtol=1e-3)
    assert loads == [{"precision": "highest"}]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda run: run.velocity(STATES, 1.5, 7), r"t is 1.5; times go from 0 \(noise\) to 1"),
        (lambda run: run.velocity(STATES, np.nan, 7), "t is nan; times go"),
        (lambda run: run.velocity(STATES, [0.1, 0.2], 7), r"t has shape \[2\]; give one time, or"),
        (lambda run: run.velocity(STATES, "x", 7), "t has dtype <U1; give floats"),
        (lambda run: run.velocity(STATES[:, :2], 0.5, 7), r"x has shape \[3, 2, 4, 4\]; this run"),
        (lambda run: run.velocity(STATES, 0.5, [1, 2]), "labels has 2 classes for 3 rows; give"),
        (lambda run: run.velocity(STATES, 0.5, 10), "labels=10: there is no such class"),
        (lambda run: run.velocity(STATES, 0.5, "seven"), "labels=seven: there is no class of"),
        (lambda run: run.features(STATES), r"images has shape \[3, 4, 4, 4\]"),
        (lambda run: run.features(np.zeros((2, 16, 16, 3))), "images are float32; features are of"),
        (lambda run: run.features(STATES, "x"), "no features 'x'; use one of judge, "),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(call, says, run):
    with pytest.raises(UserError, match=says):
        call(run)


def test_times_without_a_velocity_are_refused(small_run, tmp_path):
    shutil.copytree(small_run / "diffusion", tmp_path / "diffusion")
    path = tmp_path / "diffusion" / "config.json"
    made = read_json(path)
    made["config"]["diffusion"]["flow"]["prediction"] = "score"
    write_json(path, made)
    with pytest.raises(
        UserError, match=r"t is 0; this model has velocities for t in \[0.001, 0.999\]"
    ):
        gae_jax.load(tmp_path).velocity(STATES, [0.5, 0.5, 0], 7)


def test_a_model_without_a_null_class_needs_labels(small_run, tmp_path):
    shutil.copytree(small_run / "diffusion", tmp_path / "diffusion")
    path = tmp_path / "diffusion" / "config.json"
    made = read_json(path)
    made["config"]["diffusion"]["model"]["class_dropout_prob"] = 0.0
    write_json(path, made)
    with pytest.raises(UserError, match="labels=None is without a class, but the diffusion model"):
        gae_jax.load(tmp_path).velocity(STATES, 0.5)
