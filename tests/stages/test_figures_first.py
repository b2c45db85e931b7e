"""Figures that took long: what cannot be scored is refused first, and a full disk loses none."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.evaluation.extractors import Extractor
from gae_jax.evaluation.stored_statistics import write_statistics
from gae_jax.run import judges
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime import files
from gae_jax.runtime.errors import DataError, UserError
from gae_jax.stages import report


def wide(front_end):
    """An extractor with the dimensions of Inception's spaces, which nobody may run."""

    def run(arrays, images):
        assert isinstance(images, jax.core.Tracer), "features were computed"
        sizes = {"pool": 2048, "spatial": 2023, "logits_unbiased": 1008}
        return {space: jnp.zeros((len(images), size)) for space, size in sizes.items()}

    return Extractor("inception", "abc", front_end, run, ({}, {}))


@pytest.fixture
def session(small_run, config, tmp_path, monkeypatch):
    """A run whose samples would be judged by the Inception network."""
    copy = tmp_path / "run"
    for stage in ("sample", "tokenizer", "diffusion", "evaluate"):
        shutil.copytree(small_run / stage, copy / stage)
    config.evaluate.features = "inception"
    monkeypatch.setattr(judges, "load_inception", lambda session, front_end: wide(front_end))
    return Session(config, Run(copy))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(metrics=("fid",)), "20 images are too few .* 2048 .*evaluate.allow_few=True"),
        (dict(metrics=("kid",)), r"pass --config.evaluate.kid_subset_size=20, or less"),
        (dict(metrics=("inception_score",)), r"pass --config.evaluate.inception_splits=N"),
        (dict(metrics=("recall",)), ""),
        (dict(metrics=("fid", "sfid"), allow_few=True), ""),
        (dict(metrics=("kid",), kid_subset_size=20), ""),
        (dict(metrics=("inception_score",), inception_splits=1), ""),
    ],
)
def test_sets_that_cannot_be_scored_are_refused_first(changes, says, session):
    session.config.evaluate.update(changes)
    if says:
        with pytest.raises(DataError, match=says):
            judges.check_generation(session)
    else:
        judges.check_generation(session)


def test_a_reference_of_another_network_is_refused_first(session, tmp_path):
    path, size = tmp_path / "ref.npz", 8
    spaces = {"pool": (np.zeros(size), np.eye(size))}
    write_statistics(path, spaces, count=9, front_end="tf", facts={})
    session.config.evaluate.update(metrics=("fid",), allow_few=True, reference=str(path))
    with pytest.raises(DataError, match="8 dimensions, and inception pool has 2048 here"):
        judges.check_generation(session)


def full_disk(path, value, **_):
    with files.writing(path):
        raise OSError(28, "No space left on device")


def test_figures_are_printed_where_they_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"result.json: No space left"):
        files.write_figures(tmp_path / "result.json", {"psnr": float("inf"), "ssim": 0.5})
    assert json.loads(capsys.readouterr().out) == {"psnr": "Infinity", "ssim": 0.5}


def test_a_report_is_printed_before_it_is_written(small_run, config, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(small_run, tmp_path / "run")
    session = Session(config, Run(copy))
    monkeypatch.setattr(report, "write_bytes", full_disk)
    with pytest.raises(
        UserError, match=r"report.html: No space left .* run the same command again"
    ):
        report.run(session)
    assert "reconstruction PSNR" in capsys.readouterr().out
