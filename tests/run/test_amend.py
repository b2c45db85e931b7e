"""Stages go on with changes, and what an error advises works word for word."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT
from figures import figures_of
from PIL import Image
from remedies import flags_in

from gae_jax.commands.cli import main
from gae_jax.run.amendments import DATA
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.stages import backbone
from gae_jax.train import fit as loop
from gae_jax.train.checkpoint import latest_step, load_weights
from gae_jax.train.log import read_metrics

CONFIG = "--config=tests/small.py"
TINY = (
    "--config.backbone.train.batch_size=8",
    "--config.backbone.train.save_every=2",
    "--config.backbone.train.keep=9",
    "--config.backbone.vit.embed_dim=8",
    "--config.tokenizer.model.embed_dim=8",
    "--config.teacher.model.latent_dim=2",
    "--config.tokenizer.model.latent_dim=2",
)
CONSTANT = (
    "--config.backbone.optim.learning_rate=1e-3",
    "--config.backbone.optim.end_learning_rate=1e-3",
)


@pytest.fixture
def train(tmp_path, capsys, monkeypatch):
    """Runs ``backbone`` in a run directory of its own; gives (status, what it says)."""
    monkeypatch.chdir(ROOT)
    start = Session.start.__func__
    one = {"devices": tuple(jax.devices()[:1])}  # compiles faster than for all eight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Session,
            "start",
            classmethod(lambda cls, *args, **more: start(cls, *args, **more, **one)),
        )
        yield functools.partial(run_command, capsys, tmp_path)


def run_command(capsys, tmp_path, *flags, run="run", command="backbone"):
    """(status, what it says) of a command in the run directory of this name."""
    capsys.readouterr()
    status = main(["gae_jax", command, CONFIG, f"--workdir={tmp_path / run}", *TINY, *flags])
    return status, capsys.readouterr().err


@pytest.fixture
def stopped_at(monkeypatch):
    """Has the next training stop as after SIGTERM, at a step."""

    def stop(step):
        calls = iter(range(1, 1000))
        monkeypatch.setattr(loop.Notice, "due", lambda self: next(calls) == step)

    return stop


def folder_of(tmp_path, run="run"):
    return Run(tmp_path / run).stage("backbone")


def steps_of(folder):
    return [row["step"] for row in read_metrics(folder.path)]


def weights_of(folder):
    return load_weights(folder.path, "params", "backbone")[0]


def assert_same(a, b):
    assert json.dumps(_digest(a)) == json.dumps(_digest(b))


def _digest(tree):
    if isinstance(tree, dict):
        return {key: _digest(value) for key, value in sorted(tree.items())}
    return np.asarray(tree).tobytes().hex()


def test_after_nan_each_advice_is_taken(train, tmp_path, stopped_at, monkeypatch):
    stopped_at(4)
    assert train()[0] == 143
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    true = backbone.losses.cross_entropy
    monkeypatch.setattr(backbone.losses, "cross_entropy", lambda *a: true(*a) * np.nan)
    status, says = train()
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert status == 1
    assert "Last good checkpoint: step 4" in says
    lines = [line for line in says.splitlines() if line.strip().startswith("--config.")]
    assert len(lines) == 2
    back = [flag for flag in flags_in(says) if flag.startswith("--from-step")]
    assert back == ["--from-step=2"]
    before = tmp_path / "run"
    for index, line in enumerate([*lines, f"{lines[1]} {back[0]}"]):
        shutil.copytree(before, tmp_path / f"copy{index}")
        if index == 0:
            status, says = train(*flags_in(line), run="copy0")
            assert status == 1
            assert "--amend" in flags_in(says)
        status, says = train("--amend", *flags_in(line), run=f"copy{index}")
        assert status == 0, says
        (record,) = folder_of(tmp_path, f"copy{index}").done["amended"]
        assert record["step"] == (2 if index == 2 else 4)
        fields = {change["field"] for change in record["changes"]}
        assert fields <= {f"backbone.optim.{name}" for name in (
            "learning_rate", "end_learning_rate", "clip_norm"
        )}  # fmt: skip
    # a kill right after the change: the same command resumes, with clipping's other layout
    shutil.copytree(before, tmp_path / "killed")
    stopped_at(1)  # the checkpoint of step 5 is thrown away: as if it had been killed before it
    assert train("--amend", *flags_in(lines[1]), run="killed")[0] == 143
    shutil.rmtree(folder_of(tmp_path, "killed").path / "checkpoints" / "5")
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    status, says = train(*flags_in(lines[1]), run="killed")
    assert status == 0, says
    found, expected = (
        folder_of(tmp_path, name).done["fingerprint"] for name in ("killed", "copy1")
    )
    assert found == expected


def test_a_finished_training_goes_further_as_if_it_had_never_stopped(train, tmp_path):
    assert train(*CONSTANT)[0] == 0
    more = "--config.backbone.train.steps=8"
    status, says = train(*CONSTANT, more)
    assert status == 1
    assert "--amend" in flags_in(says)
    assert "schedule" in says
    assert folder_of(tmp_path).done, "an error costs nothing"
    assert train(*CONSTANT, more, "--amend")[0] == 0
    assert train(*CONSTANT, more, run="straight")[0] == 0
    folder, straight = folder_of(tmp_path), folder_of(tmp_path, "straight")
    assert folder.done["step"] == 8
    assert folder.done["fingerprint"] == straight.done["fingerprint"]
    assert folder.done["amended"][0]["changes"] == [
        {"field": "backbone.train.steps", "old": 6, "new": 8}
    ]
    assert "amended" not in straight.done
    assert steps_of(folder) == steps_of(straight)
    # nothing differs any more
    assert train(*CONSTANT, more, "--amend")[0] == 0
    assert len(folder.done["amended"]) == 1
    # finished, and nothing to train: said with what would work
    status, says = train(*CONSTANT, more, "--amend", "--config.backbone.label_smoothing=0.2")
    assert status == 1
    again = [flag for flag in flags_in(says) if "steps=" in flag]
    flags = [flag for flag in CONSTANT if flag] + ["--config.backbone.label_smoothing=0.2"]
    assert train(*flags, "--amend", *again)[0] == 0
    # what is built on it says so
    teacher = ("--config.teacher.kind=svd", "--config.teacher.train.batch_size=16")
    assert train(*flags, *again, *teacher, command="teacher")[0] == 0
    built = Run(tmp_path / "run").stage("teacher")
    assert built.done["amended"] == built.marker["amended"] == folder.done["amended"]
    # an SVD is not trained: refused by name
    status, says = train(*flags, *again, *teacher, "--amend", "--config.teacher.svd.images=9",
                         command="teacher")  # fmt: skip
    assert status == 1
    assert "does not train" in says
    assert "--fresh" in flags_in(says)


def test_resume_from_an_earlier_checkpoint_is_exact(train, tmp_path):
    assert train()[0] == 0
    folder = folder_of(tmp_path)
    expected, rows, done = weights_of(folder), figures_of(folder.path), folder.done
    status, says = train("--from-step=3")
    assert status == 1
    assert "kept: 2, 4, 6" in says
    assert folder.done == done
    assert folder.steps == [2, 4, 6]
    assert train("--from-step=2")[0] == 0
    assert_same(weights_of(folder), expected)
    assert figures_of(folder.path) == rows
    assert folder.done["fingerprint"] == done["fingerprint"]
    (record,) = folder.done["amended"]
    assert (record["step"], record["removed"], record["changes"]) == (2, [4, 6], [])
    # another course from there, and back to the old one from before it
    other = "--config.backbone.label_smoothing=0.3"
    assert train("--from-step=4", other)[0] == 1
    assert train("--from-step=4", "--amend", other)[0] == 0
    assert folder.done["fingerprint"] != done["fingerprint"]
    assert [item["step"] for item in folder.amended] == [2, 4]
    assert train("--from-step=2", "--amend")[0] == 0
    assert folder.done["fingerprint"] == done["fingerprint"]
    assert [item["step"] for item in folder.amended] == [2, 2]
    assert not folder.amended[-1]["changes"]


def test_a_kill_while_later_checkpoints_are_removed_is_mended(train, tmp_path):
    assert train()[0] == 0
    folder = folder_of(tmp_path)
    expected, there = weights_of(folder), folder.marker
    (folder.path / "done.json").unlink()
    (folder.path / "config.json").write_text(json.dumps(there | {"rewind": 2}))
    shutil.rmtree(folder.path / "checkpoints" / "4" / "state")  # half of it is gone
    assert train()[0] == 0
    assert_same(weights_of(folder), expected)
    assert "rewind" not in folder.marker


def test_a_change_that_cannot_be_made_costs_nothing(train, tmp_path, stopped_at):
    stopped_at(4)
    assert train()[0] == 143
    folder = folder_of(tmp_path)
    before = sorted(str(p) for p in folder.path.rglob("*")), folder.marker
    for flags, says in (
        (["--config.backbone.vit.num_layers=2"], "backbone.vit.num_layers"),
        (["--config.backbone.train.steps=3"], "--from-step=2"),
        (["--config.backbone.train.steps=1"], "--config.backbone.train.steps=4 or more"),
        (["--from-step=0"], "kept: 2, 4"),
    ):
        status, said = train("--amend", *flags)
        assert status == 1
        assert says in said
        assert (sorted(str(p) for p in folder.path.rglob("*")), folder.marker) == before
    assert train("--amend", "--fresh")[0] == 1
    assert train("--from-step=2", command="latents")[0] == 1
    # the remedy of a step that lies beyond the end
    assert train("--amend", "--config.backbone.train.steps=3", "--from-step=2")[0] == 0
    assert folder.done["step"] == 3


def test_a_wrong_best_metric_is_mended_by_the_flag_that_the_error_gives(train, tmp_path):
    wrong = ["--config.backbone.train.best_metric=eval/fid", "--config.backbone.train.eval_every=2"]
    status, says = train(*wrong)
    assert status == 1
    (flag,) = (flag for flag in flags_in(says) if "best_metric" in flag)
    assert flag == "--config.backbone.train.best_metric=eval/accuracy"
    status, says = train(*wrong, flag)
    assert status == 0, says
    never = ["--config.backbone.train.best_metric=eval/fid", "--config.backbone.train.eval_every=0"]
    status, says = train(*never, run="never")
    assert status == 1
    status, says = train(*flags_in(says), run="never")
    assert status == 0, says


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in "ab":
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


def test_after_a_damaged_image_each_advice_is_taken(
    train, tmp_path, pictures, stopped_at, monkeypatch
):
    data = ["--config.data.name=folder", f"--config.data.root={pictures}",
            "--config.diffusion.model.num_classes=2"]  # fmt: skip
    stopped_at(4)
    assert train(*data)[0] == 143
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    bad = pictures / "train" / "a" / "3.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:40])
    status, says = train(*data, "--config.backbone.train.steps=8", "--amend")
    assert status == 1
    assert str(bad) in says
    advice = flags_in(says)
    assert "--config.data.on_corrupt=skip" in advice
    assert "--amend" in advice
    data.append("--config.backbone.train.steps=8")
    shutil.copytree(tmp_path / "run", tmp_path / "skipped")
    status, says = train(*data, "--config.data.on_corrupt=skip", run="skipped")
    assert status == 0, says
    bad.unlink()
    status, says = train(*data)
    assert status == 1
    assert "--amend" in flags_in(says)
    status, says = train(*data, "--amend")
    assert status == 0, says
    changes = [c["field"] for item in folder_of(tmp_path).done["amended"] for c in item["changes"]]
    assert DATA in changes
    assert latest_step(folder_of(tmp_path).path) == 8


def test_images_go_back_after_an_accepted_change(train, tmp_path, pictures, stopped_at):
    data = ["--config.data.name=folder", f"--config.data.root={pictures}",
            "--config.diffusion.model.num_classes=2"]  # fmt: skip
    stopped_at(4)
    assert train(*data)[0] == 143
    image = pictures / "train" / "a" / "3.png"
    pixels = image.read_bytes()
    image.unlink()
    stopped_at(1)
    assert train(*data, "--amend")[0] == 143
    folder = folder_of(tmp_path)
    shutil.rmtree(folder.path / "checkpoints" / "5")  # as if a kill had come before it
    image.write_bytes(pixels)
    stopped_at(99)
    status, says = train(*data)
    assert status == 1
    assert "--amend" in flags_in(says)
    status, says = train(*data, "--amend")
    assert status == 0, says
    changes = [change for item in folder.done["amended"] for change in item["changes"]]
    assert [change["field"] for change in changes] == [DATA, DATA]
    assert changes[0]["old"] == changes[1]["new"] != changes[0]["new"]


def test_advice_after_fresh_does_not_cost_the_checkpoint(train, tmp_path):
    metric = "--config.backbone.train.best_metric"
    wrong = [f"{metric}=eval/fid", "--config.backbone.train.eval_every=2"]
    status, says = train("--fresh", *wrong)
    assert status == 1
    assert "leave out --fresh" in says
    assert folder_of(tmp_path).steps == [2]
    unknown = train("--fresh", "--config.backbone.optim.b1=-1", run="empty")
    assert unknown[0] == 1
    assert "leave out --fresh" not in unknown[1]
