"""The evaluate stage: every part of it, from a run directory, in training, and what it refuses."""

import errno
import logging
import re
import shlex
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import small_extractor

from gae_jax.commands import cli
from gae_jax.commands.cli import run_command
from gae_jax.evaluation import diagnostics
from gae_jax.evaluation.frechet import frechet_distance
from gae_jax.run import generation_judge, judges
from gae_jax.run.recorded_config import get_config
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, WriteError
from gae_jax.runtime.files import read_json
from gae_jax.stages import diffusion, evaluate, report
from gae_jax.stages import reference as reference_stage
from gae_jax.train.log import read_metrics


def session(config, path, devices=1, **more):
    return Session(config, Run(path), devices=tuple(jax.devices()[:devices]), **more)


@pytest.fixture
def copy(small_run, tmp_path):
    """A run that is not evaluated yet."""
    copy = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(copy / "evaluate")
    return copy


@pytest.fixture
def with_inception(config, monkeypatch):
    """A small extractor of 16 x 16 pixels instead of Inception."""
    config.evaluate.update(
        features="inception", metrics=("fid", "sfid", "precision", "recall"), allow_few=True
    )

    def small(session, front_end, *, required=True):
        if session.config.evaluate.features != "inception":
            return None
        return small_extractor(front_end, edge=16)

    for module in (evaluate, reference_stage):
        monkeypatch.setattr(module, "inception_of", small)
    for module in (judges, generation_judge):
        monkeypatch.setattr(module, "load_inception", small)
    return config


def test_figures_of_a_run(copy, with_inception):
    folder = evaluate.run(session(with_inception, copy))
    result = read_json(folder.path / "result.json")
    tokenizer = result["tokenizer"]
    assert tokenizer["held_out_images"] == 359
    # without noise the curves begin at the figures themselves
    for name in ("psnr", "ssim", "rfid_359"):
        assert len(tokenizer[f"noise_{name}"]) == 6
        np.testing.assert_allclose(tokenizer[f"noise_{name}"][0], tokenizer[name], rtol=1e-5)
        assert f"noise_area_{name}" in tokenizer
    assert min(tokenizer["noise_rfid_359"]) > 0
    assert tokenizer["noise_psnr"] == sorted(tokenizer["noise_psnr"], reverse=True)
    for name in ("sde", "ode"):
        figures = result["generation"][name]
        assert {"fid_20", "sfid_20", "precision_20", "recall_20", "count"} <= set(figures)
        assert figures["sampling"]["network_calls"] == 3
    facts = result["manifest"]
    assert facts["quantiser"] == "floor128"
    assert facts["weights"] == {"tokenizer": "params", "diffusion": "ema"}
    assert facts["generation"]["front_end"] == "tf"
    assert facts["fingerprints"]["tokenizer"] == Run(copy).stage("tokenizer").done["fingerprint"]
    assert set(result["latents"]) >= {"effective_rank", "gsq", "spectral_energy", "viv"}
    assert all(np.isfinite(value) for value in result["latents"].values())


@pytest.mark.slow  # of one and eight devices test_continuity_of_the_latents compares a figure
def test_devices_change_no_figure(copy, tmp_path, with_inception):
    with_inception.evaluate.update(diagnostics=False, linear_probe="none", noise_levels=(0.0, 0.3))
    found = []
    for devices in (1, 8):
        run = shutil.copytree(copy, tmp_path / str(devices))
        folder = evaluate.run(session(with_inception, run, devices))
        found.append(read_json(folder.path / "result.json"))
    for name, value in found[0]["tokenizer"].items():
        np.testing.assert_allclose(found[1]["tokenizer"][name], value, rtol=1e-3)
    one, eight = (x["generation"]["ode"]["fid_20"] for x in found)
    np.testing.assert_allclose(eight, one, rtol=1e-4)


def test_a_reference_of_the_data_is_what_training_images_are(copy, with_inception):
    inception = Run(copy).stage("inception")
    inception.open({}, {}, fresh=False)
    inception.finish(fingerprint="abc", weights="params")
    path = copy / "reference" / "reference.npz"
    written = reference_stage.write_statistics

    def full(place, **more):
        if place == path:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(place, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_stage, "write_statistics", full)
        patch.setattr(tempfile, "tempdir", str(copy))
        with pytest.raises(WriteError, match="the statistics are kept in") as error:
            reference_stage.run(session(with_inception, copy))
        # the remedy; nothing is computed again
        (command,) = re.findall(r"(mv \S+ \S+) and the same command", str(error.value))
        subprocess.run(shlex.split(command), check=True)
        patch.setattr(reference_stage, "moments_of_images", None)
        folder = reference_stage.run(session(with_inception, copy))
        assert folder.done["images"] == 1438
        assert folder.path / "reference.npz" == path
    with np.load(path) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(file.files)
        assert file["arr_0"].shape == (1438, 16, 16, 3)
    config = with_inception
    config.evaluate.update(diagnostics=False, linear_probe="none", noise_levels=())
    first = read_json(evaluate.run(session(config, copy)).path / "result.json")
    config.evaluate.reference = str(path)
    second = read_json(evaluate.run(session(config, copy, fresh=True)).path / "result.json")
    for name in ("fid_20", "sfid_20", "precision_20", "recall_20"):
        a, b = (x["generation"]["sde"][name] for x in (first, second))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert second["manifest"]["generation"]["reference"] == str(path)
    assert reference_stage.run(session(config, copy)).done["count"] == 1438  # made before
    config.evaluate.crop = "lightningdit"
    with pytest.raises(ConfigError, match="crop 'adm', this config asks for 'lightningdit'"):
        reference_stage.run(session(config, copy))
    config.evaluate.update(crop="adm", generation="pytorch_fid")
    with pytest.raises(ConfigError, match="front_end 'tf', this config asks for 'pytorch_fid'"):
        reference_stage.run(session(config, copy))
    with pytest.raises(ConfigError, match="resizes images for 'pytorch_fid'"):
        evaluate.run(session(config, copy, fresh=True))


def test_the_papers_probe(copy, config):
    config.evaluate.update(linear_probe="sgd", diagnostics=False, noise_levels=(), features="none")
    config.evaluate.sgd_probe.update(epochs=2, batch_size=64, learning_rate=0.1)
    result = read_json(evaluate.run(session(config, copy)).path / "result.json")
    tokenizer = result["tokenizer"]
    for name in ("linear_probe", "linear_probe_mean"):
        assert 0 < tokenizer[name] <= tokenizer[f"{name}_best"] <= 1
        assert tokenizer[f"{name}_top5"] >= tokenizer[name]
    assert result["manifest"]["sgd_probe"]["epochs"] == 2
    assert "generation" not in result


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"features": "inception"}, r"has no such network: pt_inception.*import_torch.inception="),
        ({"lpips": True}, r"has no LPIPS; import VGG16.*vgg16-397923af.pth"),
    ],
)
def test_missing_networks_are_named_with_where_they_are_published(changes, says, copy, config):
    config.evaluate.update(changes)
    with pytest.raises(ConfigError, match=says):
        evaluate.run(session(config, copy))
    assert not (copy / "evaluate" / "result.json").exists()
    # before anything of a whole pipeline is computed, too
    shutil.rmtree(copy / "sample")
    with pytest.raises(ConfigError, match=says):
        run_command("demo", session(config, copy))
    assert not (copy / "sample").exists()


def test_a_run_directory_alone_is_evaluated(small_run, tmp_path, config):
    """Its config is found in it, and flags change single fields."""
    copy = shutil.copytree(small_run, tmp_path / "run")
    assert get_config(str(small_run)).to_dict() == {
        **config.to_dict(),
        # sections that no stage records are the defaults; of precision every stage its part
        **{
            name: get_config(str(small_run))[name].to_dict()
            for name in ("mesh", "bench", "likelihood", "reference", "export_torch", "precision")
        },
    }
    flags = ["--config.evaluate.diagnostics=False", "--config.evaluate.batch_size=120"]
    flags.append("--config.evaluate.linear_probe=none")
    assert cli.main(["gae_jax", "evaluate", str(copy), "--fresh", *flags]) == 0
    found, expected = (read_json(path / "evaluate" / "result.json") for path in (copy, small_run))
    np.testing.assert_allclose(found["tokenizer"]["psnr"], expected["tokenizer"]["psnr"], rtol=1e-5)
    assert "latents" not in found


def test_the_diffusion_model_is_evaluated_while_it_trains(copy, config):
    shutil.rmtree(copy / "diffusion")
    shutil.rmtree(copy / "sample")
    config.evaluate.online.update(images=24, steps=3)
    config.diffusion.train.eval_every = 3
    diffusion.run(session(config, copy))
    rows = {row["step"]: row for row in read_metrics(copy / "diffusion")}
    assert {step for step, row in rows.items() if "eval/fd" in row} == {3, 6}
    assert 0 <= rows[6]["eval/accuracy"] <= 1


def test_the_figures_are_of_the_images_that_were_kept(copy, with_inception):
    """rFID by hand, from what the evaluator returns."""
    here = session(with_inception, copy)
    network, arrays = evaluate.load(here.run.stage("tokenizer"), here.mesh)
    scored = evaluate.tokenizer_evaluator(here, network)
    found = scored(arrays, here.batches("holdout", 100))
    assert len(found.labels) == len(found.latents) == 100
    figures = evaluate.summary(found, ())
    (features,) = found.features.values()
    expected = frechet_distance(features["clean"], features["real"])
    assert figures["rfid_100"] == expected
    again = scored(arrays, here.batches("holdout", 100))
    np.testing.assert_array_equal(again.scores["psnr"], found.scores["psnr"])


def test_a_run_without_samples_has_a_page_too(small_run, tmp_path, config):
    """As an imported tokenizer has: no latents, no diffusion model, nothing trained here."""
    copy = tmp_path / "run"
    for stage in ("backbone", "teacher", "tokenizer"):
        shutil.copytree(small_run / stage, copy / stage)
    for stage in ("backbone", "tokenizer"):
        folder = Run(copy).stage(stage)
        folder.finish(**{**folder.done, "imported": {"files": {}}})
    config.evaluate.update(linear_probe="none", diagnostics=False, noise_levels=(0.0, 0.5))
    here = session(config, copy)
    evaluate.run(here)
    report.run(here)
    result, page = read_json(copy / "result.json"), (copy / "report.html").read_text()
    assert result["tokenizer.psnr"] > 0
    assert not [name for name in result if name.startswith("generation")]
    assert "Weights of backbone, tokenizer were imported" in page
    assert "Generated images" not in page
    assert "The decoder under latent noise" in page


def test_continuity_of_the_latents(copy, config, monkeypatch):
    """With a distance of pixels instead of LPIPS; LPIPS is among the figures then, too."""

    def pixels(*_):
        return lambda a, b: jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))

    monkeypatch.setattr(evaluate, "lpips_of", lambda *_, **__: (pixels, ({}, {})))
    config.evaluate.update(features="none", noise_levels=(), linear_probe="none")
    found = []
    for devices, count in ((1, 20), (8, 20), (1, 1)):
        config.evaluate.continuity_images = count
        here = session(config, copy, devices, fresh=True)
        found.append(read_json(evaluate.run(here).path / "result.json"))
    lpc = [result["latents"]["lpc"] for result in found]
    np.testing.assert_allclose(lpc[0], lpc[1], rtol=1e-4)
    assert lpc[0] > 0
    assert lpc[2] != lpc[0]
    assert found[0]["tokenizer"]["lpips"] > 0


def test_latents_of_any_number_of_channels_have_colours():
    latents = np.random.default_rng(0).standard_normal((5, 4, 4, 6))
    full = diagnostics.latent_colours(latents)
    assert full.shape == (5, 4, 4, 3)
    assert full.dtype == np.uint8
    grey = diagnostics.latent_colours(latents[..., :1])
    np.testing.assert_array_equal(grey[..., 0], grey[..., 1])
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    # the ends are the values under and over which one in a hundred lies
    assert (grey.min(), grey.max()) == (0, 255)
    order = np.argsort(latents[..., 0].ravel())
    ramp = np.int32(grey[..., 0].ravel()[order])
    assert np.all(np.diff(ramp) >= 0) or np.all(np.diff(ramp) <= 0)
    two = diagnostics.latent_colours(latents[..., :2])
    assert np.all(two[..., 2] == 128)
    assert not np.array_equal(two[..., 0], two[..., 1])
    same = diagnostics.latent_colours(np.ones((2, 2, 2, 4)))
    np.testing.assert_array_equal(same, same[0, 0, 0] * np.ones_like(same))


@pytest.mark.parametrize("images", [1, 2])
def test_fewer_latent_tokens_than_colours(images):
    """One image, or two, of one position each."""
    latents = np.random.default_rng(0).standard_normal((images, 1, 1, 4))
    colours = diagnostics.latent_colours(latents)
    assert colours.shape == (images, 1, 1, 3)
    assert np.ptp(colours[..., 0]) == (255 if images == 2 else 0)


@pytest.mark.parametrize("channels", [[0, 1, 2, 3], [1]], ids=["all", "one"])
@pytest.mark.filterwarnings("error")
def test_diagnostics_of_latents_that_are_constant(channels):
    """As a tokenizer gives whose latents, or one channel of them, collapsed."""
    latents = np.random.default_rng(0).standard_normal((12, 4, 4, 4)).astype(np.float32)
    latents[..., channels] = 0.5
    found = diagnostics.diagnostics(latents, np.arange(12) % 2)
    assert np.isfinite(list(found.values())).all()
    without = np.delete(latents, channels, axis=3)
    if without.size:
        other = diagnostics.diagnostics(without, np.arange(12) % 2)["viv"]
        assert 0 < found["viv"] < other
    else:
        assert found["viv"] == 0


def test_figures_of_neighbours_need_two_images_of_a_class(caplog):
    caplog.set_level(logging.INFO)
    latents = np.random.default_rng(0).standard_normal((12, 4, 4, 4))
    found = diagnostics.diagnostics(latents, np.arange(12))
    assert not {"gsq", "class_neighbourhood", "viv"} & set(found)
    assert "no class has two of the images" in caplog.text
