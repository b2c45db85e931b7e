"""Sweeps: runs that differ in a few fields, and one table of them (``launch/sweep.py``).

A file in ``configs/sweeps/`` has a function ``get_sweep`` that returns a `Sweep`. Every point of
it is run with every seed in a run directory of its own, ``WORKDIR/NAME-seedS``, by the same
commands as any other run.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from einops import rearrange

from gae_jax.arguments import Parser
from gae_jax.config import flatten
from gae_jax.data.images import to_float
from gae_jax.errors import ConfigError, Preempted, UserError
from gae_jax.evaluation.probe import linear_probe
from gae_jax.files import read_json, write_bytes, write_json
from gae_jax.parallel import put_batch
from gae_jax.run import Run, StageFolder, Stopwatch, folder_of
from gae_jax.stages.load import load
from gae_jax.stages.session import Session
from gae_jax.train.log import duration
from gae_jax.validation import validate

USAGE = """\
Runs a sweep: every point with every seed, one after the other, and one table of them all.

usage: python launch/sweep.py FILE [--workdir=DIR] [--list] [--table] [--seeds=S,S]
                              [--task=I --tasks=N] [--config.KEY=VALUE ...]

  FILE                  a sweep, e.g. configs/sweeps/lambda_sp.py
  --config.KEY=VALUE    change one field of every point, e.g. a shorter training; refused for
                        fields in which the points differ
  --workdir=DIR         where the runs and the table go (default: runs/sweeps/NAME, NAME as in
                        configs/sweeps/NAME.py)
  --seeds=S,S           other seeds than those of the file
  --list                only print the runs and how far each one is
  --table               only write the table of what is there
  --task=I --tasks=N    only every N-th run, from I = 0 on, for the tasks of a job array; the
                        default is what SLURM's array variables say. Then run --table once.
                        Tasks do not wait for each other: what they begin together, each computes
  --help                this text

Run again, it goes on where it stopped: what is finished is skipped, and a stage that another run
of the sweep has finished with the same config and inputs is taken from there. A run that fails
leaves error.txt and the others go on; the exit status is then 1.

WORKDIR/table.html shows table, charts and pictures, WORKDIR/table.csv every single run as well,
WORKDIR/table.md is for GitHub, WORKDIR/pictures/POINT.png shows one point alone.

examples:
  python launch/sweep.py configs/sweeps/lambda_sp.py
  python launch/sweep.py configs/sweeps/lambda_sp.py --workdir=runs/sweeps/long \\
      --config.tokenizer.train.steps=3000
  sbatch --array=0-7 --wrap="python launch/sweep.py configs/sweeps/lambda_sp.py"
"""

LEAVE_NO_STAGE = ("import-torch", "export-torch", "report")  # commands without a folder
# Commands that only sweeps have, each with a folder: what is probed -> made by which stages.
PROBES = {"teacher-probe": ("backbone", "teacher"), "latent-probe": ("tokenizer",)}


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of the table.

    Attributes:
      name: also that of its run directories.
      overrides: dotted path of a config field -> value.
    """

    name: str
    overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One column of the table.

    Attributes:
      label: head of the column.
      name: dotted, in the folder's ``result.json``; of several with "|" between, the first that is
        there.
      form: of the value, as `str.format` takes it.
      folder: of the run, the one that holds the figure.
    """

    label: str
    name: str
    form: str = "{:.2f}"
    folder: str = "evaluation"


# Means over the seeds: point -> label of a metric -> value; and a list of (statement, is it so).
Means = Mapping[str, Mapping[str, float]]
Check = Callable[[Means], list[tuple[str, bool]]]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is varied, what is run for it and what is shown of it.

    Attributes:
      title: of the page.
      config: path of the config that the points change.
      points: rows of the table.
      metrics: columns of the table.
      commands: of the pipeline and `PROBES`, in order.
      overrides: fields that all points change alike; the command line may change them again.
      seeds: each point is run with every one.
      source: the table of the paper that this follows, e.g. "Table 6".
      paper: name of a point -> label -> figure as the paper prints it.
      expectation: the order that the paper finds, in a sentence.
      check: compares our order with the paper's, once all points have all figures.
      noise: whether the page shows how each decoder bears noise on the latents.
      lines: label of the metric against which the others are drawn, in the place of pictures of
        every point; a point belongs to the series that its name begins with, up to the last "-".
    """

    title: str
    config: str
    points: Sequence[Point]
    metrics: Sequence[Metric]
    commands: Sequence[str]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1)
    source: str = ""
    paper: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    expectation: str = ""
    check: Check | None = None
    noise: bool = False
    lines: str = ""

    def __post_init__(self):
        object.__setattr__(self, "points", tuple(self.points))
        names = [point.name for point in self.points]
        odd = [name for name in names if not re.fullmatch(r"[\w.=+-]+", name)]
        if odd:
            raise ConfigError(
                f"points are named {odd}; directories are called so: use letters, digits and . _ "
                "= + - alone"
            )
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"points are named {names}; give at least one, each once")
        if strange := set(self.paper) - set(names):
            raise ConfigError(f"the paper's figures name no point: {sorted(strange)}")

    def runs(self) -> list[tuple[Point, int]]:
        """Every (point, seed); seed by seed, so that the table is soon complete with one."""
        return [(point, seed) for seed in self.seeds for point in self.points]


def run_of(workdir: Path, point: Point, seed: int) -> Run:
    return Run(workdir / f"{point.name}-seed{seed}")


def load_sweep(path: str | Path) -> Sweep:
    """The sweep of a file.

    Raises:
      UserError: if there is no such file, or no ``get_sweep`` in it.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(map(str, sorted(path.parent.glob("*.py")))) or "none"
        raise UserError(f"there is no sweep {path}; in that directory: {known}")
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise UserError(f"{path} has no function get_sweep, so it is no sweep")
    return module.get_sweep()


def set_field(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    """Sets ``a.b.c`` of a config.

    Raises:
      ConfigError: if the config has no such field, naming the nearest, or one of another type.
    """
    known = flatten(config)
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1)
        raise ConfigError(
            f"the config has no field {path}" + (f" (did you mean {near[0]}?)" if near else "")
        )
    *sections, leaf = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    try:
        section[leaf] = value
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from None


def configs_of(sweep: Sweep, changes: Sequence[str] = ()) -> dict[tuple[str, int], Any]:
    """(name of the point, seed) -> valid config of that run.

    Args:
      changes: ``--config.KEY=VALUE`` as on the command line.

    Raises:
      ConfigError: if a field is unknown, a config cannot be used, or a change would undo a point.
    """
    from gae_jax.__main__ import parse

    changed = {change.removeprefix("--config.").split("=")[0] for change in changes}
    varied = {"seed"}.union(*(point.overrides for point in sweep.points))
    if both := changed & varied:
        raise ConfigError(
            f"{', '.join(sorted(both))}: the runs of this sweep differ in it, so it cannot be "
            "changed for all of them; change the sweep's file (seeds: --seeds=0,1)"
        )
    _, base, _, _ = parse(["gae_jax", "demo", f"--config={sweep.config}", *changes])
    for path, value in sweep.overrides.items():
        if path not in changed:
            set_field(base, path, value)
    configs = {}
    for point, seed in sweep.runs():
        config = base.copy_and_resolve_references()
        try:
            for path, value in {**point.overrides, "seed": seed}.items():
                set_field(config, path, value)
            validate(config)
        except ConfigError as error:
            raise ConfigError(f"point {point.name}: {error}") from None
        configs[point.name, seed] = config
    return configs


class SweepSession(Session):
    """A session that takes finished stages from the other runs of its sweep."""

    def open(self, name: str, *, sections: tuple[str, ...], inputs: tuple[str, ...]) -> StageFolder:
        """As `Session.open`; first copies the stage if another run has it finished and equal."""
        here = self.run.stage(name).path
        if not here.exists():
            made_of = (
                self.made_of(sections),
                {stage: self.fingerprint_of(stage) for stage in inputs},
            )
            for there in sorted(self.run.path.parent.glob(f"*/{name}")):
                if _is_finished_and_equal(StageFolder(there), *made_of):
                    adopt(there, here)
                    logging.info("%s: the same as that of %s", name, there.parent.name)
                    break
        return super().open(name, sections=sections, inputs=inputs)


def _is_finished_and_equal(folder: StageFolder, sections: Mapping, inputs: Mapping) -> bool:
    done = folder.done
    if not done or done.get("imported"):  # what was imported may differ from its config
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


def probe(session: Session, command: str) -> None:
    """Linear probes of the tokenizer's latents or of the teacher's, flat and averaged.

    The paper's appendix I has both: of all positions side by side, and of their mean. Where images
    are so simple that all of their numbers always tell the class, the mean still shows which
    latents are semantic.
    """
    folder = session.open(command, sections=("seed", "data", "evaluate"), inputs=PROBES[command])
    if folder.done:
        return
    watch, config = Stopwatch(), session.config.evaluate
    loaded = [load(session.run.stage(stage), session.mesh) for stage in PROBES[command]]
    networks, arrays = zip(*loaded, strict=True)

    @jax.jit
    def encode(arrays, images):
        *_, model = models = [network(*a) for network, a in zip(networks, arrays, strict=True)]
        images = to_float(images)
        if command == "teacher-probe":
            return model.downsample(models[0].features(images, **model.takes))
        return rearrange(model.encode(images), "b h w d -> b (h w) d")

    def encoded(split: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = session.images(split, config.probe_images)
        found = []
        for first in range(0, len(images), config.batch_size):
            inside = np.minimum(np.arange(first, first + config.batch_size), len(images) - 1)
            batch = put_batch(images[inside], session.mesh)
            found.append(jax.device_get(encode(arrays, batch)))
        return np.concatenate(found)[: len(images)], labels

    train, test = encoded("train"), encoded("holdout")
    flat = linear_probe(train, test)
    mean = linear_probe(*((latents.mean(axis=1), labels) for latents, labels in (train, test)))
    write_json(folder.path / "result.json", {"flat": flat, "mean": mean})
    folder.finish(seconds=watch.seconds)
    logging.info(
        "%s: %.1f %%, of the mean %.1f %%, in %s",
        *(command, 100 * flat, 100 * mean, duration(watch.seconds)),
    )


def run_stages(sweep: Sweep, session: Session) -> None:
    """All commands of one run, in order."""
    from gae_jax.__main__ import run_command

    for command in sweep.commands:
        if command in PROBES:
            probe(session, command)
        else:
            run_command(command, session)


def state_of(sweep: Sweep, run: Run) -> str:
    """How far a run is: finished, failed, begun or new."""
    if (run.path / "error.txt").exists():
        return "failed"
    folders = [folder_of(command) for command in sweep.commands if command not in LEAVE_NO_STAGE]
    if all(run.stage(folder).done for folder in folders):
        return "finished"
    return "begun" if run.path.exists() else "new"


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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run came to: the values of the metrics that it has, by label."""

    point: Point
    seed: int
    run: Run
    state: str
    figures: Mapping[str, float]

    @property
    def error(self) -> str:
        path = self.run.path / "error.txt"
        return path.read_text() if path.exists() else ""


def collect(sweep: Sweep, workdir: Path) -> list[Outcome]:
    """What is there of every run, in the order of the points."""
    outcomes = []
    for point in sweep.points:
        for seed in sweep.seeds:
            run = run_of(workdir, point, seed)
            found = {metric.label: figure(run, metric) for metric in sweep.metrics}
            figures = {label: value for label, value in found.items() if value is not None}
            outcomes.append(Outcome(point, seed, run, state_of(sweep, run), figures))
    return outcomes


def figure(run: Run, metric: Metric) -> float | None:
    """The metric's value, or None if the run has none."""
    path = run.path / metric.folder / "result.json"
    result = read_json(path) if path.exists() else {}
    found = (_look_up(result, name) for name in metric.name.split("|"))
    return next((value for value in found if value is not None), None)


def _look_up(value: Any, name: str) -> Any:
    for part in name.split("."):
        if isinstance(value, list):
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = (value or {}).get(part)
    return value


def array_task() -> tuple[int, int]:
    """(task, tasks) of SLURM's job array that this process belongs to; (0, 1) outside of one."""
    first, step, tasks = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("MIN", 0), ("STEP", 1), ("COUNT", 1))
    )
    return (int(os.environ.get("SLURM_ARRAY_TASK_ID", first)) - first) // step, tasks


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, changes of the config) of a command line.

    Raises:
      UserError: for what is not understood.
    """
    parser = Parser("python launch/sweep.py --help")
    parser.add_argument("file")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds")
    parser.add_argument("--task", type=int)
    parser.add_argument("--tasks", type=int)
    options, changes = parser.parse_known_args(argv)
    for change in changes:
        if not re.fullmatch(r"--config\.[\w.]+=.*", change, re.DOTALL):
            parser.error(f"{change} is not understood; fields are changed as --config.KEY=VALUE")
    if (options.task is None) != (options.tasks is None):
        parser.error("give --task and --tasks together")
    if options.task is None:
        options.task, options.tasks = array_task()
    if not 0 <= options.task < options.tasks:
        parser.error(f"task {options.task} is none of {options.tasks}; tasks count from 0")
    if options.seeds is not None:
        if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
            parser.error(f"--seeds={options.seeds}: give whole numbers, e.g. --seeds=0,1,2")
        options.seeds = tuple(map(int, options.seeds.split(",")))
    options.workdir = options.workdir or Path("runs/sweeps") / Path(options.file).stem
    return options, changes


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


def print_runs(sweep: Sweep, workdir: Path, task: int, tasks: int) -> None:
    """One line per run: number, directory, how far it is, what it changes."""
    for number, (point, seed) in list(enumerate(sweep.runs(), 1))[task::tasks]:
        run = run_of(workdir, point, seed)
        changed = ", ".join(f"{path}={value}" for path, value in point.overrides.items())
        print(f"{number:>3}  {run.path}  {state_of(sweep, run)}  {changed}")


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if not argv or {"--help", "-h", "help"} & set(argv):
        print(USAGE)
        return 0
    from absl import flags

    from gae_jax.__main__ import PREEMPTED, quiet_libraries
    from gae_jax.report.sweep import write_table

    quiet_libraries()
    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    failed = 0
    try:
        options, changes = parse(argv)
        sweep = load_sweep(options.file)
        if options.seeds:
            sweep = dataclasses.replace(sweep, seeds=options.seeds)
        if options.list:
            print_runs(sweep, options.workdir, options.task, options.tasks)
            return 0
        if not options.table:
            configs = configs_of(sweep, changes)
            which = {"task": options.task, "tasks": options.tasks}
            with compiled_once():
                failed = run_all(sweep, options.workdir, configs, **which)
        if options.table or options.tasks == 1:
            command = " ".join(["python launch/sweep.py", *argv])
            print(write_table(sweep, options.workdir, collect(sweep, options.workdir), command))
    except UserError as error:
        print(f"error: {textwrap.indent(str(error), '  ').lstrip()}", file=sys.stderr)
        return 1
    except Preempted as notice:
        print(notice, file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    if failed:
        print(f"{failed} runs failed; what happened is in their error.txt", file=sys.stderr)
    return 1 if failed else 0
