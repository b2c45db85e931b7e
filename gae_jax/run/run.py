"""A run is a directory that describes itself.

``runs/NAME/STAGE/config.json`` holds the config sections that the stage was made with and the
fingerprints of the stages that it was built on; ``done.json`` appears when the stage is
finished. Whoever reads a stage later (sampling, evaluation, another machine) needs only the
directory.
"""

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from gae_jax.config import plain
from gae_jax.config.renamed import modern, modern_changes
from gae_jax.run import amendments
from gae_jax.runtime import distributed, lock
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import read_object, write_json

# What a stage computes before it is finished, and resumes from: checkpoints, shards, sets.
RESULTS = ("checkpoints/[0-9]*", "shard-*.json", "*/parts/*.npz", "*/samples.npz")


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage's part of a run.

    Attributes:
      path: of the folder.
      pending: a change of course that `open` accepted and `go_on` has not written yet.
    """

    path: Path
    pending: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def done(self) -> dict | None:
        """What `finish` recorded, or None while the stage is not finished."""
        path = self.path / "done.json"
        if not path.exists() or self.pending:
            return None
        return read_object(
            path,
            remedy="remove this file and run again: python -m gae_jax "
            f"{command_of(self.name)} (with the same --config and --workdir), which resumes from "
            "what is there",
        )

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The config sections that the stage was made with."""
        return ml_collections.ConfigDict(self.marker["config"]).lock()

    @property
    def marker(self) -> dict:
        """What ``config.json`` says; fields of older versions have their names of now.

        Raises:
          UserError: if it is damaged or not ours.
        """
        marker: dict[str, Any] = read_object(
            self.path / "config.json",
            config=dict,
            inputs=dict,
            remedy="put it back from a copy, or start this stage over: python -m gae_jax "
            f"{command_of(self.name)} --config=FILE --workdir={self.path.parent} --fresh",
        )
        marker["config"] = modern(marker["config"])
        if "amended" in marker:
            marker["amended"] = modern_changes(marker["amended"])
        return marker

    @property
    def amended(self) -> list[dict]:
        """Records of all changes of course of this stage and of those that it is built on."""
        there = (self.path / "config.json").exists()
        return self.marker.get("amended", []) if there else []

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are kept, ascending."""
        folders = (self.path / "checkpoints").glob("*")
        return sorted(int(path.name) for path in folders if path.name.isdigit())

    @property
    def holds_results(self) -> bool:
        """Whether anything was computed that a later session resumes from."""
        return any(any(self.path.glob(pattern)) for pattern in ("done.json", *RESULTS))

    def open(
        self, sections: Mapping[str, Any], inputs: Mapping[str, str], *, fresh: bool, wish=None
    ) -> bool:
        """Claims the folder for a stage made of these; True if there is work to do.

        A stage that has computed nothing yet may be made of something else.

        Args:
          sections: the part of the config that decides what the stage computes.
          inputs: name -> fingerprint of what the stage is built on.
          fresh: throw away what is there.
          wish: an `amendments.Wish`. A change of course that it allows is `pending` until
            `go_on` writes it.

        Raises:
          UserError: if the folder was made of something else, listing what differs, or if another
            process makes it (`lock`).
        """
        wish = wish or amendments.Wish()
        found = distributed.agree(lambda: self._open(sections, inputs, fresh, wish))
        distributed.await_file(self.path / "config.json")
        self.pending.clear()
        self.pending.update(found["pending"])
        return found["work"]

    def _open(
        self,
        sections: Mapping[str, Any],
        inputs: Mapping[str, str],
        fresh: bool,
        wish: amendments.Wish,
    ) -> dict:
        self.pending.clear()
        going_on = wish.trains and (wish.amend or wish.from_step is not None)
        if fresh or going_on or self.done is None:
            lock.acquire(self.path)
        found = self._claim(sections, inputs, fresh, wish)
        if not found["work"]:
            lock.release(self.path)
        return found

    def _claim(
        self,
        sections: Mapping[str, Any],
        inputs: Mapping[str, str],
        fresh: bool,
        wish: amendments.Wish,
    ) -> dict:
        marker = self.path / "config.json"
        if fresh and self.path.exists():
            visible = [p for p in self.path.iterdir() if not p.name.startswith(".")]
            if visible and not marker.exists():
                raise UserError(f"--fresh: {self.path} was not made by gae_jax; remove it yourself")
            shutil.rmtree(self.path)
        wanted = {"config": plain(ml_collections.ConfigDict(sections)), "inputs": dict(inputs)}
        if inherited := amendments.merged(*map(self._amended_input, inputs)):
            wanted["amended"] = inherited
        if not marker.exists():
            amendments.check_from_step(self._situation(wanted), wish)
            write_json(marker, wanted)
            return {"work": self.done is None, "pending": {}}
        there = self._rewound(self.marker)
        situation = self._situation(wanted)
        amendments.check_from_step(situation, wish)
        base = there["config"]
        if wish.from_step is not None:
            base = amendments.config_at(wish.from_step, base, there.get("amended", []), self.name)
        changes = amendments.differences(base, wanted["config"])
        foreign = self._foreign(there, wanted)
        if not self.holds_results:
            if changes or foreign:
                write_json(marker, wanted)
            return {"work": True, "pending": {}}
        if foreign:
            raise UserError("\n".join(foreign) + "\n" + self._made_again())
        if changes and (not wish.amend or amendments.obstacle(changes, situation, wish)):
            raise UserError(amendments.refusal(changes, situation, wish))
        if not (wish.trains and situation.steps):
            return {"work": self.done is None, "pending": {}}
        back = wish.from_step is not None and wish.from_step < situation.steps[-1]
        if situation.done and not (changes or back):
            self._say_ineffective(there["config"], wanted["config"])
            return {"work": False, "pending": {}}
        step = situation.steps[-1] if wish.from_step is None else wish.from_step
        if not (changes or back or wish.amend):
            return {"work": True, "pending": {}}
        pending = {"config": wanted["config"], "changes": changes, "step": step}
        return {"work": True, "pending": pending}

    def go_on(self, changes: list[dict], **facts) -> None:
        """Writes the pending change of course: from here on the stage is unfinished.

        Args:
          changes: of the data, beside those of fields.
          facts: what else the record is to say.
        """
        pending = dict(self.pending)
        self.pending.clear()
        changes = [*pending["changes"], *changes]
        step = pending["step"]
        removed = [other for other in self.steps if other > step]
        distributed.barrier(f"go on {self.path}")
        if changes or removed:
            distributed.agree(lambda: self._go_on(pending["config"], step, changes, removed, facts))

    def _go_on(self, config, step: int, changes: list, removed: list, facts: dict) -> None:
        there = self.marker
        amended = [
            item
            for item in there.get("amended", [])
            if item["stage"] != self.name or item["step"] <= step
        ]
        amended.append(amendments.record(self.name, step, changes, removed, **facts))
        (self.path / "done.json").unlink(missing_ok=True)
        there |= {"config": config, "amended": amended, "rewind": step}
        write_json(self.path / "config.json", there)
        self._rewound(there)

    def _rewound(self, there: dict) -> dict:
        """The marker, with what `go_on` began to remove removed; a kill may have come between."""
        if "rewind" not in there:
            return there
        step = there.pop("rewind")
        for later in self.steps:
            if later > step:
                shutil.rmtree(self.path / "checkpoints" / str(later))
        write_json(self.path / "config.json", there)
        return there

    def _say_ineffective(self, old: dict, new: dict) -> None:
        """Warns of a choice among checkpoints that comes after the training."""
        for name in ("best_metric", "best_mode"):
            was, asked = (one[self.name].get("train", {}).get(name) for one in (old, new))
            if was != asked:
                logging.warning(
                    "%s is finished, chosen by train.%s %r; %r has no effect (--fresh trains it "
                    "again)",
                    *(self.path, name, was, asked),
                )

    def _situation(self, wanted: dict) -> amendments.Situation:
        steps = wanted["config"].get(self.name, {})
        steps = steps.get("train", {}).get("steps") if isinstance(steps, dict) else None
        done = (self.path / "done.json").exists()
        return amendments.Situation(self.name, self.path, done, self.steps, steps)

    def _amended_input(self, name: str) -> list[dict]:
        folder = StageFolder(self.path.parent / name)
        return folder.amended if folder.path.is_dir() else []

    def _foreign(self, there: dict, wanted: dict) -> list[str]:
        def made_by(name: str) -> str:
            before = there["inputs"].get(name)
            return f"{self.path} was made {f'by {name} {before}' if before else f'without {name}'}"

        return [
            f"{made_by(name)}, this run uses {print_}"
            for name, print_ in wanted["inputs"].items()
            if there["inputs"].get(name) != print_
        ]

    def require_of_now(self) -> None:
        """Raises UserError if what this stage is made of changed since, with the remedy.

        For who reads a finished stage beside those that it was made of.
        """
        run = Run(self.path.parent)
        now = {name: run.fingerprint(name) for name in self.marker["inputs"]}
        if foreign := self._foreign(self.marker, {"inputs": {k: v for k, v in now.items() if v}}):
            raise UserError("\n".join(foreign) + "\n" + self._made_again())

    def _made_again(self) -> str:
        """The commands that make this stage again, after what it is built on and is as old."""
        names = [*Run(self.path.parent).outdated(self.name), self.name]
        commands = [f"python -m gae_jax {command_of(name)} --fresh" for name in names]
        return (
            f"make them again with: {', then '.join(commands)} "
            "(and the same --config and --workdir)"
        )

    def finish(self, **facts) -> None:
        """Marks the stage as finished and records what others need to know of it."""
        if amended := self.amended:
            facts["amended"] = amended
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

# Folder -> stages that it is made of; those of them that a run has.
BUILT_ON = {
    "teacher": ("backbone",),
    "tokenizer": ("backbone", "teacher"),
    "latents": ("tokenizer",),
    "diffusion": ("latents",),
    "samples": ("tokenizer", "diffusion"),
    "evaluation": ("tokenizer", "latents", "samples"),
    "likelihood": ("tokenizer", "diffusion"),
}
# Every folder that a stage leaves in a run.
STAGES = frozenset(
    {
        *BUILT_ON,
        *("backbone", "reference", "lpips", "inception", "dino"),
        *("teacher-probe", "latent-probe"),
    }
)


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

    def require(self) -> list[StageFolder]:
        """The folders of the stages that were begun; raises UserError if there are none."""
        folders = [self.stage(name) for name in sorted(STAGES)]
        folders = [folder for folder in folders if (folder.path / "config.json").exists()]
        if not folders:
            raise UserError(
                f"{self.path} is no run directory: no stage's folder in it has a config.json"
            )
        return folders

    def outdated(self, name: str) -> list[str]:
        """The stages below one that were not made of what the run holds now, in their order."""
        found: list[str] = []
        for below in BUILT_ON.get(name, ()):
            folder = self.stage(below)
            if not (folder.path / "config.json").exists():
                continue
            found += [other for other in self.outdated(below) if other not in found]
            inputs = folder.marker["inputs"]
            old = any(self.fingerprint(at) not in (None, print_) for at, print_ in inputs.items())
            if below not in found and (old or inputs.keys() & set(found)):
                found.append(below)
        return found

    def fingerprint(self, name: str) -> str | None:
        """Of a finished stage's weights, latents or samples; None if there is none."""
        return (self.stage(name).done or {}).get("fingerprint")
