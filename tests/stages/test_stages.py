"""The pipeline end to end at a small size: results, skipping, refusals, the page."""

import logging
import re
import shutil
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from gae_jax.commands.cli import run_command
from gae_jax.commands.table import PIPELINE
from gae_jax.data.latents import LatentSet
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, DataError, UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.stages import diffusion, latents, sample

STABLE = [
    "tokenizer.psnr", "tokenizer.ssim", "tokenizer.rfd",
    "tokenizer.linear_probe", "tokenizer.pixel_probe",
    "generation.accuracy", "generation.accuracy_guided", "generation.accuracy_worst_class",
    "generation.fd", "seconds.total",
]  # fmt: skip


@pytest.fixture
def copy(small_run, tmp_path):
    return shutil.copytree(small_run, tmp_path / "run")


def session(config, path, **more):
    return Session(config, Run(path), devices=tuple(jax.devices()[:1]), **more)


def test_every_figure_has_its_stable_name(small_run):
    result = read_json(small_run / "result.json")
    assert set(STABLE) <= set(result)
    assert all(isinstance(value, int | float) for value in result.values())
    stages = [command for command in PIPELINE if command != "report"]
    seconds = [result[f"seconds.{command}"] for command in stages]
    assert all(value > 0 for value in seconds)
    np.testing.assert_allclose(result["seconds.total"], sum(seconds))
    assert 0 <= result["generation.accuracy_worst_class"] <= result["generation.accuracy"] <= 1


def test_training_leaves_pictures_of_reconstructions(small_run):
    events = b"".join(file.read_bytes() for file in (small_run / "tokenizer/events").iterdir())
    assert b"reconstructions" in events


def test_the_page_is_one_file_that_asks_for_nothing(small_run):
    page = (small_run / "report.html").read_text()

    class Collect(HTMLParser):
        def __init__(self):
            super().__init__()
            self.links, self.tags = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.links += [value for key, value in attributes if key in ("src", "href")]

    found = Collect()
    found.feed(page)
    outside = [link for link in found.links if not link.startswith(("data:", "#"))]
    assert not outside
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert "url(http" not in page
    assert "@import" not in page
    for command in PIPELINE:
        assert f"python -m gae_jax {command} --config=tests/small.py" in page
    for curve in ("perceptual", "align", "discriminator/loss", "cosine_distance", "grad_norm"):
        assert curve in page
    assert found.tags.count("svg") >= 6
    assert found.tags.count("img") >= 2 + 3 + 6


def test_finished_stages_are_skipped(copy, config, caplog):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("done.json")}
    caplog.set_level(logging.INFO)
    run_command("demo", session(config, copy))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("done.json")} == before
    assert len(re.findall("finished before", caplog.text)) == 7


def test_another_config_is_refused_and_only_from_its_stage_on(copy, config):
    config.diffusion.optim.learning_rate = 0.5
    with pytest.raises(UserError, match=r"diffusion.optim.learning_rate: 0.001 there, 0.5 asked"):
        run_command("demo", session(config, copy))


def test_latents_of_another_tokenizer_are_refused(copy, config):
    done = read_json(copy / "tokenizer" / "done.json")
    write_json(copy / "tokenizer" / "done.json", done | {"fingerprint": "91bc"})
    with pytest.raises(UserError) as error:
        latents.run(session(config, copy))
    assert f"made by tokenizer {done['fingerprint']}, this run uses 91bc" in str(error.value)
    shutil.rmtree(copy / "diffusion")
    with pytest.raises(DataError, match=r"made by tokenizer \w+, this run uses 91bc; make them"):
        diffusion.run(session(config, copy))
    with pytest.raises(UserError, match="run first: python -m gae_jax diffusion"):
        sample.run(session(config, copy))


def test_bad_input_costs_no_finished_work(copy, config):
    """--fresh throws nothing away before it is known that the stage can run again."""
    before = read_json(copy / "tokenizer" / "done.json")
    for path, value, says in (
        ("data.root", "/nowhere", "is no directory"),
        ("data.holdout", 0.0, "the holdout split is empty"),
        ("diffusion.model.num_classes", 9, r"has 10 classes.*num_classes=10"),
        ("mesh.fsdp", 3, "does not fit"),
    ):
        bad = config.copy_and_resolve_references()
        *sections, leaf = path.split(".")
        section = bad
        for name in sections:
            section = section[name]
        section[leaf] = value
        if path == "data.root":
            bad.data.name = "folder"
        with pytest.raises(UserError, match=says):
            run_command("tokenizer", session(bad, copy, fresh=True))
    assert read_json(copy / "tokenizer" / "done.json") == before


def test_labels_must_fit_the_classes(copy, config):
    shutil.rmtree(copy / "diffusion")
    config.diffusion.model.num_classes = 5
    with pytest.raises(ConfigError, match=r"made of 10 classes .*num_classes is 5"):
        diffusion.run(session(config, copy))
    (copy / "latents" / "data.json").unlink()  # as of latents that were not made here
    with pytest.raises(DataError, match=r"labels up to 9, but diffusion.model.num_classes is 5"):
        diffusion.run(session(config, copy))


def test_latents_are_the_encodings_with_exact_statistics(small_run, config):
    found = LatentSet.open(small_run / "latents")
    now = session(config, small_run)
    network, arrays = load(now.run.stage("tokenizer"), now.mesh)
    batch = next(now.data.ordered(now.data.source("train"), 8))
    from gae_jax.nn.pixels import to_float

    expected = network(*arrays).encode(to_float(batch["image"]))
    for index in range(8):
        np.testing.assert_allclose(found[index]["latent"][0], expected[index], atol=1e-5)
        assert found[index]["label"] == batch["label"][index]
    values = found.take(np.arange(len(found)))[0].astype(np.float64)
    np.testing.assert_allclose(
        found.manifest["mean"], values.mean((0, 1, 2)), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(found.manifest["std"], values.std((0, 1, 2)), rtol=1e-9)


def test_mirror_images_are_encoded_not_mirrored_latents(copy, config):
    shutil.rmtree(copy / "latents")
    config.data.mirror = True
    # the tokenizer was trained without mirroring: extraction does not care
    now = session(config, copy)
    folder = now.open("latents", sections=("data",), inputs=())
    section = config.latents.to_dict() | dict(batch_size=64, shard_size=4096)
    manifest = latents.extract(now, folder, **section)
    assert manifest["views"] == ["image", "mirror"]
    both = LatentSet.open(folder.path)[0]["latent"]
    assert both.shape[0] == 2
    assert not np.allclose(both[1], both[0][:, ::-1], atol=1e-3)


def test_ones_own_folder_of_images(tmp_path, plain_config):
    """Other classes, formats and sizes; one broken file that is skipped and counted."""
    config = plain_config
    for name, pixels in (("cats", photographs.chelsea()), ("cups", photographs.coffee())):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(12):
            tile = Image.fromarray(pixels[20 * index : 20 * index + 64, :70])
            tile.save(tmp_path / "data" / name / f"{index}.jpg")
    (tmp_path / "data" / "cats" / "0.jpg").write_bytes(b"broken")
    config.data.update(
        name="folder", root=str(tmp_path / "data"), holdout=0.25, mirror=True, on_corrupt="skip"
    )
    config.diffusion.model.num_classes = 2
    for name in ("backbone", "teacher", "tokenizer", "diffusion"):
        config[name].train.update(steps=2, batch_size=8, save_every=2)
    config.sample.update(per_class=4)
    config.evaluate.update(diagnostics=False, linear_probe="none", noise_levels=())
    run_command("demo", session(config, tmp_path / "run"))
    result = read_json(tmp_path / "run" / "result.json")
    done = read_json(tmp_path / "run" / "latents" / "done.json")
    assert done["count"] + done["skipped"] + 6 == 24
    assert result["generation.count"] == 8
    assert "cats" in (tmp_path / "run" / "report.html").read_text()
    with np.load(tmp_path / "run" / "sample" / "sde" / "samples.npz") as file:
        assert file["arr_0"].shape == (8, 16, 16, 3)
