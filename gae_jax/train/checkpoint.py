"""Checkpoints with orbax: asynchronous, atomic, and complete.

A step holds two items: ``state`` (parameters, EMA, every optimizer, batch statistics, step) and
``meta`` (JSON: seconds of training, and the identity of the batches, in which the step is the
position). A kill at any moment leaves the last finished step restorable, on any mesh and number of
processes.
"""

import contextlib
import datetime
import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from gae_jax.nn.network import Arrays
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import CheckpointError, UserError
from gae_jax.train.best import Best
from gae_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints of one stage.

    Args:
      folder: the stage's folder; checkpoints go to ``folder/checkpoints/STEP``.
      keep: how many of the latest steps to retain.
      milestones: steps that are never removed.
      best: also retains the step with the best score.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        milestones: tuple[int, ...] = (),
        best: Best | None = None,
    ):
        self.folder, self._best = folder / "checkpoints", best
        policies = [preservation_policy.LatestN(keep), preservation_policy.CustomSteps(milestones)]
        if best:
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            create=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)
        except Exception as error:  # orbax reads a file of every step and raises anything on damage
            if (damaged := _damaged_listing(self.folder)) is None:
                raise
            raise CheckpointError(
                f"{damaged} is damaged: {error}\nremove this checkpoint ({damaged.parent}) to "
                "resume from another one that is kept, or start this stage over with --fresh"
            ) from error

    @property
    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The finished steps, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The best of the finished steps, or None if none has a score."""
        return self._best.of(self._manager.all_steps()) if self._best else None

    def save(self, step: int, state: TrainState, meta: dict) -> None:
        """Start writing a checkpoint; the arrays may be changed once this returns.

        Args:
          meta: JSON values, "seconds" and "batches" among them.

        Raises:
          CheckpointError: if this or the previous save could not be written, naming the last
            step that was.
        """
        with self._explained(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
            )

    def wait(self) -> None:
        """Wait until everything is on disk; raises as `save` does."""
        with self._explained(None):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """Restore a step, by default the latest.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Returns:
          (state, meta).

        Raises:
          CheckpointError: if it is damaged or does not fit.
        """
        step = self.latest if step is None else step
        with readable(self.folder / str(step), "use the config that it was made with"):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        return restored.state, _checked_meta(restored.meta, self.folder / str(step))

    def close(self) -> None:
        """Wait for saves and free what orbax holds; raises as `save` does."""
        with self._explained(None):
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self, step: int | None):
        try:
            yield
        except Exception as error:  # orbax raises whatever the file system raised
            # the unfinished checkpoint may be listed
            self._manager.reload()
            steps = [s for s in self._manager.all_steps() if s != step]
            last = f"step {max(steps)} in {self.folder}" if steps else "none"
            what = "a checkpoint"
            if step is not None:  # orbax reports the failure of a save at the next one
                what = f"the checkpoint of step {step} or the one before it"
            reason = _reason(str(error)) or type(error).__name__
            refused = reason in map(os.strerror, (errno.EACCES, errno.EPERM, errno.EROFS))
            remedy = "make the folder writable" if refused else "make room on the disk"
            raise CheckpointError(
                f"{what} could not be written to {self.folder}: {reason}\nlast good checkpoint: "
                f"{last}; {remedy} and run the same command again to resume from there"
            ) from error


def _damaged_listing(root: Path) -> Path | None:
    """Find the first checkpoint that orbax cannot list; return the file that is damaged."""
    for step in kept_steps(root.parent):
        path = root / str(step) / "_CHECKPOINT_METADATA"
        try:
            listed = json.loads(path.read_text())
            datetime.datetime.fromtimestamp((listed.get("commit_timestamp_nsecs") or 0) / 1e9)
        except Exception:  # damaged content raises anything
            return path
    return None


@contextlib.contextmanager
def readable(checkpoint: Path, remedy: str = "put it back from a copy"):
    """Turn whatever is raised while a checkpoint is read into a CheckpointError.

    Args:
      checkpoint: its folder, ``checkpoints/STEP``.
      remedy: first remedy to name, before earlier checkpoints and starting over.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # orbax and tensorstore raise anything on damaged files
        steps = kept_steps(checkpoint.parents[1])
        earlier = [step for step in steps if step < int(checkpoint.name)]
        back = f", go back with --from-step={max(earlier)}" if earlier else ""
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        raise CheckpointError(
            f"{checkpoint} is damaged or does not fit this run: {reason}\n{remedy}{back}, or start "
            "this stage over with --fresh"
        ) from error


def _checked_meta(meta: Any, checkpoint: Path) -> dict:
    """Return the meta of a checkpoint.

    Raises:
      CheckpointError: if it is not what `fit` writes.
    """
    with readable(checkpoint):
        if not isinstance(meta, dict) or not isinstance(meta.get("batches"), str):
            raise ValueError("its meta does not say which batches it was trained on")
        if not 0 <= float(meta["seconds"]) < math.inf:
            raise ValueError(f"its meta says {meta['seconds']} seconds")
    return meta


def stored_tree(state: Path) -> dict:
    """Read the tree of a checkpoint's item ``state``, with shapes and dtypes instead of arrays.

    Raises:
      CheckpointError: if it cannot be read.
    """
    with readable(state.parent), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(state.absolute()).item_metadata.tree
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}")
        return tree


def _reason(text: str) -> str:
    """Return the file system's error in a library's message, or the message's first line."""
    known = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES))
    return next((words for words in known if words in text), text.partition("\n")[0][:300])


def load_weights(folder: Path, which: str, network: str, step: int | None = None) -> Arrays:
    """Load the weights of one network of a stage as numpy arrays on the host.

    Args:
      folder: the stage's folder.
      which: "params" or "ema".
      network: its name in the state.
      step: of the checkpoint; None: the newest.

    Returns:
      (parameters, rest), as `network.Network` takes them.

    Raises:
      CheckpointError: if there is no checkpoint, or it holds no such weights.
    """
    path = _state_of(folder, step)
    wanted = {which: {network: _stored(path, which, network)}}
    if rest := stored_tree(path).get("rest", {}).get(network):
        wanted["rest"] = {network: rest}
    restored = _read_part(path, wanted)
    return restored[which][network], restored.get("rest", {}).get(network, {})


def _stored(path: Path, which: str, network: str) -> dict:
    """Return the tree of a network in an item ``state``; raise CheckpointError without it."""
    tree = stored_tree(path).get(which, {})
    if network not in tree:
        raise CheckpointError(f"{path} holds no {which} of {network!r}")
    return tree[network]


def _read_part(path: Path, wanted: dict) -> dict:
    """Read a part of an item ``state``, given by its tree, as numpy arrays."""
    kinds = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=kinds, partial_restore=True)
    with readable(path.parent), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=args)


def stored_networks(folder: Path, which: str, step: int | None = None) -> tuple[str, ...]:
    """Return the networks whose "params" or "ema" a checkpoint (by default the newest) holds."""
    return tuple(stored_tree(_state_of(folder, step)).get(which, {}))


def averaged_or_not(folder: Path, network: str, step: int | None = None) -> str:
    """Return "ema" if a checkpoint (by default the newest) has one of the network, else "params".

    The config does not say so: an amended run may have gained or lost its EMA.
    """
    return "ema" if network in stored_networks(folder, "ema", step) else "params"


def _state_of(folder: Path, step: int | None = None) -> Path:
    step = latest_step(folder) if step is None else step
    if step is None:
        raise CheckpointError(f"{folder}/checkpoints holds no checkpoint; train the stage first")
    return (folder / "checkpoints" / str(step) / "state").absolute()


def read_meta(folder: Path, step: int) -> dict:
    """Read the meta of a checkpoint in a stage's folder: JSON values.

    Raises:
      CheckpointError: if it cannot be read.
    """
    checkpoint = folder / "checkpoints" / str(step)
    with readable(checkpoint):
        meta = json.loads((checkpoint / "meta" / "metadata").read_text())
    return _checked_meta(meta, checkpoint)


def save_weights(folder: Path, which: str, weights: dict[str, Arrays]) -> None:
    """Write weights that were not trained here so that `load_weights` reads them; replace others.

    Args:
      folder: the stage's folder.
      which: "params" or "ema".
      weights: name of the network -> (parameters, rest).
    """
    root = (folder / "checkpoints").absolute()
    if distributed.is_first():
        shutil.rmtree(root, ignore_errors=True)
    distributed.barrier(f"emptied {root}")
    tree = {
        which: {name: params for name, (params, _) in weights.items()},
        "rest": {name: rest for name, (_, rest) in weights.items() if rest},
    }
    tree = {key: value for key, value in tree.items() if value}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(root / "0" / "state", args=ocp.args.PyTreeSave(tree))


def kept_steps(folder: Path) -> list[int]:
    """Return the finished steps in a stage's folder, ascending."""
    root = (folder / "checkpoints").absolute()
    return sorted(ocp.utils.checkpoint_steps(root)) if root.exists() else []


def latest_step(folder: Path) -> int | None:
    """Return the newest finished step in a stage's folder, or None."""
    return max(kept_steps(folder), default=None)


def stored_shapes(folder: Path, which: str, network: str, step: int | None = None) -> Arrays:
    """Return the shapes of what `load_weights` loads, without reading it; raises as it does."""
    path = _state_of(folder, step)
    trees = _stored(path, which, network), stored_tree(path).get("rest", {}).get(network, {})
    return jax.tree.map(lambda leaf: tuple(leaf.shape), trees)


def load_moments(folder: Path, network: str, step: int | None = None) -> dict | None:
    """Load Adam's state of a network: mu and nu, shaped like its parameters, and count.

    Args:
      folder, step: as `load_weights`.

    Returns:
      numpy arrays, or None if the checkpoint holds no optimizer of the network.
    """
    path = _state_of(folder, step)
    known = stored_tree(path).get("opt", {})
    if network not in known:
        return None
    return _adam(_read_part(path, {"opt": {network: known[network]}})["opt"][network])


def _adam(tree) -> dict | None:
    """Find the part of a stored optimizer that has moments."""
    if isinstance(tree, dict) and {"mu", "nu", "count"} <= tree.keys():
        return tree
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return next((adam for part in parts if (adam := _adam(part)) is not None), None)
