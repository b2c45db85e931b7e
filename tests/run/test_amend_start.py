"""Stages that started from other weights, and their best step, after a change of course."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import starting
from flax import nnx
from remedies import flags_in
from small import get_config
from starting import changed, of_kind, opened, started, trained
from test_resume import fit_toy, toy_stage

from gae_jax.config import plain
from gae_jax.nn.layers import linear
from gae_jax.nn.network import Network, fingerprint
from gae_jax.run import fine_tuning
from gae_jax.run.amendments import record, started_from
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.run.weight_source import open_source
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.train.checkpoint import load_weights
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import make_state


class Gone(Exception):
    """A stage asked for what it started from."""


def _toy(networks, clip_norm, score):
    """The toy stage with other networks beside its own, clipping, and an evaluation."""
    base = toy_stage(lambda kernel, step: (kernel**2).sum())
    optimizer = make_optimizer(
        100, learning_rate=1e-2, end_learning_rate=1e-2, warmup_steps=0, b1=0.9, b2=0.9,
        weight_decay=0.0, clip_norm=clip_norm,
    )  # fmt: skip
    network = Network(lambda rngs: nnx.Dict(head=linear(4, 4, dtype=jnp.float32, rngs=rngs)))

    def step(state, batch, key, frozen, phase):
        del batch, key, frozen, phase
        params = jax.tree.map(lambda x: 0.9 * x, state.params["linear"])
        params = {**state.params, "linear": params}
        state = dataclasses.replace(state, step=state.step + 1, params=params)
        return state, {"loss": jnp.float32(0)}

    return dataclasses.replace(
        base,
        init=lambda key: make_state(
            key, dict.fromkeys(networks, network), dict.fromkeys(networks, optimizer)
        ),
        step=step,
        evaluate=lambda state: {"score": score(int(state.step))},
    )


def test_the_best_step_may_lie_before_a_change_and_the_source_is_not_asked(tmp_path):
    more = dict(best_metric="eval/score", best_mode="max", eval_every=4)
    fit_toy(_toy(["linear"], 0.0, float), tmp_path, steps=4, **more)
    expected = load_weights(tmp_path, "params", "linear", 4)[0]

    def begin(state):
        raise Gone

    stage = dataclasses.replace(_toy(["judge", "linear"], 1.0, lambda step: -step), begin=begin)
    fitted = fit_toy(stage, tmp_path, steps=8, amended="", **more)
    assert fitted.step == 4
    assert set(fitted.state.params) == {"judge", "linear"}
    found = jax.device_get(fitted.state.params["linear"])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(Gone):
        fit_toy(stage, tmp_path / "new", steps=8)


def test_a_start_that_left_no_checkpoint_is_not_recorded(tmp_path):
    config = get_config()
    trained(tmp_path / "source", "diffusion", config)
    config.diffusion.init_from = str(tmp_path / "source")
    path = tmp_path / "run"
    folder = Run(path).stage("diffusion")
    sections = {"diffusion": config.diffusion}
    fingerprint = open_source(config.diffusion.init_from, "diffusion").fingerprint
    folder.open(sections, {"init_from": fingerprint}, fresh=False)
    started("diffusion", config, path)
    assert fine_tuning.provenance(folder)["started_from"]["fingerprint"] == fingerprint
    # a failure before the first checkpoint, then the same stage from random weights
    config.diffusion.init_from = ""
    assert folder.open({"diffusion": config.diffusion}, {}, fresh=False)
    assert fine_tuning.provenance(folder) == {}


@pytest.mark.parametrize("done", [True, False])
def test_a_stage_that_began_is_told_that_init_from_comes_too_late(tmp_path, done):
    config = get_config()
    trained(tmp_path / "source", "diffusion", config)
    trained(tmp_path / "run", "diffusion", config, seed=2, done=done)
    flag = f"--config.diffusion.init_from={tmp_path / 'source'}"
    session = opened(changed(config, [flag]), tmp_path / "run", amend=True)
    for call in (
        lambda: fine_tuning.check(session, "diffusion"),
        lambda: session.identity("diffusion", ("seed", "diffusion"), ()),
    ):
        with pytest.raises(ConfigError, match="read at step 0 alone") as error:
            call()
    advice = flags_in(str(error.value))
    assert advice == ["--config.diffusion.init_from=", "--workdir", "--fresh"]
    session = opened(changed(config, advice[:1]), tmp_path / "run")
    fine_tuning.check(session, "diffusion")
    session = opened(changed(config, [flag]), tmp_path / "run", fresh=True)
    fine_tuning.check(session, "diffusion")


def test_what_starts_from_an_amended_run_says_so(tmp_path):
    config = get_config()
    trained(tmp_path / "source", "diffusion", config)  # a checkpoint of step 3
    folder = Run(tmp_path / "source").stage("diffusion")
    fields = [{"field": "diffusion.optim.clip_norm", "old": 1.0, "new": 0.5}]
    before, after = (record("diffusion", step, fields, []) for step in (2, 3))
    write_json(folder.path / "config.json", folder.marker | {"amended": [before, after]})
    config.diffusion.init_from = str(tmp_path / "source")
    _, found = started("diffusion", config, tmp_path / "run")
    assert found["amended"] == [before]  # the other one came after these weights
    assert "amended there: diffusion, from step 2 on" in started_from(found)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_checkpoint_of_before_an_average_gives_the_weights_it_has(tmp_path, decay, monkeypatch):
    config = of_kind("gae")
    config.tokenizer.ema_decay = decay
    if not decay:  # the state has no average
        draw = starting.random_state
        monkeypatch.setattr(
            starting,
            "random_state",
            lambda *a, **more: dataclasses.replace(draw(*a, **more), ema={}),
        )
    trained(tmp_path, "tokenizer", config, done=False)
    folder = Run(tmp_path).stage("tokenizer")
    there = read_json(folder.path / "config.json")
    config.tokenizer.ema_decay = 0.5 - decay
    there["config"]["tokenizer"] = plain(config.tokenizer)
    write_json(folder.path / "config.json", there)
    source = open_source(f"{tmp_path}@3", "tokenizer")
    assert source.which == ("ema" if decay else "params")
    assert source.arrays()


def test_an_error_of_a_far_larger_network_fits_a_screen(tmp_path):
    config = get_config()
    trained(tmp_path / "source", "diffusion", config)
    config.diffusion.model.depth = 20
    config.diffusion.init_from = str(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"and \d+ more arrays") as error:
        fine_tuning.check(opened(config, tmp_path / "run"), "diffusion")
    assert len(str(error.value).splitlines()) < 40
    assert "--config.diffusion.model.depth=1" in flags_in(str(error.value))


def test_the_best_step_was_measured_with_an_average_that_ended_since(tmp_path, caplog):
    """The figures are those of the average, and so is the result."""
    caplog.set_level(logging.INFO)
    plain = toy_stage(lambda matrix, step: jnp.sum(matrix**2))
    scores = iter([9.0, 1.0, 0.5])  # the best is the first

    def begin(key):
        state = plain.init(key)
        return dataclasses.replace(state, ema={"linear": state.params["linear"]})

    def step(state, *rest):
        new, scalars = plain.step(state, *rest)
        lag = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, state.ema["linear"],
                           new.params["linear"])  # fmt: skip
        return dataclasses.replace(new, ema={"linear": lag}), scalars

    config = get_config()
    config.backbone.train.update(
        steps=2, save_every=1, eval_every=1, best_metric="eval/score", best_mode="max", keep=1
    )
    evaluated = dataclasses.replace(plain, evaluate=lambda state: {"score": next(scores)})
    averaged = dataclasses.replace(evaluated, init=begin, step=step)
    for stage, which, steps in ((averaged, "ema", 2), (evaluated, "params", 3)):
        config.backbone.train.steps = steps
        session = Session(config, Run(tmp_path), amend=True, devices=tuple(jax.devices()[:1]))
        folder = session.open("backbone", sections=("seed", "data", "backbone"), inputs=())
        session.train(folder, stage, keep=("linear",), which=which)
    done = folder.done
    assert (done["step"], done["weights"]) == (1, "ema")
    weights = load_weights(folder.path, "ema", "linear", 1)
    assert done["fingerprint"] == fingerprint({"linear": weights})
    last, _ = load_weights(folder.path, "params", "linear", 1)
    assert not np.array_equal(weights[0]["head"]["kernel"], last["head"]["kernel"])
    assert "the result is the moving average of step 1" in caplog.text
