"""No diagnostic ends a training, and a checkpoint comes before the evaluation due with it."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from figures import figures_of
from test_resume import best_stage, fit_toy, toy_stage

from gae_jax.runtime.errors import ConfigError, NonFiniteError
from gae_jax.train.checkpoint import latest_step
from gae_jax.train.log import read_metrics


class Killed(BaseException):
    """What nothing catches."""


def stage_with(**changes):
    return dataclasses.replace(toy_stage(lambda w, step: jnp.sum(w**2)), **changes)


def fails(*_):
    raise ValueError("This solver needs samples of at least 2 classes")


@pytest.mark.parametrize("what", ["evaluate", "pictures", "watch"])
def test_a_diagnostic_that_fails_is_told_and_the_training_goes_on(what, tmp_path, caplog):
    shown = {"evaluate": lambda state: {"score": 1.0}} | {what: fails}
    fitted = fit_toy(stage_with(**shown), tmp_path / "failing", eval_every=4)
    assert fitted.step == 10
    said = [line for line in caplog.messages if "at least 2 classes" in line]
    assert len(said) == {"evaluate": 3, "pictures": 3, "watch": 5}[what]
    assert said[0].startswith("toy, step ")
    assert "training continues" in said[0]
    plain = fit_toy(stage_with(), tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, fitted.state.params, plain.state.params)
    assert [row["step"] for row in read_metrics(tmp_path / "failing")] == [2, 4, 6, 8, 10]


def test_the_losss_own_nan_still_ends_it(tmp_path):
    stage = toy_stage(lambda w, step: jnp.sum(w**2) * jnp.where(step >= 4, jnp.nan, 1.0))
    with pytest.raises(NonFiniteError):
        fit_toy(dataclasses.replace(stage, evaluate=fails), tmp_path, eval_every=1)


def test_the_checkpoint_is_there_when_its_evaluation_begins(tmp_path):
    seen = {}

    def evaluate(state):
        seen[int(state.step)] = latest_step(tmp_path)
        return {"score": 0.0}

    fit_toy(stage_with(evaluate=evaluate), tmp_path, eval_every=2)
    assert seen == {2: None, 4: 4, 6: 4, 8: 8, 10: 10}


@pytest.mark.parametrize("at", [4, 8, 20])
def test_a_kill_between_a_checkpoint_and_its_evaluation(at, tmp_path):
    """The next session makes up for the evaluation; rows, best step and weights are the same."""
    settings = dict(steps=20, eval_every=4, best_metric="eval/score", best_mode="max", keep=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    values = [1.0, 9.0, 2.0, 3.0, 4.0]
    expected = fit_toy(best_stage(values), whole, **settings)

    def evaluate(state):
        if int(state.step) == at:
            raise Killed
        return {"score": values[int(state.step) // 4 - 1]}

    with pytest.raises(Killed):
        fit_toy(stage_with(evaluate=evaluate), killed, **settings)
    assert latest_step(killed) == at
    fitted = fit_toy(best_stage(values), killed, **settings)
    assert fitted.step == expected.step == 8
    jax.tree.map(np.testing.assert_array_equal, fitted.state.params, expected.state.params)
    assert figures_of(killed) == figures_of(whole)
    steps = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (whole, killed)]
    assert steps[0] == steps[1] == ["20", "8"]


def test_the_best_step_of_evaluations_some_of_which_fail(tmp_path, caplog):
    settings = dict(steps=16, eval_every=4, best_metric="eval/score", best_mode="min", keep=1)

    def evaluate(state):
        step = int(state.step)
        if step == 8:
            fails()
        return {4: {"score": 3.0}, 12: {"score": float("nan")}, 16: {"other": 1.0}}[step]

    fitted = fit_toy(stage_with(evaluate=evaluate), tmp_path, **settings)
    assert fitted.step == int(fitted.state.step) == 4
    assert any("step 16: this evaluation gave no eval/score" in line for line in caplog.messages)


def test_no_evaluation_succeeds_and_the_last_step_is_the_result(tmp_path, caplog):
    settings = dict(eval_every=4, best_metric="eval/score")
    with caplog.at_level(logging.WARNING):
        assert fit_toy(stage_with(evaluate=fails), tmp_path, **settings).step == 10
    assert "toy: no evaluation gave eval/score, so the last step is the result" in caplog.messages


def test_a_wrong_best_metric_is_told_after_the_figures_are_written(tmp_path):
    settings = dict(steps=20, eval_every=4, best_metric="eval/fid")
    with pytest.raises(ConfigError, match="step 4 is saved"):
        fit_toy(best_stage([1.0, 2.0, 3.0, 4.0, 5.0]), tmp_path, **settings)
    assert read_metrics(tmp_path)[-1]["eval/score"] == 1.0
    # the remedy: one of those that it lists, from the step that is saved
    fitted = fit_toy(
        best_stage([1.0, 2.0, 3.0, 4.0, 5.0]), tmp_path, **settings | {"best_metric": "eval/score"}
    )
    assert fitted.step == 4
