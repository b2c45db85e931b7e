"""The command line of ``launch/sweep.py``."""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import textwrap
from pathlib import Path

from gae_jax.commands.arguments import Parser
from gae_jax.run.run import Run
from gae_jax.runtime import ranges
from gae_jax.runtime.errors import Preempted, UserError, number_of, refusal
from gae_jax.runtime.signals import last_words
from gae_jax.sweep.definition import Sweep, configs_of, load_sweep
from gae_jax.sweep.finished_run import field_check, on_run
from gae_jax.sweep.outcomes import collect, run_of, state_of
from gae_jax.sweep.running import TRAINED, compiled_once, run_all

USAGE = """\
Run a sweep: every point with every seed, one after the other, and one table of all runs.

usage: python launch/sweep.py FILE [--run=DIR] [--workdir=DIR] [--list] [--table] [--seeds=S,S]
                              [--points=NAME,NAME] [--task=I --tasks=N]
                              [--amend] [--from-step=STAGE:N] [--config.KEY=VALUE ...]

  FILE                  a sweep, e.g. configs/sweeps/lambda_sp.py
  --run=DIR             sweep over sampling and evaluation of a finished run: its config replaces
                        that of the sweep, its trained stages are linked and never retrained.
                        The seed is the run's; --seeds=S,S draws other noise
  --config.KEY=VALUE    change one field of every point, e.g. a shorter training; refused for
                        fields in which the points differ
  --workdir=DIR         where the runs and the table go (default: runs/sweeps/NAME for
                        configs/sweeps/NAME.py, with --run=DIR runs/sweeps/NAME-DIR)
  --seeds=S,S           seeds instead of those of the file
  --points=NAME,NAME    only these points, which --config.KEY=VALUE then changes alone
  --amend               training stages resume from their last checkpoint although fields changed;
                        a run keeps the changes, and later calls need not repeat them
  --from-step=STAGE:N   resume that stage from an earlier checkpoint that its run still has, e.g.
                        --from-step=tokenizer:5000
  --list                only print the runs and the state of each
  --table               only write the table, of the runs as they are
  --task=I --tasks=N    only every N-th run, starting with I = 0, for the tasks of a job array; by
                        default from SLURM's array variables. Then run --table once.
                        Tasks do not wait for each other: a stage that two tasks begin at the same
                        time is computed twice
  --help                this text

Run the same command again to resume: finished runs are skipped, and a stage that another run of
the sweep has finished with the same config and inputs is linked from there. A run that fails
leaves error.txt and the others continue; the exit status is then 1.

WORKDIR/table.html has the table, charts and pictures, WORKDIR/table.csv also every single run,
WORKDIR/table.md is for GitHub, WORKDIR/pictures/POINT.png shows one point.

examples:
  python launch/sweep.py configs/sweeps/lambda_sp.py
  python launch/sweep.py configs/sweeps/guidance.py --run=runs/demo
  python launch/sweep.py configs/sweeps/lambda_sp.py --workdir=runs/sweeps/long \\
      --config.tokenizer.train.steps=3000
  sbatch --array=0-7 --wrap="python launch/sweep.py configs/sweeps/lambda_sp.py"
"""


def array_task() -> tuple[int, int]:
    """Read (task, tasks) of SLURM's job array from its variables; (0, 1) outside of one.

    Raises:
      UserError: if the variables are not such numbers.
    """

    def number(name: str, default: int, least: int) -> int:
        text = os.environ.get(f"SLURM_ARRAY_TASK_{name}", str(default))
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
            raise UserError(
                f"SLURM_ARRAY_TASK_{name} is {text!r}; it must be an integer, at least "
                f"{least}: unset it, or give --task and --tasks"
            )
        return int(text)

    first, step, tasks = number("MIN", 0, 0), number("STEP", 1, 1), number("COUNT", 1, 1)
    return (number("ID", first, 0) - first) // step, tasks


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line into (options, changes of the config as ``--config.KEY=VALUE``).

    Raises:
      UserError: for arguments that are not understood or do not fit together.
    """
    parser = Parser("python launch/sweep.py --help")
    parser.add_argument("file")
    parser.add_argument("--run")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds")
    parser.add_argument("--points", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--amend", action="store_true")
    parser.add_argument("--from-step", type=_stage_and_step, dest="from_step")
    parser.add_number("--task", ranges.COUNT_OR_NONE)
    parser.add_number("--tasks", ranges.COUNT)
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
        if not re.fullmatch(r"\d{1,10}(,\d{1,10})*", options.seeds):
            parser.error(f"--seeds={options.seeds}: give integers, e.g. --seeds=0,1,2")
        options.seeds = tuple(map(int, options.seeds.split(",")))
        for seed in options.seeds:
            if problem := ranges.SEED.problem(seed):
                parser.error(f"--seeds has {seed}; it must be {problem}")
    name = Path(options.file).stem
    if options.run is not None:
        if not options.run:
            parser.error("--run is empty; give the directory of a finished run")
        if options.amend or options.from_step:
            parser.error("--amend and --from-step are for training; --run never trains")
        options.run = Path(options.run)
        name += f"-{options.run.resolve().name}"
    options.workdir = options.workdir or Path("runs/sweeps") / name
    return options, changes


def _stage_and_step(text: str) -> tuple[str, int]:
    stage, _, step = text.partition(":")
    if stage not in TRAINED or not re.fullmatch(r"\d{1,15}", step):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give STAGE:N with a stage that trains ({', '.join(TRAINED)}) and the step "
            "of a checkpoint, e.g. tokenizer:5000"
        )
    return stage, int(step)


def only(sweep: Sweep, names: tuple[str, ...]) -> Sweep:
    """Select some points of a sweep.

    Raises:
      UserError: for a name that is not one of its points.
    """
    known = {point.name: point for point in sweep.points}
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise UserError(
            f"--points has {unknown[0]!r}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; the points are {', '.join(known)}"
        )
    paper = {name: figures for name, figures in sweep.paper.items() if name in names}
    chosen = tuple(point for point in sweep.points if point.name in names)
    return dataclasses.replace(sweep, points=chosen, paper=paper, check=None)


def print_runs(sweep: Sweep, workdir: Path, task: int, tasks: int) -> None:
    """Print one line per run: number, directory, state, changed fields."""
    for number, (point, seed) in list(enumerate(sweep.runs(), 1))[task::tasks]:
        run = run_of(workdir, point, seed)
        changed = ", ".join(f"{path}={value}" for path, value in point.overrides.items())
        print(f"{number:>3}  {run.path}  {state_of(sweep, run)}  {changed}")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit status."""
    if not argv or {"--help", "-h", "help"} & set(argv):
        print(USAGE)
        return 0
    from absl import flags

    from gae_jax.commands.cli import INTERRUPTED, quiet_libraries
    from gae_jax.sweep.table import write_table

    quiet_libraries()
    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    failed, stopped = 0, "stopped: finished runs and stages are kept; the same command resumes"
    try:
        options, changes = parse(argv)
        sweep = load_sweep(options.file)
        if options.run:
            sweep = on_run(sweep, options.run)
        if options.seeds:
            sweep = dataclasses.replace(sweep, seeds=options.seeds)
        all_points = sweep
        if options.points:
            sweep = only(sweep, options.points)
        if options.list:
            print_runs(sweep, options.workdir, options.task, options.tasks)
            return 0
        if not options.table:
            check = field_check(options.run) if options.run else None
            configs = configs_of(sweep, changes, check)
            with compiled_once(), last_words(stopped):
                failed = run_all(
                    sweep,
                    options.workdir,
                    configs,
                    task=options.task,
                    tasks=options.tasks,
                    amend=options.amend,
                    from_step=options.from_step,
                    file=options.file,
                    source=Run(options.run) if options.run else None,
                )
        if options.table or options.tasks == 1:
            command = " ".join(["python launch/sweep.py", *argv])
            outcomes = collect(all_points, options.workdir)
            print(write_table(all_points, options.workdir, outcomes, command))
    except UserError as error:
        print(f"error: {textwrap.indent(str(error), '  ').lstrip()}", file=sys.stderr)
        return 1
    except Preempted as notice:
        print(notice, file=sys.stderr)
        return notice.status
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if (text := refusal(error)) is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 1
    if failed:
        print(
            f"{number_of(failed, 'run')} failed; the reasons are in error.txt of each",
            file=sys.stderr,
        )
    return 1 if failed else 0
