"""The one training loop, which every stage that trains uses."""

import collections
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gae_jax.data.batches import Batches
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import CheckpointError, ConfigError, NonFiniteError, Preempted
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import check_batch, jit_on
from gae_jax.runtime.progress import Progress, Stopwatch
from gae_jax.runtime.sharding import shard
from gae_jax.train import relayout
from gae_jax.train.best import Best
from gae_jax.train.checkpoint import Checkpoints, read_meta
from gae_jax.train.feed import Feed, Waiting
from gae_jax.train.log import Metrics
from gae_jax.train.preemption import Notice
from gae_jax.train.state import TrainState

# Steps that may be in flight when the next one is dispatched: enough that the device never waits
# for the host, and few enough that their batches do not fill its memory.
AHEAD = 4

_attempts = itertools.count()  # over all calls of `fit`: a barrier's name is used only once

Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage provides to the training loop.

    Attributes:
      name: shown to the user.
      init: key -> state at step 0; traced.
      step: (state, batch, key, frozen, phase) -> (state, scalars); pure, jitted once per phase.
      batches: batch size -> endless batches of numpy arrays.
      frozen: arrays on the mesh that the step reads and never changes.
      evaluate: state -> scalars, every ``eval_every`` steps and at the end.
      pictures: state -> {name: uint8 image [H, W, 3]}, whenever `evaluate` is due.
      watch: (step, metrics since the last report) -> warnings to show, each with its remedy.
      milestones: steps whose checkpoints are never removed.
      phase: number of updates made -> what is static about the next update, such as which loss
        terms are active. Decided in Python: what a phase leaves out is not even compiled.
      begin: state at step 0 -> the same state with weights from elsewhere.
    """

    name: str
    init: Callable[[jax.Array], TrainState]
    step: Step
    batches: Callable[[int], Batches]
    frozen: Any = None
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    pictures: Callable[[TrainState], dict[str, np.ndarray]] | None = None
    watch: Callable[[int, dict[str, float]], list[str]] | None = None
    milestones: tuple[int, ...] = ()
    phase: Callable[[int], Hashable] = lambda step: None
    begin: Callable[[TrainState], TrainState] | None = None


def jit_step(stage: Stage, mesh: Mesh):
    """Compile a stage's step on a mesh.

    Returns:
      (step, shardings of the state); the state given to ``step`` is donated.
    """
    abstract = jax.eval_shape(stage.init, jax.random.key(0))
    shardings = shard(abstract, mesh)
    options = dict(donate_argnums=0, static_argnums=4, out_shardings=(shardings, None))
    return jit_on(mesh, **options)(stage.step), shardings


def init_state(stage: Stage, shardings, seed: int) -> TrainState:
    """Create the state at step 0, directly with its target sharding."""
    key = jax.random.fold_in(stage_key(stage.name, seed), 0)
    return jax.jit(stage.init, out_shardings=shardings)(key)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The result of `fit`.

    Attributes:
      state: of the last step, or of the best one where ``best_metric`` is given.
      step: number of that step.
      seconds: training time, earlier sessions included.
    """

    state: TrainState
    step: int
    seconds: float


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
    best_metric: str = "",
    best_mode: str = "min",
    amended: str | None = None,
    remedy: str = "",
) -> Fitted:
    """Train to ``steps``, resuming from the latest checkpoint in ``folder`` if there is one.

    A checkpoint is on disk before the evaluation of its step begins. Evaluations, pictures and
    warnings that fail are logged and left out; a session that resumes at a step without its
    evaluation runs it first.

    Randomness is keyed by (seed, step), and the step is the position in the data. So an interrupted
    run ends with the same weights as an uninterrupted one, and can resume on another number of
    devices or processes.

    Args:
      folder: of the stage: checkpoints and metrics.
      steps, batch_size: of the training.
      log_every, eval_every, save_every: steps between reports, evaluations and checkpoints.
      keep: number of latest checkpoints to keep.
      best_metric: a metric of the evaluations, such as "eval/fid", whose best checkpoint is kept
        and becomes the result; "": the last state is the result. It also is if no evaluation
        succeeded.
      best_mode: "min" or "max".
      amended: not None if the latest checkpoint was made by another config and the user accepted
        that; then the identity of the data to resume with, or "" for the checkpoint's.
      remedy: what to do if a metric is not finite.

    Raises:
      NonFiniteError: if a metric is NaN or infinite; names the last good checkpoint.
      CheckpointError: if a checkpoint cannot be written or does not fit.
      ConfigError: if evaluations do not give ``best_metric``.
      Preempted: after SIGTERM or Ctrl-C, once the current step is saved.
    """
    batches = stage.batches(batch_size)
    check_batch(batch_size, mesh, f"{stage.name}: batch_size")
    step_fn, shardings = jit_step(stage, mesh)
    best = Best(best_metric, best_mode) if best_metric else None
    where = f"{folder.name}.train"
    if best and (stage.evaluate is None or eval_every <= 0):
        raise ConfigError(
            f"{stage.name}: {where}.best_metric is {best_metric!r}, but nothing is evaluated while "
            f"it trains; set {where}.eval_every, or leave it empty: --config.{where}.best_metric="
        )
    checkpoints = Checkpoints(folder, keep=keep, milestones=stage.milestones, best=best)
    before = 0.0
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(stage.init, jax.random.key(0)),
        shardings,
    )

    def anew() -> TrainState:
        return init_state(stage, shardings, seed)

    if checkpoints.latest is None:
        state, start = stage.begin(anew()) if stage.begin else anew(), 0
    else:
        if amended is not None:
            at = checkpoints.folder / str(checkpoints.latest)
            meta = read_meta(folder, checkpoints.latest)
            state = relayout.restore(abstract, at / "state", anew)
        else:
            state, meta = checkpoints.restore(abstract)
        start, before = int(state.step), meta["seconds"]
        read = amended or meta["batches"]
        if read != batches.identity:
            raise CheckpointError(
                f"{checkpoints.folder}: step {start} was trained on {read}, this run "
                f"reads {batches.identity}; give the same data, pass --amend to resume from step "
                f"{start} with these (in another order: some images of this epoch may be repeated, "
                "others left out), or start over with --fresh"
            )
        logging.info("%s: resumed at step %d of %d", stage.name, start, steps)

    watch, metrics = Stopwatch(before), Metrics(folder, start)
    if best is not None:
        known = distributed.agree(lambda: list(metrics.column(best_metric).items()))
        for step, score in known:
            best.add(step, score)
    key = jax.random.fold_in(stage_key(stage.name, seed), 1)
    window: list = []  # metrics on the device since the last report
    in_flight: collections.deque = collections.deque()  # metrics of the last steps
    due: list = []  # a report is made after the next step is sent, so that the device never waits

    def report(step: int, rows: list) -> None:
        values = _mean(rows)
        _check_finite(values, stage.name, step, checkpoints, remedy)
        values |= {"data_wait": waiting.share()}
        metrics.write(step, values)
        progress.say(step, values)
        try:
            warnings = list(stage.watch(step, values)) if stage.watch else []
        except Exception as error:
            warnings = [f"the check of the metrics failed ({error}); training continues"]
        for warning in [*warnings, *waiting.warnings()]:
            logging.warning("%s, step %d: %s", stage.name, step, warning)

    def save(step: int) -> None:
        meta = {"seconds": watch.seconds, "batches": batches.identity}
        checkpoints.save(step, state, meta)

    def diagnose(what: str, step: int, function: Callable[[TrainState], dict]) -> dict:
        """Call the function with the state; return {} and log a warning if it fails."""
        try:
            return distributed.attempt(
                lambda: function(state), f"{what} {stage.name} {step} {next(_attempts)}"
            )
        except distributed.FailedAttempt as error:
            text = "%s, step %d: no %s (%s); training continues without"
            logging.warning(text, stage.name, step, what, error)
            return {}

    def due_evaluation(step: int) -> bool:
        every = eval_every > 0 and step % eval_every == 0
        return stage.evaluate is not None and (step == steps or every)

    def evaluate(step: int) -> None:
        if stage.evaluate is None:
            return
        figures = diagnose("evaluation", step, stage.evaluate)
        scores = {f"eval/{name}": float(value) for name, value in figures.items()}
        metrics.add(step, scores)
        if scores:
            progress.say(step, scores)
        if stage.pictures:
            for name, pixels in diagnose("pictures", step, stage.pictures).items():
                metrics.picture(step, name, pixels)
        if best is None or not scores:
            return
        if best_metric in scores:
            best.add(step, scores[best_metric])
        elif best.scores:
            text = "%s, step %d: this evaluation gave no %s; the step does not count as the best"
            logging.warning(text, stage.name, step, best_metric)
        else:
            raise ConfigError(
                f"{stage.name}: {where}.best_metric is {best_metric!r}, but evaluations give "
                f"{', '.join(sorted(scores))}; step {step} is saved, resume with one of these: "
                f"--config.{where}.best_metric={min(scores)}"
            )

    feed = Feed(batches, mesh, start)
    waiting = Waiting(feed, batches.remedy)

    def idle() -> bool:
        """Return whether the device has finished all steps that were sent to it."""
        return not in_flight or all(x.is_ready() for x in jax.tree.leaves(in_flight[-1]))

    try:
        with Progress(stage.name, steps, done=start) as progress, Notice() as notice:
            missing = start > 0 and due_evaluation(start)
            if missing and not distributed.agree(lambda: metrics.evaluated(start)):
                evaluate(start)  # an earlier session ended before it, or it failed
            for step in range(start + 1, steps + 1):
                phase = stage.phase(step - 1)
                state, scalars = step_fn(state, feed.take(idle), key, stage.frozen, phase)
                window.append(scalars)
                in_flight.append(scalars)
                if len(in_flight) > AHEAD:
                    jax.block_until_ready(in_flight.popleft())
                progress.update()
                waiting.step()
                while due:
                    report(*due.pop())
                evaluated = due_evaluation(step)
                saved = step % save_every == 0 or step == steps or step in stage.milestones
                saved = saved or (evaluated and best is not None)
                if saved or evaluated:
                    waiting.pause()
                    report(step, window)
                    window = []
                elif step % log_every == 0:
                    due, window = [(step, window)], []
                if saved:
                    save(step)
                if evaluated:
                    checkpoints.wait()
                    evaluate(step)
                if saved or evaluated:
                    waiting.resume()
                if notice.due():  # after the last step too, or the next stage would begin
                    if not saved:
                        while due:
                            report(*due.pop())
                        if window:  # not reported, but what is saved must be finite
                            _check_finite(_mean(window), stage.name, step, checkpoints, remedy)
                        save(step)
                    checkpoints.wait()
                    raise Preempted(
                        f"{stage.name}: asked to stop ({notice.name}); step {step} of {steps} is "
                        "saved, the same command resumes from there",
                        notice.number,
                    )
        checkpoints.wait()
        chosen = steps
        best_step = None if best is None else checkpoints.best
        if best is not None and best_step is None:
            text = "%s: no evaluation gave %s, so the last step is the result"
            logging.warning(text, stage.name, best_metric)
        elif best_step is not None and best_step != steps:
            logging.info("%s: step %d is the best by %s", stage.name, best_step, best_metric)
            path_of_best, chosen = checkpoints.folder / str(best_step) / "state", best_step
            if relayout.differs(abstract, path_of_best):  # saved before the config was amended
                state = relayout.restore(abstract, path_of_best, anew)
            else:
                state, _ = checkpoints.restore(abstract, best_step)
    finally:
        checkpoints.close()
        metrics.close()
        feed.close()
    return Fitted(state, chosen, watch.seconds)


def _mean(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Average over the steps of a window those metrics that its last step has.

    A phase that began in the window may have brought new metrics.
    """
    rows = jax.device_get(window)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in rows[-1]}


def _check_finite(
    values: dict, name: str, step: int, checkpoints: Checkpoints, remedy: str
) -> None:
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    if bad:
        checkpoints.wait()
        last = checkpoints.latest
        where = f"step {last} in {checkpoints.folder}" if last else "none"
        earlier = [kept for kept in checkpoints.steps if kept != last]
        back = f"; if that is not enough, add --from-step={earlier[-1]}" if earlier else ""
        raise NonFiniteError(
            f"{name}: {', '.join(bad)} not finite at step {step}; training stopped and nothing was "
            f"saved since. Last good checkpoint: {where}. {remedy}{back}"
        )
