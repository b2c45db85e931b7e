"""From a command line to a command, its config and its run directory."""

import os
import shlex
import sys
from collections.abc import Iterable
from typing import Any

from gae_jax.commands.table import ALIASES, COMMANDS, TRAINING

KNOWN = (*COMMANDS, "demo")


def parse(argv: list[str]):
    """Parse a command line: (command, config, workdir, further arguments of `Session.start`).

    Raises:
      UserError: for an unknown command, flag or config key, naming the nearest known one.
    """
    from absl import flags
    from ml_collections import config_flags

    from gae_jax.config import at_home, expand_home
    from gae_jax.config.tools import without_overrides
    from gae_jax.runtime import distributed
    from gae_jax.runtime.errors import UserError

    typed = argv[1:]
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
    if len(positional) != 1 or positional[0] not in KNOWN:
        what = " ".join(positional) or "none"
        raise UserError(f"give one command, got {what}; commands: {', '.join(KNOWN)}")
    command = positional[0]
    config_flag: Any = values["config"]  # of ml_collections, with the name of the file
    if config is None:
        if config_flag.present:
            file = config_flag.config_filename
            raise UserError(f"{file}: its get_config returns no config")
        raise UserError("give a config, e.g. --config=configs/demo.py")
    if values.topology is not None:
        if command != "plan":
            raise UserError(f"--topology is for plan, not for {command}")
        config.plan.topology = values.topology
    from_step = values["from-step"].value
    if overrides:
        config.precision.override = (*config.precision.override, *overrides)
    expand_home(config)
    _check_resume_flags(command, values.fresh, values.amend, from_step)
    file = config_flag.config_filename
    path, *argument = file.split(":", 1)  # configs/NAME.py:ARGUMENT
    name = "-".join([os.path.splitext(os.path.basename(path))[0], *argument]).replace(":", "-")
    workdir = at_home(values.workdir or os.path.join("runs", name))
    if values.distributed:
        distributed.start(heartbeat_seconds=values.heartbeat_seconds)
    more = dict(fresh=values.fresh, amend=values.amend, from_step=from_step, config_file=file)
    # with which other commands work on the same config and run
    words = without_flags(typed, "fresh", "nofresh", "amend", "from-step", "topology")
    words.remove(command)
    arguments = shlex.join(words) if words and words[0].startswith("-") else ""
    return command, config, workdir, {**more, "arguments": arguments}


def _check_resume_flags(command: str, fresh: bool, amend: bool, from_step: int | None) -> None:
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


def _blame_config_file(argv: list[str], error: BaseException | None) -> None:
    """Raise a ConfigError if an error comes from the code of the config file."""
    from gae_jax.config.tools import explaining, frames_in

    named = [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    path = (named or [""])[-1].split(":")[0]
    while path and error is not None:  # absl's flags wrap it in an error with its traceback
        if isinstance(error, SyntaxError) or frames_in(path, error):
            with explaining(path):
                raise error
        error = error.__context__


def with_config_of_run(argv: list[str]) -> list[str]:
    """Replace RUN behind the command by --config and --workdir."""
    run = os.path.expanduser(argv[2]) if len(argv) > 2 else "-"
    if not run:
        from gae_jax.runtime.errors import UserError

        raise UserError(f"{argv[1]} '': the name of the run is empty; give its directory")
    if argv[1] not in KNOWN or run.startswith("-"):
        return argv
    file = os.path.join(os.path.dirname(os.path.dirname(__file__)), "run", "recorded_config.py")
    return [*argv[:2], f"--config={file}:{run}", f"--workdir={run}", *argv[3:]]


def without_flags(words: Iterable[str], *names: str) -> list[str]:
    """Remove flags from the words of a command line, with their values."""
    words, others = iter(words), []
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if not word.startswith("-") or name not in names:
            others.append(word)
        elif not equals and name in ("from-step", "topology"):
            next(words, "")  # the value is a word of its own
    return others


def _as_config_flag(word: str) -> str:
    """Rewrite a word of the command line as `config_flags` reads it.

    ``~`` of --config=FILE is expanded; --config.precision=fast sets the preset.
    """
    flag, equals, value = word.partition("=")
    if flag == "--config.precision":
        return f"--config.precision.preset{equals}{value}"
    return f"{flag}={os.path.expanduser(value)}" if flag == "--config" else word


def with_current_names(argv: list[str]) -> list[str]:
    """Replace the command of earlier versions by its name now, and say so."""
    if len(argv) < 2 or argv[1] not in ALIASES:
        return argv
    name = ALIASES[argv[1]]
    print(f"{argv[1]} is now called {name}", file=sys.stderr)
    return [argv[0], name, *argv[2:]]
