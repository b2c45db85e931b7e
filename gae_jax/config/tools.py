"""What reads a config: sections as arguments, flat or plain, and config files upon each other."""

import difflib
import importlib.util
import inspect
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from gae_jax.runtime.errors import ConfigError, UserError


def preset(presets: Mapping[str, Any], name: str, what: str) -> Any:
    """``presets[name]``, for the argument of a config file (``--config=FILE.py:NAME``).

    Raises:
      ConfigError: if there is none of that name; the others are named.
    """
    if name not in presets:
        raise ConfigError(
            f"there is no {what} {name!r} in this config: use :{' or :'.join(presets)}"
        )
    return presets[name]


def run_file(path: Path, name: str) -> ModuleType:
    """The module of a Python file that is no part of the package.

    Raises:
      ConfigError: if it cannot be run.
    """
    with explaining(path):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@contextmanager
def explaining(path: Path | str) -> Iterator[None]:
    """Whatever the code of a file raises becomes a ConfigError that names file and line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the file is code, and raises whatever it does
        lines = frames_in(path, error)
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = str(path) + (f", line {line}" if line else "")
        what = getattr(error, "msg", None) or str(error)
        raise ConfigError(f"{where}: {type(error).__name__}: {what}; mend the file") from error


def frames_in(path: Path | str, error: BaseException) -> list[int | None]:
    """The lines of a file that an error came through, from the outermost on."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.lineno for frame in frames if frame.filename == str(path)]


def load_config(folder: Path, name: str) -> ml_collections.ConfigDict:
    """The config of ``folder/NAME.py``, for config files that change another one.

    Args:
      name: NAME, or NAME:ARGUMENT.

    Raises:
      ConfigError: if there is no such file; the others are named.
    """
    name, *argument = name.split(":", 1)
    path = folder / f"{name}.py"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.py"))
        raise ConfigError(f"there is no config {path}: use :{' or :'.join(known)}")
    module = run_file(path, f"config_{name}")
    with explaining(path):
        return module.get_config(*argument)


def bind(function: Callable, section: Mapping, path: str) -> dict[str, Any]:
    """The section as keyword arguments of ``function``.

    Raises:
      ConfigError: if the section holds a name that is no argument of the function.
    """
    # NNX's metaclass hides the signature of a module class; its __init__ has it
    target = function.__init__ if isinstance(function, type) else function
    names = inspect.signature(target).parameters
    for key in section:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise ConfigError(
                f"{path}.{key} is no argument of {function.__qualname__}"
                + (f" (did you mean {near[0]}?)" if near else "")
            )
    return {key: section[key] for key in section}


def at_home(value: Any) -> Any:
    """A path with the home directory instead of a leading ``~``; other values as they are.

    Shells do not expand it inside of ``--config.data.root=~/images``.
    """
    if isinstance(value, Path):
        return Path(at_home(str(value)))
    starts = isinstance(value, str) and value.startswith("~")
    return os.path.expanduser(value) if starts else value


def expand_home(config: ml_collections.ConfigDict) -> None:
    """Does `at_home` to all fields of a config."""
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            expand_home(value)
        elif (expanded := at_home(value)) != value:
            config[key] = expanded


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; tuples become lists, as JSON has them."""
    flat = {}
    for key in config:
        value, path = config[key], f"{prefix}{key}"
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, path + ".")
        else:
            flat[path] = list(value) if isinstance(value, tuple) else value
    return flat


def plain(config: ml_collections.ConfigDict) -> dict:
    """The config as nested dicts of JSON values."""
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))


def unknown_field(argv: Sequence[str], schema: ml_collections.ConfigDict) -> str:
    """What is wrong with the first ``--config.KEY=VALUE`` whose field there is not; "" if none."""
    for flag in (word.partition("=")[0] for word in argv):
        if not flag.startswith("--config.") or "[" in flag:
            continue
        section, above = schema, "the config"
        for key in flag.removeprefix("--config.").split("."):
            if not isinstance(section, ml_collections.ConfigDict):
                return f"{flag}: {above} is a field and has none inside"
            if key not in section:
                near = difflib.get_close_matches(key, list(section), cutoff=0.6)
                has = f"did you mean {' or '.join(near)}?"
                has = has if near else f"it has {', '.join(section)}"
                return f"{flag}: {above} has no field {key!r}; {has}"
            section, above = section[key], key if above == "the config" else f"{above}.{key}"
    return ""
