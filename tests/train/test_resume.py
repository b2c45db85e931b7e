"""Interrupted training gives the same weights, bit for bit; bad ends lose nothing."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from flax import nnx
from kills import kill_often

from gae_jax.data.batches import Batches
from gae_jax.nn.layers import linear
from gae_jax.nn.network import Network
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime import sharding
from gae_jax.runtime.errors import CheckpointError, ConfigError, NonFiniteError
from gae_jax.runtime.mesh import make_mesh, put_rows
from gae_jax.stages import diffusion, tokenizer
from gae_jax.train import feed
from gae_jax.train.checkpoint import Checkpoints, latest_step, load_weights
from gae_jax.train.fit import AHEAD, Stage, fit, init_state, jit_step
from gae_jax.train.log import read_metrics
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import apply_gradients, make_state

STEPS, EVERY = 180, 60  # long enough that a poll sees the first checkpoint before the last


def command(name, workdir):
    changes = [
        f"--config.{name}.train.steps={STEPS}",
        f"--config.{name}.train.save_every={EVERY}",
        f"--config.{name}.train.log_every=20",
        # both networks of the GAN are learning when the process is killed
        "--config.tokenizer.gan.discriminator_start=20",
        "--config.tokenizer.gan.start=40",
    ]
    return [
        *(sys.executable, "-m", "gae_jax", name, "--config=tests/small.py"),
        *(f"--workdir={workdir}", *changes),
    ]


def start(name, workdir, *, largest_file=None):
    """A process that runs the stage; ``largest_file`` (KiB) is a disk that is soon full."""
    arguments = command(name, workdir)
    if largest_file:
        arguments = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "bash", *arguments]
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def kill_when(process, seen):
    """SIGKILL as soon as ``seen()``; the process must not have ended before."""
    while not seen():
        assert process.poll() is None, f"ended too early: {process.stderr.read()}"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def copy_run(small_run, to, name):
    """The stages that ``name`` is built on, without ``name``."""
    order = ["backbone", "teacher", "tokenizer", "latents", "diffusion"]
    for stage in order[: order.index(name)]:
        shutil.copytree(small_run / stage, to / stage)
    return to


def whole_state(folder):
    """Everything in the latest checkpoint: state, what data it was reached with."""
    step = latest_step(folder)
    path = folder / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore(path / "state")
    data = json.loads((path / "meta" / "metadata").read_text())["batches"]
    return step, state, data


@pytest.mark.parametrize("name", [pytest.param("tokenizer", marks=pytest.mark.slow), "diffusion"])
def test_a_killed_run_and_a_full_disk_change_nothing(name, small_run, tmp_path):
    whole = copy_run(small_run, tmp_path / "whole", name)
    broken = copy_run(small_run, tmp_path / "broken", name)
    reference = start(name, whole)
    checkpoints = broken / name / "checkpoints"

    # killed in the middle of its second save: what there is of it does not count
    process = start(name, broken)
    kill_when(process, lambda: any(checkpoints.glob(f"{2 * EVERY}*tmp*")))
    assert not (broken / name / "done.json").exists()
    shutil.rmtree(checkpoints / str(2 * EVERY), ignore_errors=True)  # if the save was quicker
    assert latest_step(broken / name) == EVERY

    # goes on, and finds the disk full at the next save
    process = start(name, broken, largest_file=30)
    _, says = process.communicate(timeout=200)
    assert process.returncode == 1, says
    assert f"resumed at step {EVERY} of {STEPS}" in says
    assert f"last good checkpoint: step {EVERY} in" in says
    assert "make room on the disk" in says
    # tensorstore's threads print what they caught; the last word is a plain one
    assert "Traceback" not in says[says.index("error: the checkpoint") :]

    # goes on to the end
    process = start(name, broken)
    _, says = process.communicate(timeout=200)
    assert process.returncode == 0, says
    assert f"resumed at step {EVERY} of {STEPS}" in says

    _, says = reference.communicate(timeout=200)
    assert reference.returncode == 0, says
    (step, state, data), (other_step, other_state, other_data) = (
        whole_state(path / name) for path in (whole, broken)
    )
    assert step == other_step == STEPS
    assert data == other_data
    assert jax.tree.structure(state) == jax.tree.structure(other_state)
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    expected = {"step", "params", "rest", "opt"} | ({"ema"} if name == "diffusion" else set())
    assert expected <= set(state)
    done = [json.loads((path / name / "done.json").read_text()) for path in (whole, broken)]
    assert done[0]["fingerprint"] == done[1]["fingerprint"]
    rows = [[row["step"] for row in read_metrics(path / name)] for path in (whole, broken)]
    assert rows[0] == rows[1] == list(range(20, STEPS + 1, 20))


def numbers():
    """0 to 63, shuffled, endless."""
    ds = grain.MapDataset.range(64).seed(0).shuffle().repeat()
    return ds.map(lambda i: {"number": np.int32(i)})


def toy_stage(loss_fn):
    """A stage whose only network is one matrix; ``loss_fn(matrix, step)`` is its loss."""
    network = Network(lambda rngs: nnx.Dict(head=linear(4, 4, dtype=jnp.float32, rngs=rngs)))
    optimizer = make_optimizer(
        100, learning_rate=1e-2, end_learning_rate=1e-2, warmup_steps=0, b1=0.9, b2=0.9,
        weight_decay=0.0, clip_norm=0.0,
    )  # fmt: skip

    def step(state, batch, key, frozen, phase):
        params = state.params["linear"]
        loss, grads = jax.value_and_grad(lambda p: loss_fn(p["head"]["kernel"], state.step))(params)
        new = apply_gradients(state, "linear", grads, optimizer)
        return dataclasses.replace(new, step=state.step + 1), {"loss": loss}

    return Stage(
        name="toy",
        init=lambda key: make_state(key, {"linear": network}, {"linear": optimizer}),
        step=step,
        batches=lambda size: Batches(numbers(), size, 1, "numbers"),
    )


def fit_toy(stage, folder, **changes):
    sizes = dict(seed=0, steps=10, batch_size=8, log_every=2, eval_every=0, save_every=4, keep=2)
    mesh = make_mesh()
    return fit(stage, folder, mesh, **(sizes | changes))


def test_a_nan_stops_with_the_last_good_checkpoint_named(tmp_path):
    stage = toy_stage(lambda w, step: jnp.sum(w**2) * jnp.where(step >= 6, jnp.nan, 1.0))
    with pytest.raises(NonFiniteError) as error:
        fit_toy(stage, tmp_path)
    assert "toy: loss not finite at step" in str(error.value)
    assert f"Last good checkpoint: step 4 in {tmp_path}" in str(error.value)
    params, _ = load_weights(tmp_path, "params", "linear")
    assert np.isfinite(params["head"]["kernel"]).all()
    # the remedy: the same folder goes on from there
    fitted = fit_toy(toy_stage(lambda w, step: jnp.sum(w**2)), tmp_path)
    assert int(fitted.state.step) == fitted.step == 10


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("_CHECKPOINT_METADATA", b"[]"),
        ("meta/metadata", b"{}"),
        ("meta/metadata", b'{"seconds": "x"}'),
        ("state/_METADATA", b"\xff"),
        ("state/_METADATA", None),
        ("state/manifest.ocdbt", b""),
    ],
)
def test_a_damaged_checkpoint_is_named_with_an_earlier_one(tmp_path, file, content):
    stage = toy_stage(lambda w, step: jnp.sum(w**2))
    fit_toy(stage, tmp_path, steps=8)
    damaged = tmp_path / "checkpoints" / "8"
    (damaged / file).unlink()
    if content is not None:
        (damaged / file).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        fit_toy(stage, tmp_path)
    assert str(damaged) in str(error.value)
    assert "--from-step=4" in str(error.value) or "remove this checkpoint" in str(error.value)
    if file.startswith("state"):  # what every other command reads
        with pytest.raises(CheckpointError, match=re.escape(str(damaged))):
            load_weights(tmp_path, "params", "linear")
    shutil.rmtree(damaged)
    assert fit_toy(stage, tmp_path).step == 10


def test_metrics_are_means_since_the_last_row_and_late_by_none(tmp_path):
    fit_toy(toy_stage(lambda w, step: step.astype(jnp.float32) + 0 * jnp.sum(w)), tmp_path)
    rows = [(row["step"], row["loss"]) for row in read_metrics(tmp_path)]
    assert rows == [(2, 0.5), (4, 2.5), (6, 4.5), (8, 6.5), (10, 8.5)]
    assert any((tmp_path / "events").iterdir())


def test_few_steps_are_under_way_and_batches_come_between_them(tmp_path, monkeypatch):
    """What fills the device's memory, or cuts it into parts, while a step has it."""
    order, threads, put, wait = [], set(), put_rows, jax.block_until_ready

    def noted(batch, *rest):
        threads.add(threading.current_thread())
        order.append("sent")
        return put(batch, *rest)

    def waited(arrays):
        if isinstance(arrays, dict) and "loss" in arrays:  # metrics of a step
            order.append(f"step {int(arrays['loss'])} is done")
        return wait(arrays)

    monkeypatch.setattr(feed, "put_rows", noted)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    stage = toy_stage(lambda w, step: step.astype(jnp.float32) + 0 * jnp.sum(w))
    fit_toy(stage, tmp_path, steps=7, log_every=7, save_every=7)
    assert threads == {threading.main_thread()}
    assert AHEAD == 4
    assert order == [
        *["sent"] * 5, "step 0 is done", "sent", "step 1 is done", "sent", "step 2 is done",
    ]  # fmt: skip


def test_evaluation_comes_at_its_cadence_and_at_the_end(tmp_path):
    stage = dataclasses.replace(
        toy_stage(lambda w, step: jnp.sum(w**2)),
        evaluate=lambda state: {"step": float(state.step)},
    )
    fit_toy(stage, tmp_path, eval_every=4)
    rows = {row["step"]: row.get("eval/step") for row in read_metrics(tmp_path)}
    assert rows == {2: None, 4: 4.0, 6: None, 8: 8.0, 10: 10.0}


def test_weights_that_are_not_there_are_named(small_run, tmp_path):
    with pytest.raises(CheckpointError, match="holds no ema of 'tokenizer'"):
        load_weights(small_run / "tokenizer", "ema", "tokenizer")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_weights(tmp_path, "params", "tokenizer")


def test_what_eight_devices_saved_is_the_same_on_one_two_and_four(config, small_run, tmp_path):
    """Bit for bit, with every leaf that can be split split in another way."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(sharding, "SMALL", 0)
    stage = tokenizer.make_stage(Session(config, Run(small_run)))
    mesh = make_mesh(1, 8, 1)
    state = init_state(stage, jit_step(stage, mesh)[1], 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"seconds": 0.0, "batches": "x"})
    checkpoints.wait()
    expected = jax.device_get(state)
    for shape in ((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)):
        devices = jax.devices()[: math.prod(shape)]
        shardings = jit_step(stage, make_mesh(*shape, devices=devices))[1]
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            expected,
            shardings,
        )
        found, _ = checkpoints.restore(abstract)
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoints.restore({"something": jnp.zeros(3)})
    checkpoints.close()
    monkeypatch.undo()


def best_stage(values):
    """Its evaluation gives these, at every fourth step."""
    stage = toy_stage(lambda w, step: jnp.sum(w**2))
    return dataclasses.replace(
        stage, evaluate=lambda state: {"score": values[int(state.step) // 4 - 1]}
    )


@pytest.mark.parametrize(("mode", "best"), [("min", 8), ("max", 4)])
def test_the_best_checkpoint_is_kept_and_is_the_result(tmp_path, mode, best):
    settings = dict(steps=20, eval_every=4, best_metric="eval/score", best_mode=mode, keep=1)
    fitted = fit_toy(best_stage([5.0, 1.0, 2.0, 3.0, 4.0]), tmp_path, **settings)
    assert fitted.step == int(fitted.state.step) == best
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [best, 20]
    kept, _ = load_weights(tmp_path, "params", "linear", best)
    np.testing.assert_array_equal(
        kept["head"]["kernel"], fitted.state.params["linear"]["head"]["kernel"]
    )


def test_a_figure_that_no_evaluation_gives_is_told_and_costs_nothing(tmp_path):
    settings = dict(steps=20, eval_every=4, best_metric="eval/fid")
    with pytest.raises(ConfigError, match=r"'eval/fid', but evaluations give eval/score; step 4"):
        fit_toy(best_stage([1.0] * 5), tmp_path, **settings)
    assert latest_step(tmp_path) == 4
    with pytest.raises(ConfigError, match="nothing is evaluated while it trains"):
        fit_toy(toy_stage(lambda w, step: jnp.sum(w**2)), tmp_path, **settings)


def test_other_data_than_the_checkpoints_is_refused(tmp_path):
    stage = toy_stage(lambda w, step: jnp.sum(w**2))
    fit_toy(stage, tmp_path, steps=4)
    other = dataclasses.replace(stage, batches=lambda size: Batches(numbers(), size, 1, "letters"))
    with pytest.raises(CheckpointError, match=r"step 4 was trained on numbers, .*reads letters"):
        fit_toy(other, tmp_path)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(small_run, tmp_path):
    """The short form of tests/kills.py; docs/reliability.md has the long one."""
    found = kill_often(small_run, tmp_path, kills=2, seed=1, steps=60)
    assert found["kills"] == 2


@pytest.mark.slow  # the arrays on other meshes are compared bit for bit above
def test_a_checkpoint_moves_to_another_mesh(config, small_run, tmp_path):
    """Saved on eight devices split eight ways, continued on a 2 x 2 x 2 mesh."""
    run = copy_run(small_run, tmp_path / "run", "diffusion")
    config.mesh.update(data=1, fsdp=8)
    config.diffusion.train.update(steps=3)
    diffusion.run(Session(config, Run(run)))
    (run / "diffusion" / "done.json").unlink()
    config.mesh.update(data=2, fsdp=2, tensor=2)
    folder = diffusion.run(Session(config, Run(run)))
    assert folder.done
