"""A run is a directory that describes itself.

``runs/NAME/STAGE/config.json`` holds the config sections that the stage was made with and the
fingerprints of the stages that it was built on; ``done.json`` appears when the stage is
finished. Whoever reads a stage later (sampling, evaluation, another machine) needs only the
directory.
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from gae_jax import distributed, lock
from gae_jax.config import OPERATIONAL, default_config, flatten, plain
from gae_jax.errors import UserError
from gae_jax.files import read_object, write_json


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage's part of a run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def done(self) -> dict | None:
        """What `finish` recorded, or None while the stage is not finished."""
        path = self.path / "done.json"
        return read_object(path) if path.exists() else None

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The config sections that the stage was made with."""
        there = read_object(self.path / "config.json", config=dict, inputs=dict)
        return ml_collections.ConfigDict(there["config"]).lock()

    def open(self, sections: Mapping[str, Any], inputs: Mapping[str, str], *, fresh: bool) -> bool:
        """Claims the folder for a stage made of these; True if there is work to do.

        Args:
          sections: the part of the config that decides what the stage computes.
          inputs: name -> fingerprint of what the stage is built on.
          fresh: throw away what is there.

        Raises:
          UserError: if the folder was made of something else, listing what differs, or if another
            process makes it (`lock`).
        """
        work = distributed.agree(lambda: self._open(sections, inputs, fresh))
        distributed.await_file(self.path / "config.json")
        return work

    def _open(self, sections: Mapping[str, Any], inputs: Mapping[str, str], fresh: bool) -> bool:
        marker = self.path / "config.json"
        if fresh or self.done is None:
            lock.acquire(self.path)
        if fresh and self.path.exists():
            visible = [p for p in self.path.iterdir() if not p.name.startswith(".")]
            if visible and not marker.exists():
                raise UserError(f"--fresh: {self.path} was not made by gae_jax; remove it yourself")
            shutil.rmtree(self.path)
        wanted = {"config": plain(ml_collections.ConfigDict(sections)), "inputs": dict(inputs)}
        if marker.exists():
            self._check_same(read_object(marker, config=dict, inputs=dict), wanted)
        else:
            write_json(marker, wanted)
        if self.done is None:
            return True
        lock.release(self.path)
        return False

    def _check_same(self, there: dict, wanted: dict) -> None:
        foreign = [
            f"the {self.name} in {self.path} were made by {name} {there['inputs'].get(name)}, "
            f"this run uses {print_}"
            for name, print_ in wanted["inputs"].items()
            if there["inputs"].get(name) != print_
        ]
        if foreign:
            raise UserError(
                "\n".join(foreign)
                + f"\nmake them again with: python -m gae_jax {command_of(self.name)} --fresh "
                "(and the same --config and --workdir)"
            )
        old, new = flatten(there["config"]), flatten(wanted["config"])
        # a field that came with a later version: its default is what was done before
        old = {k: v for k, v in flatten(default_config()).items() if k in new} | old
        differing = [
            f"  {key}: {old.get(key, '(absent)')!r} there, {new.get(key, '(absent)')!r} asked for"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key.split(".")[-1] not in OPERATIONAL
        ]
        if differing:
            raise UserError(
                f"{self.path} was made by another config:\n"
                + "\n".join(differing)
                + "\ngive the old values, another --workdir, or --fresh to start this stage over"
            )

    def finish(self, **facts) -> None:
        """Marks the stage as finished and records what others need to know of it."""
        write_json(self.path / "done.json", facts)
        lock.release(self.path)
        distributed.barrier(f"finished {self.path}")
        distributed.await_file(self.path / "done.json")

    def require_done(self) -> dict:
        """What `finish` recorded.

        Raises:
          UserError: if the stage has not been run to its end, naming the command that does it.
        """
        done = self.done
        if done is None:
            state = "is not finished" if self.path.exists() else "does not exist"
            raise UserError(
                f"{self.path} {state}; run first: python -m gae_jax {command_of(self.name)} "
                "(with the same --config and --workdir)"
            )
        return done


# Folder -> command, where the two are not called the same.
COMMANDS = {
    "backbone": "teacher-backbone",
    "samples": "sample",
    "evaluation": "evaluate",
    "reference": "make-reference",
    "dino": "import-torch --config.import_torch.dino=FILE",
}


def command_of(folder: str) -> str:
    """The command that makes a stage's folder."""
    return COMMANDS.get(folder, folder)


def folder_of(command: str) -> str:
    """The folder that a command makes."""
    return {made: folder for folder, made in COMMANDS.items()}.get(command, command)


@dataclasses.dataclass(frozen=True)
class Run:
    """A directory with one folder per stage."""

    path: Path

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name)


class Stopwatch:
    """Seconds spent on a stage, those of interrupted sessions included."""

    def __init__(self, before: float = 0.0):
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
