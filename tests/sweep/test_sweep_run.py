"""Sweeps over a finished run: only sampling varies, its trained stages are linked."""

import csv
import json
import shutil

import jax
import pytest
from conftest import ROOT

from gae_jax.run.run import Run
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import read_json
from gae_jax.sweep import Metric, main, running
from gae_jax.sweep.outcomes import figure

SWEEP = """
from gae_jax.sweep import Metric, Point, Sweep

def get_sweep():
    return Sweep(
        title="Guidance", config="nobody/reads/this.py", lines="guidance",
        points=(
            Point("some-1", {"sample.ode.guidance": 1.0}),
            Point("some-2", {"sample.ode.guidance": 2.0}),
        ),
        commands=("teacher", "tokenizer", "latents", "diffusion", "sample", "evaluate"),
        overrides={"sample.sets": ("ode",), "evaluate.noise_levels": ()},
        metrics=(
            Metric("guidance", "generation.ode.sampling.guidance", "{:g}"),
            Metric("FD", "generation.ode.fd_vgg16_*|generation.ode.f[d]", "{:.3f}"),
            Metric("FID", "generation.ode.fid*"),
        ),
    )
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "guidance.py"
    path.write_text(SWEEP)
    return path


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    start, devices = running.run_all, tuple(jax.devices()[:1])
    monkeypatch.setattr(
        "gae_jax.sweep.command_line.run_all",
        lambda *arguments, **options: start(*arguments, **options, devices=devices),
    )


def test_sampling_of_a_finished_run_is_swept(small_run, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(file), f"--run={small_run}"]) == 0
    workdir = tmp_path / "runs" / "sweeps" / f"guidance-{small_run.name}"
    runs = [Run(workdir / f"some-{scale}-seed0") for scale in (1, 2)]
    for run in runs:
        for name in ("tokenizer", "latents", "diffusion"):
            assert run.stage(name).done == Run(small_run).stage(name).done
        # linked, not copied
        weights = next((run.path / "diffusion" / "checkpoints").rglob("*/_METADATA"))
        assert weights.samefile(small_run / weights.relative_to(run.path))
        assert read_json(run.path / "sample" / "done.json")["sets"] == ["ode"]
    assert len({run.fingerprint("sample") for run in runs}) == 2
    with (workdir / "table.csv").open(newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if row["seed"] == "0"]
    assert [row["guidance"] for row in rows] == ["1.0", "2.0"]
    for row, run in zip(rows, runs, strict=True):
        result = read_json(run.path / "evaluate" / "result.json")
        assert float(row["FD"]) == result["generation"]["ode"]["fd"]
    assert "FID" not in rows[0]  # no run has one
    assert f"Every point is {small_run} with" in (workdir / "table.html").read_text()

    # the same command computes nothing; other noise is another run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("done.json")}
    assert main([str(file), f"--run={small_run}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("done.json")} == before
    capsys.readouterr()
    assert main([str(file), f"--run={small_run}", "--seeds=0,5", "--list"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == [
        *("finished", "finished", "new", "new")
    ]

    # a directory that was made of other weights
    other = shutil.copytree(small_run, tmp_path / "other")
    done = read_json(other / "diffusion" / "done.json")
    (other / "diffusion" / "done.json").write_text(json.dumps({**done, "seconds": 0}))
    status = main([str(file), f"--run={other}", f"--workdir={workdir}", "--points=some-1"])
    assert status == 1
    assert "does not hold the results of" in (runs[0].path / "error.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.tokenizer.losses.align=3"], "some-1 sets tokenizer.losses.align=3.0"),
        (["--config.data.image_size=32"], "some-1 sets data.image_size=32, which is 16 in"),
        (["--amend"], "--run never trains"),
        (["--run="], "--run is empty"),
        (["--run=nowhere"], "nowhere is no run directory"),
    ],
)
def test_what_would_train_is_refused(small_run, file, arguments, says, tmp_path, capsys):
    workdir = tmp_path / "runs"
    assert main([str(file), f"--run={small_run}", f"--workdir={workdir}", *arguments]) == 1
    assert says in capsys.readouterr().err
    assert not workdir.exists()


def test_a_sweep_of_trainings_is_refused(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [f"--run={small_run}", f"--workdir={tmp_path / 'runs'}"]
    assert main(["configs/sweeps/noise.py", *arguments]) == 1
    assert "d8-noise-0.05 sets " in capsys.readouterr().err


def test_a_run_must_be_finished(small_run, file, tmp_path, capsys):
    run = shutil.copytree(small_run, tmp_path / "half")
    (run / "diffusion" / "done.json").unlink()
    assert main([str(file), f"--run={run}", f"--workdir={tmp_path / 'runs'}"]) == 1
    assert f"python -m gae_jax diffusion {run}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["guidance", "samplers"])
def test_the_sweeps_of_sampling_fit_a_finished_run(name, small_run, tmp_path, monkeypatch, capsys):
    """The first point alone, with a network that has few steps."""
    monkeypatch.chdir(ROOT)
    first = {"guidance": "none-1", "samplers": "ode-euler-5"}[name]
    workdir = f"--workdir={tmp_path / 'runs'}"
    file = f"configs/sweeps/{name}.py"
    assert main([file, f"--run={small_run}", f"--points={first}", workdir]) == 0
    head, _, row = capsys.readouterr().out.splitlines()[2:5]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["FD, small classifier ↓"] != "-"
    assert "VGG16" not in head


def test_a_pattern_names_one_figure(tmp_path):
    folder = tmp_path / "evaluate"
    folder.mkdir()
    figures = {"ode": {"fd_vgg16_10k": 2.5, "fd_other_10k": 3.5, "levels": [1, 2]}}
    (folder / "result.json").write_text(json.dumps({"generation": figures}))
    run = Run(tmp_path)
    assert figure(run, Metric("", "generation.ode.fd_vgg16_*")) == 2.5
    assert figure(run, Metric("", "generation.*.levels.1")) == 2
    assert figure(run, Metric("", "generation.ode.fd_dinov2_*|generation.ode.fd_o*")) == 3.5
    assert figure(run, Metric("", "generation.sde.fd*")) is None
    with pytest.raises(DataError, match=r"fd_other_10k, generation\.ode\.fd_vgg16_10k; name one"):
        figure(run, Metric("FD", "generation.ode.fd_*"))
