"""Optimizers, moving averages, and what a user sees of training."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.data.latents import LatentSet
from gae_jax.nn.network import Keys, fingerprint, variables_of
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.mesh import put_batch
from gae_jax.runtime.progress import Progress, duration
from gae_jax.stages import diffusion, tokenizer
from gae_jax.stages.backbone import random_shift
from gae_jax.tokenizers.gae import GAE
from gae_jax.train.fit import init_state, jit_step
from gae_jax.train.log import Metrics, read_metrics
from gae_jax.train.optim import decayed, make_optimizer, make_schedule
from gae_jax.train.state import ema_update


def test_schedule_warms_up_and_ends_where_it_should():
    sizes = dict(steps=100, learning_rate=2e-4, warmup_steps=10)
    cosine = make_schedule(end_learning_rate=2e-5, **sizes)
    np.testing.assert_allclose([cosine(t) for t in (0, 5, 10)], [0, 1e-4, 2e-4], rtol=1e-5)
    np.testing.assert_allclose([cosine(55), cosine(100)], [1.1e-4, 2e-5], rtol=1e-5)
    constant = make_schedule(end_learning_rate=2e-4, **sizes)
    np.testing.assert_allclose([constant(5), constant(10), constant(99)], [1e-4, 2e-4, 2e-4])


def test_without_warm_up_the_peak_comes_first():
    sizes = dict(steps=100, learning_rate=2e-4, warmup_steps=0)
    for end in (2e-4, 2e-5):
        np.testing.assert_allclose(make_schedule(end_learning_rate=end, **sizes)(0), 2e-4)
    np.testing.assert_allclose(make_schedule(end_learning_rate=2e-5, **sizes)(100), 2e-5)


def test_a_schedule_that_holds_its_peak():
    sizes = dict(steps=100, learning_rate=2e-4, end_learning_rate=2e-5, hold_steps=20)
    line = make_schedule(warmup_steps=10, decay="linear", **sizes)
    want = {0: 0, 5: 1e-4, 10: 2e-4, 30: 2e-4, 65: 1.1e-4, 100: 2e-5, 200: 2e-5}
    np.testing.assert_allclose([line(t) for t in want], list(want.values()), rtol=1e-5)
    cosine = make_schedule(warmup_steps=0, **sizes)
    want = {0: 2e-4, 20: 2e-4, 60: 1.1e-4, 100: 2e-5, 200: 2e-5}
    np.testing.assert_allclose([cosine(t) for t in want], list(want.values()), rtol=1e-5)


def test_weight_decay_spares_vectors_and_clipping_bounds_the_step():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    assert decayed(params) == {"kernel": True, "bias": False}
    optimizer = make_optimizer(
        10, learning_rate=0.1, end_learning_rate=0.1, warmup_steps=0, b1=0.9, b2=0.9,
        weight_decay=0.5, clip_norm=0.0,
    )  # fmt: skip
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_moving_average_starts_short_and_becomes_long():
    old, new = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    early = ema_update(old, new, 0.9999, jnp.array(0))["w"]
    late = ema_update(old, new, 0.9999, jnp.array(10**7))["w"]
    np.testing.assert_allclose(early, 0.9, rtol=1e-6)
    np.testing.assert_allclose(late, 1e-4, rtol=1e-2)


def test_fingerprint_sees_values_names_and_shapes():
    tree = {"a": np.arange(4.0), "b": np.zeros(2)}
    same = {"b": np.zeros(2), "a": np.arange(4.0)}
    assert fingerprint(tree) == fingerprint(same)
    others = (
        {"a": np.arange(4.0) + 1e-7, "b": np.zeros(2)},
        {"a": np.arange(4.0).reshape(2, 2), "b": np.zeros(2)},
        {"a": np.arange(4.0), "c": np.zeros(2)},
    )
    assert len({fingerprint(x) for x in (tree, *others)}) == 4


def test_random_shift_moves_by_at_most_that_and_repeats_edges():
    image = jnp.zeros((1, 9, 9, 3)).at[0, 4, 4].set(1)
    seen = set()
    for seed in range(40):
        moved = random_shift(image, jax.random.key(seed), 2)
        seen.add(tuple(int(x[0]) for x in jnp.where(moved[0, :, :, 0])))
    assert seen <= {(r, c) for r in range(2, 7) for c in range(2, 7)}
    assert len(seen) > 10
    np.testing.assert_array_equal(random_shift(image, jax.random.key(0), 0), image)
    ones = jnp.ones((1, 9, 9, 3))
    np.testing.assert_array_equal(random_shift(ones, jax.random.key(0), 2), ones)


def test_rows_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": step / 2} | ({"late": 9.0} if step == 3 else {}))
    metrics.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,0.")
    assert [row["step"] for row in read_metrics(tmp_path)][:3] == [1, 2, 3]
    again = Metrics(tmp_path, 2)
    again.write(3, {"loss": 7.0})
    again.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 7.0},
    ]


def test_a_log_gets_plain_lines_with_rate_and_time_left(caplog):
    caplog.set_level(logging.INFO)
    with Progress("toy", 10, done=4) as progress:
        progress.update(2)
        progress.say(6, {"loss": 0.25})
    assert "toy 6/10 steps" in caplog.text
    assert "steps/s" in caplog.text
    assert "left  loss 0.25" in caplog.text


def test_rate_and_time_left_do_not_count_the_compilation(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = [0.0]
    monkeypatch.setattr("gae_jax.runtime.progress.time.monotonic", lambda: clock[0])

    def line_after(progress, seconds, count):
        for _ in range(count):
            clock[0] += seconds / count
            progress.update()
        caplog.clear()
        progress.say(progress.done, {})
        return caplog.text

    with Progress("toy", 1001) as progress:
        assert "?" in line_after(progress, 40, 1)  # the first step compiles
        assert "10 steps/s  1:30 left" in line_after(progress, 10, 100)
        assert "10 steps/s  1:10 left" in line_after(progress, 20, 200)
        clock[0] += 30  # an evaluation: it will come again, and is no part of the speed after it
        text = line_after(progress, 40, 400)
        assert "10 steps/s" in text
        assert "0:43 left" in text  # 700 steps took 100 s


@pytest.mark.parametrize(
    ("seconds", "text"), [(4, "0:04"), (75, "1:15"), (3723, "1:02:03"), (float("inf"), "?")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("term", ["l1", "perceptual", "gan", "align"])
def test_a_term_of_weight_zero_is_left_out(term, config, small_run):
    config.tokenizer.losses[term] = 0.0
    session = Session(config, Run(small_run), devices=tuple(jax.devices()[:1]))
    stage = tokenizer.make_stage(session)
    state = jax.eval_shape(stage.init, jax.random.key(0))
    batch = {
        "image": jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    new, metrics = jax.eval_shape(
        lambda *arrays: stage.step(*arrays, stage.phase(100)),
        *(state, batch, jax.random.key(0), stage.frozen),
    )
    assert term not in metrics
    assert {"l1", "perceptual", "gan", "align"} - {term} <= set(metrics)
    assert ("discriminator/loss" in metrics) == (term != "gan")
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_keys_are_those_of_nnx():
    def linears(rngs):
        return nnx.List(nnx.Linear(2, 3, rngs=rngs) for _ in range(3))

    key = jax.random.key(3)
    found, expected = (variables_of(linears(kind(key)))[0] for kind in (Keys, nnx.Rngs))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not hasattr(Keys(key), "__jax_array__")


def test_variables_are_named_by_strings():
    model = GAE(
        image_size=16, patch_size=4, embed_dim=32, num_layers=2, num_heads=2, latent_dim=4,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    params, rest = variables_of(model)
    assert set(params["decoder"]["blocks"]) == {"0", "1"}
    assert rest == {}


def test_a_diffusion_step_in_parts_and_in_bfloat16(small_run, config):
    """Half precision is that of activations alone; parts cost nothing but time."""
    here = Session(config, Run(small_run), devices=tuple(jax.devices()[:2]))
    latents = LatentSet.open(small_run / "latents")
    batch = put_batch(
        {"latent": latents.take(np.arange(16))[0], "label": latents.labels[:16]}, here.mesh
    )
    # a new model's velocity is zero in any precision
    trained = load(here.run.stage("diffusion"), here.mesh)[1][0]
    losses, first = {}, None
    for dtype, parts in (("float32", 1), ("float32", 4), ("bfloat16", 1)):
        config.precision.override = (f"diffusion.dtype={dtype}",)
        config.diffusion.train.accumulate = parts
        stage = diffusion.make_stage(here, latents)
        step, shardings = jit_step(stage, here.mesh)
        if first is None:  # a step takes what it is given: each has a copy
            first = init_state(stage, shardings, 0)
            first = dataclasses.replace(first, params={"diffusion": trained})
        state = jax.tree.map(lambda x: x.copy(), first)
        state, figures = step(state, batch, jax.random.key(1), None, None)
        for leaf in jax.tree.leaves((state.params, state.ema)):
            assert leaf.dtype == jnp.float32
        losses[dtype, parts] = float(figures["loss"])
    np.testing.assert_allclose(losses["bfloat16", 1], losses["float32", 1], rtol=2e-2)
    assert losses["bfloat16", 1] != losses["float32", 1]
    # other noise in every part, the same expectation
    np.testing.assert_allclose(losses["float32", 4], losses["float32", 1], rtol=0.3)
