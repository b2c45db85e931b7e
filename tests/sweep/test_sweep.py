"""Sweeps: every point is run once, what they share is computed once, and the table tells all."""

import csv
import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from gae_jax.config.precision import settings
from gae_jax.run.run import Run, StageFolder
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json
from gae_jax.sweep import Metric, Point, Sweep, main, running
from gae_jax.sweep.definition import configs_of, load_sweep
from gae_jax.sweep.outcomes import collect
from gae_jax.sweep.running import SweepSession, link_tree, run_all
from gae_jax.sweep.table import write_table
from gae_jax.train.log import read_metrics

ONE = tuple(jax.devices()[:1])
FILES = sorted((ROOT / "configs" / "sweeps").glob("*.py"))

SWEEP = """
from gae_jax.sweep import Metric, Point, Sweep

def get_sweep():
    return Sweep(
        title="Weight of the semantic term",
        config="{root}/tests/small.py",
        points=(
            Point("none", {{"tokenizer.losses.align": 0.0}}),
            Point("broken", {{"diffusion.model.num_classes": 9}}),
            Point("some", {{"tokenizer.losses.align": 1.0}}),
        ),
        seeds=(0,),
        commands=(
            *("backbone", "teacher", "teacher-probe"),
            *("tokenizer", "latent-probe", "evaluate"),
        ),
        overrides={{
            "tokenizer.losses.gan": 0.0,
            "tokenizer.losses.perceptual": 0.0,
            "tokenizer.health.probe": 0,
            "tokenizer.train.steps": 2,
            "evaluate.noise_levels": (0.0, 0.5),
        }},
        metrics=(
            Metric("PSNR", "tokenizer.psnr"),
            Metric("PSNR at 0.5", "tokenizer.noise_psnr.1"),
            Metric("teacher", "flat", "{{:.1%}}", folder="teacher-probe"),
            Metric("mean", "mean", "{{:.1%}}", folder="latent-probe"),
        ),
        source="Table 6",
        paper={{"some": {{"LP": "69.2"}}}},
        expectation="the more the better.",
        check=lambda means: [("more is better", means["some"]["PSNR"] > means["none"]["PSNR"])],
        noise=True,
        curves=(
            Metric("loss", "total", "{{:.2f}}", "tokenizer"),
            Metric("never measured", "eval/none", folder="tokenizer"),
        ),
    )
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweeps") / "weights.py"
    path.write_text(SWEEP.format(root=ROOT))
    return path


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    """(sweep, directory, table as text) of a sweep that was run; do not change it."""
    workdir = tmp_path_factory.mktemp("runs")
    sweep = load_sweep(file)
    assert run_all(sweep, workdir, configs_of(sweep), devices=ONE) == 1
    text = write_table(sweep, workdir, collect(sweep, workdir), "python launch/sweep.py FILE")
    return sweep, workdir, text


def small_sweep(**changes) -> Sweep:
    given = dict(
        title="",
        config=f"{ROOT}/tests/small.py",
        points=(Point("a", {"data.workers": 1}), Point("b", {"data.workers": 3})),
        metrics=(Metric("PSNR", "tokenizer.psnr"),),
        commands=("tokenizer",),
    )
    return Sweep(**given | changes)


def test_a_run_that_fails_is_told_of_and_the_others_go_on(done):
    sweep, workdir, text = done
    assert "classes" in (workdir / "broken-seed0" / "error.txt").read_text()
    assert [outcome.state for outcome in collect(sweep, workdir)] == [
        "finished",
        "failed",
        "finished",
    ]
    assert "broken: seed 0 failed: the data has 10 classes" in text
    page = (workdir / "table.html").read_text()
    assert "seed 0 failed: the data has 10 classes" in page
    assert "0 of 1" in page


def test_the_csv_has_every_run_and_their_means(done):
    _, workdir, _ = done
    with (workdir / "table.csv").open(newline="") as opened:
        rows = {(row["point"], row["seed"]): row for row in csv.DictReader(opened)}
    for name in ("none", "some"):
        result = read_json(workdir / f"{name}-seed0" / "evaluate" / "result.json")["tokenizer"]
        assert float(rows[name, "0"]["PSNR"]) == result["psnr"]
        assert float(rows[name, "mean"]["PSNR at 0.5"]) == result["noise_psnr"][1]
        probe = read_json(workdir / f"{name}-seed0" / "teacher-probe" / "result.json")
        assert float(rows[name, "max"]["teacher"]) == probe["flat"]
    assert rows["broken", "0"]["state"] == "failed"
    assert rows["some", "paper"]["paper: LP"] == "69.2"
    assert rows["none", "0"]["tokenizer.losses.align"] == "0.0"


def test_every_point_that_was_evaluated_has_a_picture(done):
    _, workdir, _ = done
    pictures = {path.stem: Image.open(path) for path in (workdir / "pictures").iterdir()}
    assert set(pictures) == {"none", "some"}
    assert all(picture.width > 300 for picture in pictures.values())
    # the strip of real images is the same, that of the reconstructions is not
    first, second = (np.asarray(picture.convert("RGB")) for picture in pictures.values())
    assert first.shape == second.shape
    assert not np.array_equal(first, second)


def test_what_was_measured_in_training_is_drawn_against_steps(done):
    _, workdir, _ = done
    with (workdir / "curves.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert {row["metric"] for row in rows} == {"loss"}
    assert {row["point"] for row in rows} == {"none", "some"}
    for name in ("none", "some"):
        run = Run(workdir / f"{name}-seed0")
        expected = {
            line["step"]: line["total"] for line in read_metrics(run.stage("tokenizer").path)
        }
        curve = {int(row["step"]): float(row["value"]) for row in rows if row["point"] == name}
        assert curve == expected
    picture = np.asarray(Image.open(workdir / "curves.png").convert("RGB"))
    assert picture.shape[0] > 200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    page = (workdir / "table.html").read_text()
    assert "training steps" in page
    assert "never measured" not in page


def test_many_changed_fields_are_folded_away(done, tmp_path):
    sweep, workdir, _ = done
    many = {f"tokenizer.losses.{name}": 0.0 for name in ("align", "gan", "kl", "l1", "structure")}
    points = [dataclasses.replace(point, overrides=many) for point in sweep.points[:1]]
    more = dataclasses.replace(sweep, points=[*points, *sweep.points[1:]], check=None)
    write_table(more, tmp_path, collect(more, workdir), "")
    page = (tmp_path / "table.html").read_text()
    assert page.count("<details><summary>5 fields changed</summary>") == 1
    assert "<code>tokenizer.losses.structure=0</code>" in page


def test_the_page_is_one_file_with_table_charts_and_pictures(done):
    _, workdir, text = done
    page = (workdir / "table.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "url(http" not in page
    assert page.count("<svg") == 3
    # two points and the real images, the two with noise, the two latents
    assert page.count("<img") == 3 + 2 + 2
    assert "the paper, Table 6 (quoted)" in page
    assert "*69.2*" in text
    assert "| point |" in (workdir / "table.md").read_text()


def test_what_two_points_share_is_computed_once(done):
    _, workdir, _ = done
    first, second = workdir / "none-seed0", workdir / "some-seed0"
    for stage, shared in (("backbone", True), ("teacher-probe", True), ("tokenizer", False)):
        one, other = (read_json(run / stage / "done.json")["seconds"] for run in (first, second))
        assert (one == other) is shared, stage
    assert not list(workdir.glob("*/.*"))


def test_a_second_call_runs_nothing(done, tmp_path, caplog):
    sweep, workdir, _ = done
    again = shutil.copytree(workdir, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in again.rglob("done.json")}
    caplog.set_level(logging.INFO)
    assert run_all(sweep, again, configs_of(sweep), devices=ONE) == 1
    assert {path: path.stat().st_mtime_ns for path in again.rglob("done.json")} == before
    assert len(re.findall("some-seed0  .*: finished before", caplog.text)) == 6


def test_orders_are_compared_once_every_run_has_its_figures(done, tmp_path):
    sweep, workdir, text = done
    assert "more is better" not in text
    whole = dataclasses.replace(sweep, points=(sweep.points[0], sweep.points[2]))
    text = write_table(whole, tmp_path, collect(whole, workdir), "")
    assert re.search("more is better: (agrees|does not agree)\n", text)
    assert "Against the paper" in (tmp_path / "table.html").read_text()


def test_samples_are_shown(done, tmp_path):
    sweep, workdir, _ = done
    again = shutil.copytree(workdir, tmp_path / "again")
    grid = again / "some-seed0" / "sample" / "sde" / "grid.png"
    grid.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(grid)
    write_table(sweep, again, collect(sweep, again), "")
    page = (again / "table.html").read_text()
    assert "some, sde" in page
    assert page.count("<img") == 3 + 2 + 2 + 1


def test_a_failure_is_forgotten_when_the_run_succeeds(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    sweep = small_sweep()
    calls = []

    def run_stages(sweep, session):
        calls.append(session.run.path.name)
        if len(calls) == 1:
            raise ZeroDivisionError("of the test")
        session.run.stage("tokenizer").finish()

    monkeypatch.setattr(running, "run_stages", run_stages)
    configs = configs_of(sweep)
    assert run_all(sweep, tmp_path, configs, devices=ONE) == 1
    error = (tmp_path / "a-seed0" / "error.txt").read_text()
    assert error.startswith("Traceback")
    assert "a: seed 0 failed: ZeroDivisionError: of the test" in write_table(
        sweep, tmp_path, collect(sweep, tmp_path), ""
    )
    assert run_all(sweep, tmp_path, configs, devices=ONE) == 0
    assert not (tmp_path / "a-seed0" / "error.txt").exists()
    assert calls == 2 * ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    assert "run 4 of 4: b seed 1, 0:00 left" in caplog.text


def test_runs_of_a_sweep_are_computed_as_single_commands_are(tmp_path, monkeypatch):
    """precision.preset "auto" means the same in a sweep: bfloat16 on a GPU."""
    dtypes = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def run_stages(sweep, session):
        dtypes.append(settings(session.config, "teacher")["dtype"])

    monkeypatch.setattr(running, "run_stages", run_stages)
    sweep = small_sweep()
    run_all(sweep, tmp_path, configs_of(sweep), devices=ONE)
    assert dtypes == ["bfloat16"] * 4


SHORT = """
from gae_jax.sweep import Metric, Point, Sweep

def get_sweep():
    short = {{"backbone.train.steps": 4, "backbone.train.save_every": 2, "backbone.train.keep": 9}}
    return Sweep(
        title="", config="{root}/tests/small.py", seeds=(0,), commands=("backbone",),
        points=(Point("a", {{"data.mirror": False}}), Point("b", {{"data.mirror": True}})),
        metrics=(Metric("PSNR", "tokenizer.psnr"),), overrides=short,
    )
"""


def test_one_run_goes_on_with_changes_that_it_keeps(tmp_path, capsys, monkeypatch):
    file, workdir = tmp_path / "short.py", tmp_path / "runs"
    file.write_text(SHORT.format(root=ROOT))
    start = running.run_all
    monkeypatch.setattr(
        "gae_jax.sweep.command_line.run_all",
        lambda *arguments, **more: start(*arguments, **more, devices=ONE),
    )

    def swept(*flags, status=0):
        assert main([str(file), f"--workdir={workdir}", *flags]) == status
        stages = [Run(workdir / f"{name}-seed0").stage("backbone") for name in "ab"]
        return [(stage.done["step"], stage.done["fingerprint"]) for stage in stages]

    first = swept()
    assert [step for step, _ in first] == [4, 4]
    longer = "--config.backbone.train.steps=6"
    assert swept("--points=a", longer, status=1) == first
    advice = (workdir / "a-seed0" / "error.txt").read_text()
    assert f"{file} --workdir={workdir} --points=a --seeds=0 --amend" in advice
    second = swept("--points=a", longer, "--seeds=0", "--amend")
    assert [step for step, _ in second] == [6, 4]
    assert second[1] == first[1]
    amended = Run(workdir / "a-seed0").stage("backbone").amended
    assert [c["field"] for c in amended[0]["changes"]] == ["backbone.train.steps"]
    assert swept() == second  # the whole sweep, without the flags
    back = swept("--points=a", "--amend", "--from-step=backbone:2")
    assert [step for step, _ in back] == [6, 4]
    assert back[0] != second[0]  # the longer schedule began earlier
    assert back[1] == second[1]
    assert Run(workdir / "a-seed0").stage("backbone").amended[-1]["removed"] == [4, 6]
    assert (workdir / "table.csv").read_text().count("\n") > 2
    capsys.readouterr()
    for flags, says in (
        (["--points=c"], "--points has 'c'; the points are a, b"),
        (["--from-step=latents:3"], "give STAGE:N with a stage that trains"),
        (["--from-step=3"], "e.g. tokenizer:5000"),
    ):
        swept(*flags, status=1)
        assert says in capsys.readouterr().err


def test_stages_are_taken_only_from_equal_and_finished_ones(tmp_path):
    def session(name, seed):
        config = configs_of(small_sweep(), ())["a", seed]
        return SweepSession(config, Run(tmp_path / name), devices=ONE)

    def claim(name, seed=0) -> StageFolder:
        return session(name, seed).open("teacher", sections=("seed", "data"), inputs=())

    first = claim("a")
    (first.path / "weights").write_text("weights")
    assert not claim("b").done, "it is not finished"
    first.finish(seconds=1.0)
    assert not claim("b").done, "what was begun here goes on"
    assert not claim("c", seed=1).done, "another config"
    half = tmp_path / "d" / ".teacher.copy"
    half.mkdir(parents=True)
    (half / "half").touch()
    assert claim("d").done == {"seconds": 1.0}
    assert (tmp_path / "d" / "teacher" / "weights").read_text() == "weights"
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["teacher"]
    for run in ("a", "d"):
        StageFolder(tmp_path / run / "teacher").finish(imported="here")
    assert not claim("e").done, "what was imported is imported again"


def test_files_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    def link(*_):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").read_text() == "x"


def test_a_change_reaches_every_point_and_none_is_undone(file):
    sweep = load_sweep(file)
    for config in configs_of(sweep).values():
        assert config.tokenizer.train.steps == 2
    changed = configs_of(sweep, ["--config.tokenizer.train.steps=3"])
    assert {config.tokenizer.train.steps for config in changed.values()} == {3}
    assert [c.tokenizer.losses.align for c in changed.values()] == [0.0, 1.0, 1.0]
    for path in ("tokenizer.losses.align", "seed"):
        with pytest.raises(ConfigError, match=f"{path}: the runs of this sweep differ in it"):
            configs_of(sweep, [f"--config.{path}=1"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"tokenizer.losses.algn": 1.0}, r"point a: .*did you mean tokenizer.losses.align\?"),
        ({"tokenizer.train.steps": 0.5}, "point a: tokenizer.train.steps: "),
        ({"tokenizer.losses": 1.0}, "no field tokenizer.losses"),
        ({"data.image_size": 64}, "point a: .*image_size is 16 but data.image_size is 64"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(overrides, says):
    with pytest.raises(ConfigError, match=re.compile(says, re.DOTALL)):
        configs_of(small_sweep(points=(Point("a", overrides),)))


def test_points_are_named_once_and_as_directories():
    with pytest.raises(ConfigError, match="each once"):
        small_sweep(points=(Point("a", {}), Point("a", {})))
    with pytest.raises(ConfigError, match="directories"):
        small_sweep(points=(Point("a/b", {}),))
    with pytest.raises(ConfigError, match="the paper's figures name no point"):
        small_sweep(paper={"c": {"LP": "1"}})


def listed(capsys, *arguments) -> list[str]:
    assert main([*arguments, "--list"]) == 0
    return [line.split()[1] for line in capsys.readouterr().out.splitlines()]


def test_the_tasks_of_a_job_array_share_the_runs(file, capsys, monkeypatch):
    whole = listed(capsys, str(file), "--seeds=0,1")
    assert len(whole) == 6
    assert whole[0] == "runs/sweeps/weights/none-seed0"
    parts = [listed(capsys, str(file), "--seeds=0,1", f"--task={i}", "--tasks=4") for i in range(4)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    for name, value in (("ID", 6), ("MIN", 5), ("STEP", 1), ("COUNT", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert listed(capsys, str(file), "--seeds=0,1") == whole[1::2]


def test_the_command_line_only_writes_the_table_if_asked(done, file, tmp_path, capsys):
    _, workdir, _ = done
    again = shutil.copytree(workdir, tmp_path / "again")
    (again / "table.html").unlink()
    assert main([str(file), f"--workdir={again}", "--table"]) == 0
    assert str(again / "table.html") in capsys.readouterr().out
    assert (again / "table.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.py"], "there is no sweep none.py"),
        (["tests/small.py"], "no function get_sweep"),
        (["FILE", "--tabel"], "--tabel is not understood"),
        (["FILE", "--config.seed", "1"], "--config.seed is not understood"),
        (["FILE", "--task=1"], "--task and --tasks together"),
        (["FILE", "--task=2", "--tasks=2"], "task 2 is none of 2"),
        (["FILE", "--seeds=many"], "give integers"),
        (["FILE", "--seeds=4294967296"], "--seeds has 4294967296; it must be from 0 to"),
        (["FILE", "--task=0", "--tasks=0"], "--tasks is 0; it must be at least 1"),
        (["FILE", "--task=-1", "--tasks=2"], "--task is -1; it must be at least 0"),
        (["FILE", "--task=nan", "--tasks=2"], "argument --task: invalid int value"),
        (["FILE", "--config.data.nothing=1"], "nothing"),
    ],
)
def test_what_cannot_be_understood_is_named(arguments, says, file, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([str(file) if x == "FILE" else x for x in arguments]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("ID", "x"), ("STEP", "0"), ("COUNT", "0"), ("MIN", "-1"), ("ID", "")]
)
def test_variables_of_slurm_that_are_no_numbers_are_named(name, value, file, capsys, monkeypatch):
    monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert main([str(file), "--list"]) == 1
    assert f"SLURM_ARRAY_TASK_{name} is {value!r}" in capsys.readouterr().err


def test_help_suffices_and_the_launcher_finds_the_package(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), "--help"]
    text = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    flags = ("--points", "--amend", "--from-step", "--seeds", "--config.KEY")
    for word in ("FILE", "--workdir", "--list", "--table", "--task", *flags):
        assert word in text
    with pytest.raises(UserError, match=r"alignment.py"):
        load_sweep(ROOT / "configs" / "sweeps" / "none.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_sweep_fits_the_configs(path, monkeypatch):
    """Overrides name existing fields, and the check reads the columns that there are."""
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path)
    assert len(configs_of(sweep)) == len(sweep.points) * len(sweep.seeds)
    means = {p.name: {metric.label: 0.5 for metric in sweep.metrics} for p in sweep.points}
    assert all(statement for statement, _ in sweep.check(means)) if sweep.check else True
    if sweep.source:  # a table of the paper
        assert sweep.check
        assert sweep.paper
        assert sweep.expectation
    if sweep.lines:
        assert sweep.lines in means[sweep.points[0].name]
