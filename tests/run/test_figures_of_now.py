"""Figures are of the weights that the run has now, or are refused with the commands."""

import shutil

import pytest
from remedies import commands_in
from small import get_config
from starting import opened

from gae_jax.commands.cli import own_command
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import write_json
from gae_jax.stages import evaluate, report


def test_figures_of_other_weights_are_refused(small_run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(small_run, path)
    session = opened(get_config(), path)
    report.run(session)
    done = session.run.stage("diffusion").done
    # as if the model had gone on after it was sampled
    write_json(path / "diffusion" / "done.json", done | {"fingerprint": "0123456789abcdef"})
    for command in (evaluate, report):
        with pytest.raises(UserError, match="made by diffusion") as error:
            command.run(session)
        assert commands_in(str(error.value)) == [["sample", str(path), "--fresh"]]
    write_json(path / "diffusion" / "done.json", done)
    evaluate.run(session)
    report.run(session)


def test_a_run_is_sampled_anew_by_the_command_that_the_error_names():
    assert own_command(["gae_jax", "sample", "RUN"]) is not None
    assert own_command(["gae_jax", "sample", "RUN", "--fresh"]) is None
