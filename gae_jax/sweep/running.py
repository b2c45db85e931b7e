"""Brings the runs of a sweep to their end; what several share is computed once."""

import contextlib
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

from gae_jax.errors import UserError
from gae_jax.files import write_bytes
from gae_jax.run import StageFolder, Stopwatch
from gae_jax.stages.contents import same_images
from gae_jax.stages.session import Session
from gae_jax.sweep.definition import Sweep
from gae_jax.sweep.outcomes import run_of, state_of
from gae_jax.sweep.probes import PROBES, probe
from gae_jax.train.log import duration


class SweepSession(Session):
    """A session that takes finished stages from the other runs of its sweep."""

    @property
    def kept(self) -> Path:
        """Of all runs of the sweep."""
        return self.run.path.parent / "kept"

    def open(self, name: str, *, sections: tuple[str, ...], inputs: tuple[str, ...]) -> StageFolder:
        """As `Session.open`; first copies the stage if another run has it finished and equal."""
        here = self.run.stage(name).path
        if not here.exists():
            made_of = self.identity(name, sections, inputs)
            for there in sorted(self.run.path.parent.glob(f"*/{name}")):
                folder = StageFolder(there)
                if _is_finished_and_equal(folder, *made_of) and same_images(self, folder):
                    adopt(there, here)
                    logging.info("%s: the same as that of %s", name, there.parent.name)
                    break
        return super().open(name, sections=sections, inputs=inputs)


def _is_finished_and_equal(folder: StageFolder, sections: Mapping, inputs: Mapping) -> bool:
    done = folder.done
    # what was imported may differ from its config, and so may what was amended on its way
    if not done or done.get("imported") or done.get("amended"):
        return False
    try:
        return not folder.open(sections, inputs, fresh=False)
    except UserError:
        return False


def adopt(there: Path, here: Path) -> None:
    """Copies a finished stage, whole or not at all.

    Files are linked where the file system can: those of finished stages are replaced or removed
    as a whole, never written into.
    """

    def link(source, target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    copy = here.with_name(f".{here.name}.copy")
    shutil.rmtree(copy, ignore_errors=True)  # of a process that was killed
    shutil.copytree(there, copy, copy_function=link)
    copy.rename(here)


def run_stages(sweep: Sweep, session: Session) -> None:
    """All commands of one run, in order."""
    from gae_jax.__main__ import run_command

    for command in sweep.commands:
        if command in PROBES:
            probe(session, command)
        else:
            run_command(command, session)


@contextlib.contextmanager
def prefixed(name: str) -> Iterator[None]:
    """Every line that is logged inside begins with the name."""
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
) -> int:
    """Brings every ``tasks``-th run to its end; returns how many failed."""
    mine = sweep.runs()[task::tasks]
    runs = [run_of(workdir, point, seed) for point, seed in mine]
    new = [state_of(sweep, run) != "finished" for run in runs]
    failed, seconds = 0, []
    for index, ((point, seed), run) in enumerate(zip(mine, runs, strict=True)):
        left = duration(np.mean(seconds) * sum(new[index:])) if seconds else "?"
        logging.info(
            "run %d of %d: %s seed %d, %s left", index + 1, len(mine), point.name, seed, left
        )
        watch = Stopwatch()
        (run.path / "error.txt").unlink(missing_ok=True)
        session = SweepSession(
            configs[point.name, seed], run, config_file=sweep.config, devices=devices
        )
        try:
            with prefixed(run.path.name):
                run_stages(sweep, session)
        except Exception as error:  # whatever it was, the other runs are not to suffer from it
            failed += 1
            text = str(error) if isinstance(error, UserError) else traceback.format_exc()
            write_bytes(run.path / "error.txt", text.encode())
            logging.error("%s failed:\n%s", run.path.name, textwrap.indent(text, "  "))
        if new[index]:
            seconds.append(watch.seconds)
    return failed


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """What one run compiled, those that differ from it in the seed alone need not compile again.

    Wherever the user has JAX keep compiled programs, that is left alone.
    """
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="gae_jax-compiled-") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
