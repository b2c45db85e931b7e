"""The only training loop."""

import dataclasses
import logging
import math
import zlib
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from gae_jax import parallel
from gae_jax.errors import NonFiniteError
from gae_jax.run import Stopwatch
from gae_jax.train.checkpoint import Checkpoints
from gae_jax.train.log import Metrics, Progress
from gae_jax.train.state import TrainState

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage brings to the loop.

    Attributes:
      name: shown to the user.
      init: key -> state at step 0; traced.
      step: (state, batch, key, frozen, phase) -> (state, scalars); pure, jitted once per phase.
      batches: batch size -> endless grain dataset of numpy batches, this process's rows.
      frozen: arrays on the mesh that the step reads and nobody changes.
      evaluate: state -> scalars, at the given cadence and at the end.
      pictures: state -> {name: uint8 image [H, W, 3]}, whenever `evaluate` is due.
      watch: (step, metrics of a report) -> warnings to show, each with its remedy.
      milestones: steps whose checkpoint is kept for ever.
      phase: number of updates made -> what is static about the next one, such as the terms that
        count. A Python decision: what a phase leaves out is not compiled, let alone computed.
    """

    name: str
    init: Callable[[jax.Array], TrainState]
    step: Step
    batches: Callable[[int], grain.MapDataset]
    frozen: Any = None
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    pictures: Callable[[TrainState], dict[str, np.ndarray]] | None = None
    watch: Callable[[int, dict[str, float]], list[str]] | None = None
    milestones: tuple[int, ...] = ()
    phase: Callable[[int], Hashable] = lambda step: None


def jit_step(stage: Stage, mesh: Mesh):
    """The stage's step on a mesh, and the shardings of its state.

    Returns:
      (step, shardings); the state given to ``step`` is donated.
    """
    abstract = jax.eval_shape(stage.init, jax.random.key(0))
    shardings = parallel.shard(abstract, mesh)
    step = jax.jit(stage.step, donate_argnums=0, static_argnums=4, out_shardings=(shardings, None))
    return step, shardings


def stage_key(name: str, seed: int) -> jax.Array:
    """A key of the stage's own, so that stages of one seed do not share their noise."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def init_state(stage: Stage, shardings, seed: int) -> TrainState:
    """The state at step 0, born sharded."""
    key = jax.random.fold_in(stage_key(stage.name, seed), 0)
    return jax.jit(stage.init, out_shardings=shardings)(key)


def batch_iterator(stage: Stage, batch_size: int, mesh: Mesh):
    """Endless global batches on the devices, prepared ahead of use; its state can be saved."""
    parallel.check_batch(batch_size, mesh, f"{stage.name}: batch_size")
    batches = stage.batches(batch_size).map(partial(parallel.put_batch, mesh=mesh))
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2))


def fit(
    stage: Stage,
    folder: Path,
    mesh: Mesh,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    log_every: int,
    eval_every: int,
    save_every: int,
    keep: int,
) -> tuple[TrainState, float]:
    """Trains to ``steps``, from the latest checkpoint in ``folder`` if there is one.

    Randomness is keyed by (seed, step) and the data iterator is part of the checkpoint, so an
    interrupted run gives the same weights as an uninterrupted one.

    Returns:
      (final state, seconds spent, those of earlier sessions included).

    Raises:
      NonFiniteError: if a metric is NaN or infinite; names the last good checkpoint.
      CheckpointError: if a checkpoint cannot be written or does not fit.
    """
    step_fn, shardings = jit_step(stage, mesh)
    iterator = batch_iterator(stage, batch_size, mesh)
    checkpoints = Checkpoints(folder, keep=keep, milestones=stage.milestones)
    before = 0.0
    if checkpoints.latest is None:
        state = init_state(stage, shardings, seed)
        start = 0
    else:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(stage.init, jax.random.key(0)),
            shardings,
        )
        state, meta = checkpoints.restore(abstract, iterator)
        start, before = int(state.step), meta["seconds"]
        logging.info("%s: resumed at step %d of %d", stage.name, start, steps)

    watch, metrics = Stopwatch(before), Metrics(folder, start)
    key = jax.random.fold_in(stage_key(stage.name, seed), 1)
    window: list = []  # metrics on the device since the last report
    due: list = []  # a report that waits for the next step, so that the device never does

    def report(step: int, rows: list, more: dict[str, float]) -> None:
        values = _mean(rows)
        _check_finite(values, stage.name, step, checkpoints)
        metrics.write(step, values | more)
        progress.say(step, values | more)
        for warning in stage.watch(step, values) if stage.watch else ():
            logging.warning("%s, step %d: %s", stage.name, step, warning)

    try:
        with Progress(stage.name, steps, done=start) as progress:
            for step in range(start + 1, steps + 1):
                phase = stage.phase(step - 1)
                state, scalars = step_fn(state, next(iterator), key, stage.frozen, phase)
                window.append(scalars)
                progress.update()
                while due:
                    report(*due.pop())
                save = step % save_every == 0 or step == steps or step in stage.milestones
                evaluate = stage.evaluate is not None and (
                    step == steps or (eval_every > 0 and step % eval_every == 0)
                )
                if save or evaluate:
                    scores = stage.evaluate(state) if evaluate else {}
                    report(step, window, {f"eval/{k}": float(v) for k, v in scores.items()})
                    window = []
                    if evaluate and stage.pictures:
                        for name, pixels in stage.pictures(state).items():
                            metrics.picture(step, name, pixels)
                elif step % log_every == 0:
                    due, window = [(step, window, {})], []
                if save:
                    checkpoints.save(step, state, iterator, {"seconds": watch.seconds})
        checkpoints.wait()
    finally:
        checkpoints.close()
        metrics.close()
        iterator.close()
    return state, watch.seconds


def _mean(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over the steps of a window; a phase may have begun in it, and its metrics with it."""
    rows = jax.device_get(window)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in rows[-1]}


def _check_finite(values: dict, name: str, step: int, checkpoints: Checkpoints) -> None:
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    if bad:
        checkpoints.wait()
        last = checkpoints.latest
        where = f"step {last} in {checkpoints.folder}" if last else "none"
        raise NonFiniteError(
            f"{name}: {', '.join(bad)} not finite at step {step}; training stopped and nothing was "
            f"saved since. Last good checkpoint: {where}. Try a smaller learning rate or "
            "optim.clip_norm=1.0"
        )
