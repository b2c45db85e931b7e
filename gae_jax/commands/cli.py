"""The command line: ``python -m gae_jax COMMAND --config=configs/demo.py --workdir=runs/demo``."""

import contextlib
import functools
import importlib
import logging
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable

from gae_jax.commands.parsing import parse, with_current_names, without_flags
from gae_jax.commands.table import (
    COMMANDS,
    KEPT,
    OWN,
    PIPELINE,
    TRAINING,
    UNCHECKED,
    WEIGHTS,
    usage,
)
from gae_jax.runtime.signals import last_words

CRASHED = 70  # exit status of one of several processes after a traceback; launch/program.py's
INTERRUPTED = 130  # exit status after Ctrl-C, which is SIGINT; 128 + 2 as shells have it


def run_command(command: str, session) -> None:
    """Run one command, or the whole pipeline for ``demo``."""
    from gae_jax.runtime import distributed, lock
    from gae_jax.runtime.errors import UserError

    names = tuple(PIPELINE) if command == "demo" else (command,)
    if distributed.count() > 1 and command in WEIGHTS:
        raise UserError(f"{command} works in one process; run it without --distributed")
    modules = [importlib.import_module(f"gae_jax.{COMMANDS[name][0]}") for name in names]

    def check():  # whatever is missing is reported before anything is computed
        session.check(tuple(name for name in names if name not in UNCHECKED))
        for module in modules:
            if hasattr(module, "check"):
                module.check(session)

    distributed.all_well(check)
    try:
        for name, module in zip(names, modules, strict=True):
            run: Callable = module.run
            if name == "report":  # nothing but files
                distributed.agree(functools.partial(run, session))
            else:
                run(session)
    finally:
        lock.release_all()


def own_command(argv: list[str]):
    """Import the module of a command with its own options; None for other commands."""
    from_run = len(argv) > 2 and not argv[2].startswith("-")
    # "sample" is a stage of the pipeline as well: with --fresh, or --nofresh to resume it
    from_run = from_run and not {"--fresh", "--nofresh"} & set(argv)
    if argv[1] not in OWN or (argv[1] in COMMANDS and not from_run and "--help" not in argv):
        return None
    return importlib.import_module(f"gae_jax.{OWN[argv[1]][0]}")


def quiet_libraries() -> None:
    """Silence the logs of libraries; their errors are raised all the same."""
    for noisy in ("jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # orbax logs a traceback in each thread that a full disk stops
    for noisy in ("absl", "orbax"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # What fails in a library's thread is raised again where its result is awaited.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = lambda failed: logging.debug("in a thread: %s", failed.exc_value)


def leave(status: int) -> int:
    """Return the exit status of a command that did not finish.

    One of several processes exits here instead: at a normal exit JAX would wait for the others,
    which may wait for it. After a crash it exits at once, else together with them.
    """
    from gae_jax.runtime import distributed

    if distributed.count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if status != CRASHED:
            distributed.leave_together()
        os._exit(status)
    return status


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    argv = with_current_names(argv)
    # JAX itself catches SIGTERM in several processes
    several = any(word.lstrip("-").startswith("distributed") for word in argv)
    try:
        with contextlib.nullcontext() if several else last_words(interrupted(argv)):
            return _main(argv)
    except KeyboardInterrupt:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one does not wait for threads
        print(f"\n{interrupted(argv)}", file=sys.stderr)
        return leave(INTERRUPTED)


def interrupted(argv: list[str]) -> str:
    """Say what an interrupted command keeps and how it is run again."""
    command = "".join(argv[1:2])
    from_run = command == "sample" and len(argv) > 2 and not argv[2].startswith("-")
    kept = KEPT.get("sample RUN" if from_run else command, f"{command} starts over")
    again = shlex.join(["python", "-m", "gae_jax", *without_flags(argv[1:], "fresh", "from-step")])
    return f"stopped: {kept}. Run again: {again}"


def discarding(argv: list[str]) -> str:
    """Return the flag of a command line that discards results, or ""."""
    flags = [word.lstrip("-").partition("=")[0] for word in argv if word.startswith("-")]
    return next((f"--{flag}" for flag in ("fresh", "from-step") if flag in flags), "")


def _main(argv: list[str]) -> int:
    wants_help = bool({"--help", "-h", "help"} & set(argv[1:]))
    # before the imports, some of which set up logging themselves
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    own = own_command(argv) if len(argv) > 1 else None
    if len(argv) < 2 or wants_help:
        print(own.USAGE if own else usage())
        if not own and len(argv) > 1:
            from gae_jax.commands.field_help import field_help

            print(field_help(argv[1]))
        return 0
    quiet_libraries()
    from absl import flags

    from gae_jax.runtime import distributed
    from gae_jax.runtime.errors import Preempted, UserError, refusal

    start, folders = time.monotonic(), []
    try:
        if own:
            flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
            return own.main(argv[2:])
        command, config, workdir, more = parse(argv)
        if not distributed.is_first():  # all would log the same
            logging.getLogger().setLevel(logging.WARNING)
        from gae_jax.run.recorded_config import validate_config
        from gae_jax.run.session import Session

        # `plan` is for other devices than this machine's, and chooses its precision by them
        where = {"platform": "cpu"} if command == "plan" else {}
        session = Session.start(config, workdir, **where, **more)
        if command in TRAINING:  # first: sections that an imported run does not record may clash
            session.require_trainable(command)
        validate_config(command, config, more["config_file"])
        flags.FLAGS.mark_as_parsed()
        names = PIPELINE if command == "demo" else (command,)
        folders = [session.run.stage(name) for name in names]
        run_command(command, session)
    except UserError as error:
        print(f"error: {textwrap.indent(str(error), '  ').lstrip()}", file=sys.stderr)
        # whoever adds to the same command what the error advises must not lose results
        flag = discarding(argv)
        if flag == "--from-step" or (flag and any(folder.holds_results for folder in folders)):
            print(f"to keep the run's results, leave out {flag}", file=sys.stderr)
        return leave(1)
    except Preempted as notice:
        flag = discarding(argv)
        print(f"{notice}{f', without {flag}' if flag else ''}", file=sys.stderr)
        return leave(notice.status)
    except Exception as error:  # that no stage foresaw
        text = refusal(error) if isinstance(error, OSError) else None
        if text is not None:
            print(f"error: {text}", file=sys.stderr)
            return leave(1)
        # a crash, after which other processes would wait for this one
        if distributed.count() == 1:
            raise
        traceback.print_exc()
        return leave(CRASHED)
    logging.info("%s: finished in %.0f s", command, time.monotonic() - start)
    return 0
