"""`evaluate-samples`: what can be refused is refused before any feature is computed."""

import json
import os

import numpy as np
import pytest
from remedies import commands_in
from test_generation import IMAGES, LABELS, D, small_extractor

from gae_jax.commands import cli, evaluate_samples
from gae_jax.evaluation import references
from gae_jax.evaluation.archives import write_samples
from gae_jax.evaluation.extractors import each_batch
from gae_jax.evaluation.presets import PRESETS
from gae_jax.evaluation.stored_statistics import write_statistics
from gae_jax.run.run import Run
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import read_json


@pytest.fixture
def asked(monkeypatch):
    """The sizes of the batches that features are asked of, with a small extractor."""
    sizes = []

    def small(options, metrics, mesh):
        return {"inception": small_extractor(PRESETS[options.preset].front_end)}

    def spy(*arguments, size, **more):
        sizes.append(size)
        return each_batch(*arguments, size=size, **more)

    monkeypatch.setattr(evaluate_samples, "extractors_of", small)
    monkeypatch.setattr("gae_jax.evaluation.extractors.each_batch", spy)
    monkeypatch.setattr(references, "each_batch", spy)
    return sizes


@pytest.fixture
def archives(tmp_path):
    """Sets of samples and statistics, good and bad."""
    folder = tmp_path / "sets"
    folder.mkdir()
    write_samples(folder / "all.npz", [IMAGES], LABELS)
    write_samples(folder / "few.npz", [IMAGES[:8]], LABELS[:8])
    write_samples(folder / "three.npz", [IMAGES[:3]], LABELS[:3])
    write_samples(folder / "one.npz", [IMAGES[:1]], LABELS[:1])
    mean, covariance = np.zeros(D), np.eye(D)
    facts = dict(count=60, front_end="tf", facts={})
    write_statistics(folder / "stats.npz", {"pool": (mean, covariance)}, **facts)
    write_statistics(folder / "wide.npz", {"pool": (np.zeros(D + 1), np.eye(D + 1))}, **facts)
    bad = np.diag([1.0] * (D - 1) + [-1.0])
    write_statistics(folder / "negative.npz", {"pool": (mean, bad)}, **facts)
    write_statistics(
        folder / "other.npz", {"pool": (mean, covariance)}, **facts | {"front_end": "pytorch_fid"}
    )
    return folder


def run(samples, reference, *more, out):
    where = (f"--samples={samples}", f"--ref={reference}", f"--out={out}")
    return cli.main(["gae_jax", "evaluate-samples", *where, *map(str, more)])


@pytest.mark.parametrize("name", ["inception", "lpips"])
def test_a_run_without_the_network_says_what_it_has_and_how_to_import_it(name, tmp_path):
    folder = Run(tmp_path).stage("tokenizer")
    folder.open({"seed": 0}, {}, fresh=False)
    folder.finish()
    options = evaluate_samples.parse(["--samples=x", "--ref=y", f"--{name}={tmp_path}"])
    load = {
        "inception": lambda: evaluate_samples.extractors_of(options, ("fid",), None),
        "lpips": lambda: evaluate_samples.imported("lpips", options.lpips),
    }
    with pytest.raises(UserError) as error:
        load[name]()
    text = f"--{name}={tmp_path}: this run has tokenizer, but no {name}; import it with: "
    assert str(error.value).startswith(text)
    (command,) = commands_in(str(error.value))
    assert cli.parse(["gae_jax", *command])[0] == "import-torch"


@pytest.mark.parametrize(
    ("samples", "reference", "more", "says"),
    [
        ("few", "all", ["--metrics=fid"], "fid: 8 images are too few for a covariance of 12"),
        ("one", "all", ["--metrics=fid", "--allow-few"], "fid: 1 images are too few"),
        ("all", "one", ["--metrics=fid"], "give a reference that has them, or at least two"),
        ("all", "wide", ["--metrics=fid"], "holds statistics of 13 dimensions, and inception pool"),
        (
            "all",
            "negative",
            ["--metrics=fid"],
            "negative.npz: statistics: the covariance has the eigenvalue -1",
        ),
        ("all", "other", ["--metrics=fid"], "holds statistics of the front end 'pytorch_fid'"),
        ("all", "stats", ["--metrics=sfid"], "has no statistics of inception spatial"),
        ("all", "stats", ["--metrics=kid"], "holds statistics alone, and kid compares images"),
        ("all", "gone", ["--metrics=fid"], "gone.npz does not exist"),
        ("gone", "all", ["--metrics=fid"], "gone.npz"),
        ("all", "all", ["--metrics=kid"], "pass --kid-subset-size=60, or less"),
        ("all", "few", ["--metrics=kid"], "pass --kid-subset-size=8, or less"),
        ("all", "one", ["--metrics=kid"], "60 images and 1 of the reference; draw more, or leave"),
        ("all", "three", ["--metrics=recall"], "have no 3 neighbours each; give at least 4"),
        ("all", "all", ["--metrics=inception_score"], "60 images do not divide into splits of"),
        (
            *("all", "all", ["--metrics=inception_score", "--splits=7"]),
            "60 images do not divide into 7 equal splits",
        ),
        (
            *("few", "all", ["--metrics=inception_score", "--preset=torch_fidelity"]),
            "8 images in 10 splits; draw more, or pass --splits=8",
        ),
        ("all", "few", ["--preset=rae_recon"], "must be the same images in the same order"),
        ("one", "one", ["--preset=rae_recon"], "an rFID needs at least two"),
        ("all", "all", ["--preset=rae_recon", "--splits=2"], "--splits is for generated images"),
        ("all", "all", ["--batch-size=0"], "--batch-size is 0; it must be at least 1"),
        ("all", "all", ["--kid-subset-size=1"], "--kid-subset-size is 1; it must be at least 2"),
        ("all", "all", ["--splits=0"], "--splits is 0; it must be at least 1"),
        ("all", "all", ["--batch-size=many"], "argument --batch-size: invalid int value"),
    ],
)
def test_refusals_cost_nothing(samples, reference, more, says, asked, archives, tmp_path, capsys):
    out = tmp_path / "out"
    paths = (archives / f"{samples}.npz", archives / f"{reference}.npz")
    assert run(*paths, *more, out=out) == 1
    assert says in capsys.readouterr().err.replace("\n  ", " ")
    assert not asked
    assert not out.exists()


@pytest.mark.parametrize("preset", ["adm", "rae_recon"])
def test_a_place_that_cannot_be_written_is_refused_first(preset, asked, archives, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    more = ("--metrics=fid",) if preset == "adm" else ()
    paths = (archives / "all.npz", archives / "all.npz")
    assert run(*paths, f"--preset={preset}", *more, out=tmp_path / "file" / "x") == 1
    text = capsys.readouterr().err
    assert "a file lies where a folder is wanted" in text
    assert "--out=" in text
    assert not asked
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        return  # the superuser writes everywhere
    assert run(*paths, f"--preset={preset}", *more, out=locked) == 1
    assert not asked


def test_a_batch_is_no_larger_than_the_set(asked, archives, tmp_path):
    assert run(archives / "all.npz", archives / "few.npz", "--metrics=recall", out=tmp_path) == 0
    assert asked == [8, 64]  # of eight devices, whose multiple 60 images are rounded up to
    asked.clear()
    more = ("--metrics=recall", "--batch-size=16")
    assert run(archives / "all.npz", archives / "few.npz", *more, out=tmp_path) == 0
    assert asked == [8, 16]


def test_the_remedies_of_refusals_work(asked, archives, tmp_path):
    every = archives / "all.npz"
    assert run(every, every, "--metrics=kid", "--kid-subset-size=60", out=tmp_path / "a") == 0
    found = read_json(tmp_path / "a" / "result.json")
    assert found["manifest"]["kid_subset_size"] == 60
    assert set(found["metrics"]) == {"kid_60"}
    more = ("--metrics=inception_score", "--splits=1")
    assert run(every, every, *more, out=tmp_path / "b") == 0
    found = read_json(tmp_path / "b" / "result.json")
    assert found["manifest"]["inception_splits"] == 1
    one = found["parts"]["inception_score_60.one_split"]
    np.testing.assert_allclose(found["metrics"]["inception_score_60"], one)
    few = archives / "few.npz"
    more = ("--metrics=inception_score", "--preset=torch_fidelity", "--splits=8")
    assert run(few, every, *more, out=tmp_path / "c") == 0
    assert run(few, every, "--metrics=fid", "--allow-few", out=tmp_path / "d") == 0


def test_figures_are_not_lost_where_the_disk_fills_up(
    asked, archives, tmp_path, capsys, monkeypatch
):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gae_jax.runtime.files.write_json", full_disk)
    every = archives / "all.npz"
    assert run(every, every, "--metrics=fid", out=tmp_path / "a") == 1
    text = capsys.readouterr()
    assert "No space left on device" in text.err
    assert "Traceback" not in text.err
    assert "fid_60" in text.out
    result = json.loads(text.out[text.out.index("{") :])
    assert set(result["metrics"]) == {"fid_60"}


def test_a_damaged_set_is_no_traceback(archives, tmp_path, capsys):
    content = (archives / "all.npz").read_bytes()
    (archives / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut.npz"):
        evaluate_samples.evaluate_samples(
            evaluate_samples.parse(
                [f"--samples={archives / 'cut.npz'}", f"--ref={archives / 'all.npz'}"]
            )
        )
