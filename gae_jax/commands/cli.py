"""The command line: ``python -m gae_jax COMMAND --config=configs/demo.py --workdir=runs/demo``."""

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

CRASHED = 70  # exit status of one of several processes after a traceback; launch/program.py's
INTERRUPTED = 130  # exit status after Ctrl-C, which is SIGINT; 128 + 2 as shells have it

USAGE = """\
gae_jax: train, sample and evaluate semantically aligned image tokenizers.

usage: python -m gae_jax COMMAND --config=FILE [--workdir=DIR] [--fresh] [--config.KEY=VALUE ...]
       python -m gae_jax COMMAND RUN [--fresh] [--config.KEY=VALUE ...]
       python -m gae_jax COMMAND RUN [--amend] [--from-step=N] [--config.KEY=VALUE ...]

commands, in the order of the pipeline:
{commands}

options:
  RUN                   the directory of an existing run, whose recorded config is used
  --config=FILE         a config, e.g. configs/demo.py; its fields are documented in
                        gae_jax/config/
  --config.KEY=VALUE    change one field, e.g. --config.tokenizer.losses.align=0
  --config.precision=P  how networks are computed: exact (float32), fast (bfloat16), or auto, which
                        is fast on GPUs and TPUs where training was shown to learn alike;
                        --config.precision.NETWORK.FIELD=VALUE overrides it for one network, such as
                        --config.precision.diffusion.dtype=float32
  --workdir=DIR         the run's directory (default: runs/NAME, NAME as in configs/NAME.py, and
                        runs/NAME-ARGUMENT for configs/NAME.py:ARGUMENT)
  --fresh               delete what the stage left in the run and start it over
  --amend               resume training with changed fields or images, from the last checkpoint,
                        or beyond the end with more steps; the change is recorded in the stage and
                        in all that is built on it
  --from-step=N         resume from an earlier checkpoint; later ones are removed
  --distributed         one of several processes that run the same command: the hosts of a TPU pod,
                        the tasks of a Slurm job, or those that JAX_COORDINATOR_ADDRESS,
                        JAX_NUM_PROCESSES and JAX_PROCESS_ID name; they share the run directory
  --topology=T          for plan: a target topology such as v5p-64 or v5p:4x4x4; no hardware needed
  --heartbeat_seconds=N silence after which a process counts as lost and the others stop (100)
  --help                this text; behind a command, also the fields that it reads

commands with their own options (see COMMAND --help):
{own}

A finished stage is skipped, an interrupted one resumes from its last checkpoint. On Ctrl-C and
SIGTERM training saves the current step and exits with status 130 or 143; a second Ctrl-C exits at
once.

examples:
  python -m gae_jax demo --config=configs/demo.py
  python -m gae_jax tokenizer --config=configs/demo.py --workdir=runs/mine --fresh
  python -m gae_jax demo --config=configs/folder.py --workdir=runs/birds \\
      --config.data.root=/data/birds
  python -m gae_jax import-torch --config=configs/gae_d32.py --workdir=runs/released \\
      --config.import_torch.tokenizer=gae_d32.ckpt
  python -m gae_jax import-torch --config=configs/fae.py:siglip2 --workdir=runs/fae \\
      --config.import_torch.backbone=siglip2-giant-opt-patch16-256/  # folder with index and parts
  python -m gae_jax export-torch runs/demo
  python -m gae_jax sample runs/demo --class=7 --count=16 --guidance=3.3
"""

# Command -> (module with a function run(session), what it does). Those of the pipeline, in order:
PIPELINE: dict[str, tuple[str, str]] = {
    "backbone": ("stages.backbone", "train a small ViT instead of DINOv2"),
    "teacher": ("stages.teacher", "train the semantic downsampler by distilling the backbone"),
    "tokenizer": ("stages.tokenizer", "train the autoencoder"),
    "latents": ("stages.latents", "encode the training set, with exact statistics"),
    "diffusion": ("stages.diffusion", "train LightningDiT on the latents"),
    "sample": ("stages.sample", "draw images of every class, unguided and guided"),
    "evaluate": ("stages.evaluate", "measure reconstructions, latents and samples"),
    "report": ("stages.report", "write report.html and result.json"),
}
ANALYSES: dict[str, tuple[str, str]] = {
    "reference": ("stages.reference", "statistics of the data for FID and related metrics"),
    "likelihood": (
        "stages.likelihood",
        "log-likelihood of held-out images' latents, by the flow's ODE",
    ),
    "doctor": ("commands.doctor", "try on every host what a long run needs, before it starts"),
    "bench": ("commands.bench", "time training, sampling and metrics on random weights and data"),
    "plan": (
        "commands.plan",
        "memory, communication and hours of every stage on a target topology",
    ),
}
WEIGHTS: dict[str, tuple[str, str]] = {
    "import-torch": ("commands.import_torch", "make stages of a run from released checkpoints"),
    "export-torch": (
        "commands.export_torch",
        "write the run's weights for the released PyTorch code",
    ),
}
TRAINING = frozenset({"backbone", "teacher", "tokenizer", "diffusion"})
# `plan` does not touch this machine's devices, `doctor` tells all that is wrong at once.
UNCHECKED = frozenset({"plan", "doctor"})
COMMANDS = PIPELINE | ANALYSES | WEIGHTS
# Commands as earlier versions named them.
ALIASES = {"teacher-backbone": "backbone", "make-reference": "reference"}
# Command -> (module with USAGE and a function main(arguments), usage in short, what it does).
OWN: dict[str, tuple[str, str, str]] = {
    "sample": (
        "commands.draw",
        "sample RUN",
        "a few images as PNG files, from a run directory alone",
    ),
    "evaluate-samples": (
        *("commands.evaluate_samples", "evaluate-samples --samples=X --ref=Y"),
        "FID and related metrics of any set of images",
    ),
    "prepare-data": (
        *("commands.prepare_data", "prepare-data --source=DIR --out=DIR"),
        "ImageNet or class folders as ArrayRecord shards",
    ),
    "compare": (
        "commands.compare",
        "compare A.json B.json",
        "how two results differ, protocol first",
    ),
}


# What an interrupted command leaves; others start over when they are run again.
_TRAINS = "the same command resumes from the last checkpoint, or from the start if there is none"
LEAVES = {
    **dict.fromkeys(("backbone", "teacher", "tokenizer", "diffusion"), _TRAINS),
    "latents": "whole shards stay, and the same command resumes",
    "sample": "whole batches stay, and the same command resumes",
    "sample RUN": "the images that are written stay; the same command draws all of them again",
    "demo": "finished stages stay, and the same command resumes",
    "prepare-data": "whole shards stay, and the same command resumes",
}


def interrupted(argv: list[str]) -> str:
    """What is said after Ctrl-C: what there is, and what the same command would do."""
    command = argv[1] if len(argv) > 1 else "the command"
    from_run = command == "sample" and len(argv) > 2 and not argv[2].startswith("-")
    leaves = LEAVES.get(
        "sample RUN" if from_run else command, f"{command} starts over when it is run again"
    )
    return f"stopped: {leaves}{_without_fresh(argv)}"


def _without_fresh(argv: list[str]) -> str:
    fresh = {"--fresh", "-fresh", "--fresh=true"} & {flag.lower() for flag in argv}
    return " (leave out --fresh then: it would start over)" if fresh else _without_from_step(argv)


def _without_from_step(argv: list[str]) -> str:
    given = any(flag.lstrip("-").startswith("from-step") for flag in argv)
    return " (leave out --from-step then: it would go back again)" if given else ""


def usage() -> str:
    def lines_of(commands):
        return [f"  {name:<20}  {what}" for name, (_, what) in commands.items()]

    lines = [
        *lines_of(PIPELINE),
        f"  {'demo':<20}  all of the above, one after the other",
        "",
        "beside the pipeline:",
        *lines_of(ANALYSES),
        "",
        "weights from and for PyTorch:",
        *lines_of(WEIGHTS),
    ]
    own = [f"  {short:<38}  {what}" for _, short, what in OWN.values()]
    return USAGE.format(commands="\n".join(lines), own="\n".join(own))


def with_current_names(argv: list[str]) -> list[str]:
    """Replace the command of earlier versions by its name now, and say so."""
    if len(argv) < 2 or argv[1] not in ALIASES:
        return argv
    name = ALIASES[argv[1]]
    print(f"{argv[1]} is now called {name}", file=sys.stderr)
    return [argv[0], name, *argv[2:]]


def run_command(command: str, session) -> None:
    """Runs one command, or all of them for ``demo``."""
    from gae_jax.runtime import distributed, lock
    from gae_jax.runtime.errors import UserError

    names = tuple(PIPELINE) if command == "demo" else (command,)
    if distributed.count() > 1 and command in WEIGHTS:
        raise UserError(f"{command} works in one process; run it without --distributed")
    modules = [importlib.import_module(f"gae_jax.{COMMANDS[name][0]}") for name in names]

    def check():  # what is missing is told before anything is computed
        session.check(tuple(name for name in names if name not in UNCHECKED))
        for module in modules:
            if hasattr(module, "check"):
                module.check(session)

    distributed.all_well(check)
    try:
        for name, module in zip(names, modules, strict=True):
            run: Callable = module.run
            if name == "report":  # nothing but files
                distributed.agree(lambda run=run: run(session) and None)
            else:
                run(session)
    finally:
        lock.release_all()


def parse(argv: list[str]):
    """(command, config, workdir, further arguments of a Session) of a command line.

    Raises:
      UserError: for an unknown command, flag or config key, naming the nearest known one.
    """
    from absl import flags
    from ml_collections import config_flags

    from gae_jax.config import at_home, expand_home
    from gae_jax.config.tools import without_overrides
    from gae_jax.runtime import distributed
    from gae_jax.runtime.errors import UserError

    known = [*COMMANDS, "demo"]
    arguments = _naming_the_run(argv)
    argv = [_as_config_flag(word) for word in with_config_of_run(argv)]
    argv, overrides = without_overrides(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_bool("fresh", False, "", flag_values=values)
    flags.DEFINE_bool("amend", False, "", flag_values=values)
    flags.DEFINE_integer("from-step", None, "", lower_bound=0, flag_values=values)
    flags.DEFINE_string("topology", None, "", flag_values=values)
    flags.DEFINE_bool("distributed", False, "", flag_values=values)
    flags.DEFINE_integer("heartbeat_seconds", 100, "", lower_bound=5, flag_values=values)
    saved, sys.argv = sys.argv, argv  # config_flags reads its overrides from there
    try:
        positional = values(argv)[1:]
        config = values.config
        if config is not None:
            config.to_dict()  # a file that cannot be read is reported on first use only
    except UserError:
        raise
    except Exception as error:  # a config file is code, and raises whatever it does
        _blame_config_file(argv, error)
        if not isinstance(error, flags.Error | AttributeError | LookupError | TypeError | ValueError
                          | OSError):  # fmt: skip
            raise
        from gae_jax.config import default_config
        from gae_jax.config.tools import unknown_field

        what = error.args[0] if isinstance(error, KeyError) else error
        what = unknown_field(argv, default_config()) or what
        raise UserError(f"{what}\nsee: python -m gae_jax --help") from None
    finally:
        sys.argv = saved
    if len(positional) != 1 or positional[0] not in known:
        what = " ".join(positional) or "none"
        raise UserError(f"give one command, got {what}; commands: {', '.join(known)}")
    if config is None:
        given = values["config"].config_filename if values["config"].present else ""
        raise UserError(
            f"{given}: its get_config returns no config"
            if given
            else "give a config, e.g. --config=configs/demo.py"
        )
    if values.topology is not None:
        if positional[0] != "plan":
            raise UserError(f"--topology is for plan, not for {positional[0]}")
        config.plan.topology = values.topology
    from_step = values["from-step"].value
    if overrides:
        config.precision.override = (*config.precision.override, *overrides)
    expand_home(config)
    check_going_on(positional[0], values.fresh, values.amend, from_step)
    file = values["config"].config_filename
    path, *argument = file.split(":", 1)  # configs/NAME.py:ARGUMENT
    name = "-".join([os.path.splitext(os.path.basename(path))[0], *argument]).replace(":", "-")
    workdir = at_home(values.workdir or os.path.join("runs", name))
    if values.distributed:
        distributed.start(heartbeat_seconds=values.heartbeat_seconds)
    more = {"fresh": values.fresh, "amend": values.amend, "from_step": from_step}
    return positional[0], config, workdir, {**more, "config_file": file, "arguments": arguments}


def check_going_on(command: str, fresh: bool, amend: bool, from_step: int | None) -> None:
    """Raise UserError where --amend or --from-step clash or do not apply to the command."""
    from gae_jax.runtime.errors import UserError

    if fresh and (amend or from_step is not None):
        flag = "--amend" if amend else "--from-step"
        raise UserError(f"--fresh starts a stage over, {flag} resumes it; give one of the two")
    if from_step is not None and command not in TRAINING:
        raise UserError(
            f"--from-step is for a stage that trains, not for {command}; give it to one of "
            f"{', '.join(sorted(TRAINING))}"
        )


def _blame_config_file(argv: list[str], error: Exception) -> None:
    """Raises a ConfigError if an error comes from the code of the config file."""
    from gae_jax.config.tools import explaining, frames_in

    named = [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    path = (named or [""])[-1].split(":")[0]
    while path and error is not None:  # flags puts the text of a traceback around it
        if isinstance(error, SyntaxError) or frames_in(path, error):
            with explaining(path):
                raise error
        error = error.__context__


def with_config_of_run(argv: list[str]) -> list[str]:
    """A command line with RUN behind the command, as one with --config and --workdir."""
    run = os.path.expanduser(argv[2]) if len(argv) > 2 else "-"
    if not run:
        from gae_jax.runtime.errors import UserError

        raise UserError(f"{argv[1]} '': the name of the run is empty; give its directory")
    if argv[1] not in (*COMMANDS, "demo") or run.startswith("-"):
        return argv
    file = os.path.join(os.path.dirname(os.path.dirname(__file__)), "run", "recorded_config.py")
    return [*argv[:2], f"--config={file}:{run}", f"--workdir={run}", *argv[3:]]


def _naming_the_run(argv: list[str]) -> str:
    """The arguments with which other commands work on the same config and run, for `Run`.

    Flags that say how this command treats a finished or interrupted stage are left out.
    """
    words = iter(argv[2:])
    kept = []
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if name == "from-step" and not equals:
            next(words, "")
        elif name not in ("fresh", "nofresh", "amend", "from-step", "topology"):
            kept.append(word)
    return shlex.join(kept) if kept and kept[0].startswith("-") else ""


def _as_config_flag(word: str) -> str:
    """A word of the command line, as `config_flags` reads it.

    ``~`` of --config=FILE is expanded; --config.precision=fast names its preset.
    """
    flag, equals, value = word.partition("=")
    if flag == "--config.precision":
        return f"--config.precision.preset{equals}{value}"
    return f"{flag}={os.path.expanduser(value)}" if flag == "--config" else word


def own_command(argv: list[str]):
    """The module of a command with options of its own, or None."""
    from_run = len(argv) > 2 and not argv[2].startswith("-")
    # "sample" is a stage of the pipeline as well: with --fresh, or --nofresh to resume it
    from_run = from_run and not {"--fresh", "--nofresh"} & set(argv)
    if argv[1] not in OWN or (argv[1] in COMMANDS and not from_run and "--help" not in argv):
        return None
    return importlib.import_module(f"gae_jax.{OWN[argv[1]][0]}")


def quiet_libraries() -> None:
    """Leaves the log to us; what fails is raised all the same."""
    for noisy in ("jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # orbax logs a traceback in each thread that a full disk stops
    for noisy in ("absl", "orbax"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # What fails in a library's thread is raised again where its result is awaited.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    threading.excepthook = lambda failed: logging.debug("in a thread: %s", failed.exc_value)


def leave(status: int) -> int:
    """The exit status of a run that did not finish.

    One of several processes does not return: on its way out JAX would wait for the others, which
    may wait for it. After a crash it ends at once, else together with them.
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
    """Runs the command line; returns the exit status."""
    argv = with_current_names(argv)
    try:
        return _main(argv)
    except KeyboardInterrupt:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one does not wait for threads
        print(f"\n{interrupted(argv)}", file=sys.stderr)
        return leave(INTERRUPTED)


def _main(argv: list[str]) -> int:
    wants_help = bool({"--help", "-h", "help"} & set(argv[1:]))
    # before the imports, some of which set up logging in a way of their own
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

    def kept() -> bool:
        return any(folder.holds_results for folder in folders)

    try:
        if own:
            flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
            return own.main(argv[2:])
        command, config, workdir, more = parse(argv)
        if not distributed.is_first():  # all would say the same
            logging.getLogger().setLevel(logging.WARNING)
        from gae_jax.run.recorded_config import validate_config
        from gae_jax.run.session import Session

        # `plan` is for other devices than this machine's, and settles its precision by them
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
        # whoever adds what the error advises to the same command must not lose what there is
        again = _without_fresh(argv) if kept() else _without_from_step(argv)
        if again:
            print(f"to keep what the run has{again}", file=sys.stderr)
        return leave(1)
    except Preempted as notice:
        print(f"{notice}{_without_fresh(argv)}", file=sys.stderr)
        return leave(notice.status)
    except Exception as error:  # what no stage foresaw; none of several processes may just end
        text = refusal(error) if isinstance(error, OSError) else None
        if text is not None:
            print(f"error: {text}", file=sys.stderr)
            return leave(1)
        # a crash: the other processes would wait for this one
        if distributed.count() == 1:
            raise
        traceback.print_exc()
        return leave(CRASHED)
    logging.info("%s: finished in %.0f s", command, time.monotonic() - start)
    return 0
