"""Stages know images by what they are: moved ones are the same, changed ones are named."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from small import get_config

from gae_jax.commands.cli import run_command
from gae_jax.data.latents import LatentSet
from gae_jax.run import contents
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, DataError, UserError
from gae_jax.runtime.files import read_json
from gae_jax.stages import diffusion, evaluate, latents, likelihood, report, tokenizer
from gae_jax.sweep.running import SweepSession


def write(folder, *names, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed + len(names))
    for name in names:
        grid = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        grid.resize((16, 16), Image.Resampling.BICUBIC).save(folder / name)


def tiny():
    config = get_config()
    config.data.update(name="folder", holdout=0.25)
    config.tokenizer.losses.update(gan=0.0, perceptual=0.0, align=0.0)
    config.tokenizer.health.update(pictures=0, probe=0)
    config.diffusion.model.num_classes = 2
    for name in ("backbone", "teacher", "tokenizer", "diffusion"):
        config[name].train.update(steps=2, batch_size=8, save_every=1)
    config.sample.update(per_class=2)
    config.evaluate.update(features="none", linear_probe="none", diagnostics=False)
    config.likelihood.update(images=4, batch_size=4)
    return config


def session_of(root, workdir, fresh=False, **changes):
    config = tiny()
    config.data.root = str(root)
    config.update_from_flattened_dict(changes)
    return Session(config, Run(workdir), fresh=fresh, devices=tuple(jax.devices()[:1]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(images, run) with everything up to the diffusion model; copy them to change them."""
    root = tmp_path_factory.mktemp("contents")
    for name in "ab":
        write(root / "data" / name, *(f"{index}.png" for index in range(8)), seed=ord(name))
    session = session_of(root / "data", root / "run")
    for module in (tokenizer, latents, diffusion):
        module.run(session)
    return root


@pytest.fixture
def place(finished, tmp_path):
    """A copy of both, the images at another place."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copytree(finished / "data", tmp_path / "moved" / "images")
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Stages that finish at once: what is tested is whether they may begin."""

    def train(self, folder, stage, *, keep, which, **facts):
        del stage, keep
        folder.finish(seconds=0.0, step=2, fingerprint="new", weights=which, **facts)

    monkeypatch.setattr(Session, "train", train)
    for module in (tokenizer, diffusion):
        monkeypatch.setattr(module, "make_stage", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "evaluate", lambda *arguments: {})


def add_class(place):
    write(place / "moved" / "images" / "c", *(f"{index}.png" for index in range(8)))


def rename_class(place):
    (place / "moved" / "images" / "b").rename(place / "moved" / "images" / "0b")


def add_images(place):
    write(place / "moved" / "images" / "a", "n1.png", "n2.png")


def opened(place, fresh=False, spelling="moved/images", **changes):
    return session_of(place / spelling, place / "run", fresh, **changes)


def unfinish(place, stage, step=None):
    """As an interruption leaves a stage."""
    (place / "run" / stage / "done.json").unlink()
    if step is not None:
        for later in (place / "run" / stage / "checkpoints").iterdir():
            if int(later.name) > step:
                shutil.rmtree(later)


def test_a_folder_records_what_its_stage_read(finished):
    assert set(read_json(finished / "run/tokenizer/data.json")) == {"train", "holdout"}
    recorded = read_json(finished / "run" / "latents" / "data.json")
    assert set(recorded) == {"train"}
    assert recorded["train"]["images"] == 16
    assert [(row["name"], row["count"]) for row in recorded["train"]["classes"]] == [
        ("a", 8),
        ("b", 8),
    ]
    assert read_json(finished / "run" / "diffusion" / "data.json") == recorded
    names = contents.read_contents(Run(finished / "run").stage("latents"))["train"].classes[0]
    assert list(names.sizes()) == [f"{index}.png" for index in range(8)]


def test_moved_images_are_the_same(place, monkeypatch, caplog):
    """Resumed and built upon, also by a path relative to where the program runs."""
    monkeypatch.chdir(place)
    unfinish(place, "tokenizer", step=1)
    shutil.rmtree(place / "run" / "diffusion")
    session = session_of("moved/../moved/images/", place / "run")
    before = read_json(place / "run" / "latents" / "done.json")
    for module in (tokenizer, latents, diffusion, evaluate):
        module.run(session)
    assert read_json(place / "run" / "latents" / "done.json") == before
    warnings = [r.getMessage() for r in caplog.records if r.name == "root" and r.levelno >= 30]
    assert not warnings


def test_a_resumed_training_names_what_changed(place, quick):
    unfinish(place, "tokenizer", step=1)
    add_images(place)
    with pytest.raises(DataError) as error:
        tokenizer.run(opened(place))
    assert "'a' has 2 images more (n1.png, n2.png)" in str(error.value)
    for remedy in (dict(fresh=True), dict()):
        if not remedy:  # they are put back
            for name in ("n1.png", "n2.png"):
                (place / "moved" / "images" / "a" / name).unlink()
            shutil.rmtree(place / "run" / "tokenizer")
        tokenizer.run(opened(place, **remedy))


def test_a_mended_image_does_not_end_a_training(place, quick, caplog):
    unfinish(place, "tokenizer", step=1)
    path = place / "moved" / "images" / "a" / "0.png"
    Image.open(path).resize((40, 40)).save(path)
    tokenizer.run(opened(place))
    assert "tokenizer: resumes with other images: 'a' has 1 image of another size (0.png)" in (
        caplog.text
    )


def test_nothing_was_trained_yet(place, quick):
    """A damaged image that ended the first step may be removed."""
    unfinish(place, "tokenizer", step=0)
    (place / "moved" / "images" / "a" / "0.png").unlink()
    tokenizer.run(opened(place))
    recorded = read_json(place / "run" / "tokenizer" / "data.json")
    assert recorded["train"]["images"] == 15


def test_half_made_latents_are_not_continued_with_other_images(place):
    unfinish(place, "latents")
    rename_class(place)
    with pytest.raises(DataError, match="class 'b' was renamed to '0b'"):
        latents.run(opened(place))
    latents.run(opened(place, fresh=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [(add_class, "class 'c' was added"), (rename_class, "class 'b' was renamed to '0b'")],
)
def test_other_classes_than_those_of_the_latents(place, quick, change, says):
    change(place)
    classes = len(list((place / "moved" / "images").iterdir()))
    changes = {"diffusion.model.num_classes": classes}
    for module, stage in ((evaluate, "evaluate"), (likelihood, "likelihood")):
        with pytest.raises(DataError, match=f"since .*latents was made: {says}"):
            module.run(opened(place, **changes))
        assert not (place / "run" / stage).exists()
    with pytest.raises(DataError, match=f"latents was made of other classes: {says}"):
        latents.run(opened(place))
    with pytest.raises((DataError, ConfigError)) as error:
        diffusion.run(opened(place, True, **changes))
    assert says in str(error.value) or "was made of 2 classes (a, b)" in str(error.value)
    if change is rename_class:
        return
    # the remedy, and what its own errors advise
    latents.run(opened(place, True, **changes))
    with pytest.raises(UserError, match=r"python -m gae_jax diffusion \S+ --fresh"):
        diffusion.run(opened(place, **changes))
    diffusion.run(opened(place, True, **changes))
    evaluate.run(opened(place, **changes))


def test_a_class_that_was_added_is_named_before_another_number_is_advised(place):
    add_class(place)
    with pytest.raises(ConfigError) as error:
        run_command("evaluate", opened(place))
    for says in ("3 classes", "latents was made, class 'c' was added", "put the classes back"):
        assert says in str(error.value)


def test_a_diffusion_model_has_the_classes_of_its_latents(place, quick):
    shutil.rmtree(place / "run" / "diffusion")
    with pytest.raises(ConfigError, match=r"made of 2 classes \(a, b\).*num_classes=2"):
        diffusion.run(opened(place, **{"diffusion.model.num_classes": 3}))
    assert not (place / "run" / "diffusion").exists()
    diffusion.run(opened(place))


def test_a_class_without_latents_is_named(place, caplog):
    """As where no image of it can be read, and such images are skipped."""
    counts = LatentSet.open(place / "run" / "latents").label_counts
    assert counts.tolist() == [6, 6]
    session = opened(place)
    diffusion.warn_of_unseen_classes(session, counts)
    assert not caplog.text
    diffusion.warn_of_unseen_classes(session, counts[:1])
    assert "1 of 2 classes have no latents ('b')" in caplog.text


def test_a_diffusion_model_needs_no_images(place, quick, caplog):
    shutil.rmtree(place / "run" / "diffusion")
    shutil.rmtree(place / "moved")
    caplog.set_level("INFO")
    diffusion.run(opened(place))
    assert "diffusion: the images are not compared: data.root is" in caplog.text
    recorded = [read_json(place / "run" / s / "data.json") for s in ("latents", "diffusion")]
    assert recorded[0] == recorded[1]


def test_a_diffusion_model_goes_on_whatever_happens_to_the_images(place, quick, caplog):
    unfinish(place, "diffusion", step=1)
    add_class(place)
    diffusion.run(opened(place))
    assert "class 'c' was added" in caplog.text


def test_more_images_of_the_same_classes_are_said(place, quick, caplog):
    shutil.rmtree(place / "run" / "diffusion")
    add_images(place)
    for module in (tokenizer, latents, diffusion, evaluate):
        caplog.clear()
        module.run(opened(place))
        assert "'a' has 2 images more (n1.png, n2.png)" in caplog.text
    assert read_json(place / "run" / "latents" / "done.json")["count"] == 12


def test_figures_of_other_images_are_refused(place, quick):
    evaluate.run(opened(place))
    evaluate.run(opened(place))
    add_images(place)
    with pytest.raises(DataError, match=r"evaluate was made of other images: .*n1.png") as error:
        evaluate.run(opened(place))
    assert "remove this folder and run the same command again" in str(error.value)
    shutil.rmtree(place / "run" / "evaluate")
    evaluate.run(opened(place))


@pytest.mark.parametrize("same", [True, False])
def test_a_sweep_shares_stages_of_the_same_images_alone(place, quick, same):
    if not same:
        add_images(place)
    session = opened(place)
    sweep = SweepSession(session.config, Run(place / "other"), devices=session.devices)
    folder = sweep.open("tokenizer", sections=("seed", "data", "tokenizer"), inputs=())
    assert bool(folder.done) == same


def test_runs_of_earlier_versions_go_on(place):
    for path in (place / "run").glob("*/data*"):
        path.unlink()
    unfinish(place, "tokenizer", step=1)
    rename_class(place)
    with pytest.raises(UserError, match="was trained on"):
        tokenizer.run(opened(place))
    (place / "moved" / "images" / "0b").rename(place / "moved" / "images" / "b")
    tokenizer.run(opened(place))
    assert not (place / "run" / "tokenizer" / "data.json").exists()


def test_names_that_are_not_utf8_reach_every_file(place):
    odd = os.fsdecode(b"caf\xe9")
    (place / "moved" / "images" / "b").rename(place / "moved" / "images" / odd)
    shutil.copy(place / "moved/images/a/0.png", place / "moved" / "images" / "a" / f"{odd}.png")
    shutil.rmtree(place / "run" / "diffusion")
    (place / "moved" / "images").rename(place / "moved" / odd)
    session = opened(place, fresh=True, spelling=f"moved/{odd}")
    for module in (latents, evaluate, report):
        module.run(session)
    for path in (place / "run").rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    (place / "run" / "report.html").read_text(encoding="utf-8")
    recorded = contents.read_contents(Run(place / "run").stage("latents"))["train"]
    assert recorded == session.source("train").contents
    assert recorded.class_names == ["a", r"caf\xe9"]
