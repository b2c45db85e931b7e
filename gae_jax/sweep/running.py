"""Run the points of a sweep; stages that several runs share are computed once."""

import contextlib
import copy
import dataclasses
import logging
import os
import shutil
import tempfile
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gae_jax.config import flatten, precision
from gae_jax.config.tools import set_field
from gae_jax.run.amendments import Wish
from gae_jax.run.contents import same_images
from gae_jax.run.run import STAGES, Run, StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import write_bytes
from gae_jax.runtime.progress import Stopwatch, duration
from gae_jax.sweep.definition import Sweep
from gae_jax.sweep.outcomes import run_of, state_of
from gae_jax.sweep.probes import PROBES, probe

TRAINED = ("backbone", "teacher", "tokenizer", "diffusion")


@dataclasses.dataclass(frozen=True)
class SweepSession(Session):
    """A session that links finished stages of the other runs of its sweep.

    Attributes:
      from_stage: the stage that ``from_step`` belongs to.
    """

    from_stage: str = ""

    def wish(self, name: str) -> Wish:
        """As `Session.wish`; ``from_step`` is for ``from_stage`` only."""
        wish = super().wish(name)
        return wish if name == self.from_stage else dataclasses.replace(wish, from_step=None)

    @property
    def kept(self) -> Path:
        """Folder of results that all runs of the sweep share."""
        return self.run.path.parent / "kept"

    def open(self, name: str, *, sections: tuple[str, ...], inputs: tuple[str, ...]) -> StageFolder:
        """As `Session.open`; first links the stage if another run has it finished and equal."""
        here = self.run.stage(name).path
        if not here.exists():
            made_of = self.identity(name, sections, inputs)
            for there in sorted(self.run.path.parent.glob(f"*/{name}")):
                folder = StageFolder(there)
                if _is_finished_and_equal(folder, *made_of) and same_images(self, folder):
                    link_tree(there, here)
                    logging.info("%s: linked from %s", name, there.parent.name)
                    break
        return super().open(name, sections=sections, inputs=inputs)


def _is_finished_and_equal(folder: StageFolder, sections: Mapping, inputs: Mapping) -> bool:
    done = folder.done
    # imported and amended stages may differ from their config
    if not done or done.get("imported") or done.get("amended"):
        return False
    try:
        return not folder.open(sections, inputs, fresh=False)
    except UserError:
        return False


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder completely or not at all, its files as hard links where that is possible.

    Files of finished stages are replaced or removed, never written into, so links are safe.
    """

    def link(source, target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    copy = target.with_name(f".{target.name}.copy")
    shutil.rmtree(copy, ignore_errors=True)  # of a process that was killed
    shutil.copytree(source, copy, copy_function=link)
    copy.rename(target)


def link_stages(source: Run, run: Run, commands: tuple[str, ...]) -> None:
    """Link the finished stages of ``source`` into a run of the sweep.

    Those that the sweep's own commands make are left out.

    Raises:
      UserError: if the run holds a stage with other results than the source's.
    """
    runs, made = run.path.parent, set(commands)
    for name in sorted(STAGES - made):
        original, here = source.stage(name), run.stage(name)
        if not (done := original.done):
            continue
        if not here.path.exists():
            # a run of the sweep first: where links cannot reach the source, it is copied once
            siblings = [Run(other.parent).stage(name) for other in sorted(runs.glob(f"*/{name}"))]
            same = [stage for stage in siblings if stage.done == done]
            link_tree((same or [original])[0].path, here.path)
            logging.info("%s: linked from %s", name, source.path)
        elif here.done != done:
            raise UserError(
                f"{here.path} does not hold the results of {original.path}: {runs} was made from "
                "another run, or this run was trained again since; give another --workdir, or "
                f"remove {run.path}"
            )
    kept = source.path / "kept"  # statistics of the training images, named by their contents
    if kept.exists() and not (runs / "kept").exists():
        link_tree(kept, runs / "kept")


def with_amendments(config: Any, run: Run) -> Any:
    """Apply the fields to a run's config that ``--amend`` changed in earlier calls.

    A field that no longer has the value that was changed is left as it is.
    """
    amended = copy.deepcopy(config)
    given = flatten(config) | precision.fields_of(config)
    for name in TRAINED:
        for item in run.stage(name).amended:
            if item["stage"] != name:
                continue
            for change in item["changes"]:
                field, new = change["field"], change["new"]
                if field in given and given[field] == change["old"]:
                    given[field] = new
                    set_field(amended, field, tuple(new) if isinstance(new, list) else new)
                    logging.info("%s: %s is %s since --amend", run.path.name, field, new)
    return amended


def run_stages(sweep: Sweep, session: Session) -> None:
    """Run all commands of one run, in order."""
    from gae_jax.commands.cli import run_command

    for command in sweep.commands:
        if command in PROBES:
            probe(session, command)
        else:
            run_command(command, session)


@contextlib.contextmanager
def prefixed(name: str) -> Iterator[None]:
    """Prefix every line that is logged inside with the name."""
    make = logging.getLogRecordFactory()

    def factory(*args, **kwargs):
        record = make(*args, **kwargs)
        record.msg, record.args = f"{name}  {record.getMessage()}", ()
        return record

    logging.setLogRecordFactory(factory)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


def run_all(
    sweep: Sweep,
    workdir: Path,
    configs: Mapping[tuple[str, int], Any],
    *,
    task: int = 0,
    tasks: int = 1,
    devices: tuple[jax.Device, ...] | None = None,
    amend: bool = False,
    from_step: tuple[str, int] | None = None,
    file: str = "FILE",
    source: Run | None = None,
) -> int:
    """Complete every ``tasks``-th run; returns how many failed.

    Args:
      configs: of `configs_of`.
      task: the first run, from 0.
      amend: training stages resume with changed fields.
      from_step: a stage, and the step of the checkpoint from which it resumes.
      file: the sweep's file, for advice in errors.
      source: a finished run whose trained stages are linked into every run of the sweep.
    """
    resume: dict[str, Any] = {"amend": amend}
    if from_step:
        resume |= {"from_stage": from_step[0], "from_step": from_step[1]}
    mine = sweep.runs()[task::tasks]
    runs = [run_of(workdir, point, seed) for point, seed in mine]
    new = [state_of(sweep, run) != "finished" for run in runs]
    failed = 0
    seconds: list[float] = []
    for index, ((point, seed), run) in enumerate(zip(mine, runs, strict=True)):
        left = duration(float(np.mean(seconds)) * sum(new[index:])) if seconds else "?"
        logging.info(
            "run %d of %d: %s seed %d, %s left", index + 1, len(mine), point.name, seed, left
        )
        watch = Stopwatch()
        (run.path / "error.txt").unlink(missing_ok=True)
        config = configs[point.name, seed]
        try:
            if source:
                link_stages(source, run, tuple(sweep.commands))
            config = with_amendments(config, run)
            with prefixed(run.path.name):
                session = SweepSession.start(
                    config, run.path, config_file=sweep.config, devices=devices, **resume
                )
                run_stages(sweep, session)
        except Exception as error:  # the other runs continue, whatever it was
            failed += 1
            text = str(error) if isinstance(error, UserError) else traceback.format_exc()
            if isinstance(error, UserError) and "--amend" in text:
                text += (
                    "\nhere that command is: python launch/sweep.py "
                    f"{file} --workdir={workdir} --points={point.name} --seeds={seed} --amend, "
                    "with the changed fields, and --from-step=STAGE:N where a step is named; the "
                    "run keeps them, and the whole sweep then resumes as before"
                )
            write_bytes(run.path / "error.txt", text.encode())
            logging.error("%s failed:\n%s", run.path.name, textwrap.indent(text, "  "))
        if new[index]:
            seconds.append(watch.seconds)
    return failed


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Cache compiled programs, so that runs that differ only in the seed compile once.

    A cache that the user has set up is used instead.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]  # set at run time
        yield
        return
    with tempfile.TemporaryDirectory(prefix="gae_jax-compiled-") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
