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

from gae_jax.config import renamed
from gae_jax.config.precision import (
    NETWORKS,
    entries,
    is_override,
    override,
    precision_section,
)
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
        frames = frames_in(path, error)
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
        where = str(path) + (f", line {line}" if line else "")
        if isinstance(error, AttributeError | KeyError) and frames:
            lines = renamed.lines_of(path, frames[-1].lineno, frames[-1].end_lineno)
            if now := renamed.hint_for_lines(lines, str(error)):
                raise ConfigError(f"{where}: {now}") from error
        what = getattr(error, "msg", None) or str(error)
        raise ConfigError(f"{where}: {type(error).__name__}: {what}; mend the file") from error


def frames_in(path: Path | str, error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of a file that an error came through, from the outermost on."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if frame.filename == str(path)]


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


def set_field(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    """Set the field ``a.b.c`` of a config.

    ``precision.NETWORK.FIELD`` is appended to ``precision.override``.

    Raises:
      ConfigError: if the config has no such field (names the nearest), or the type is different.
    """
    if is_override(path, config.precision):
        return override(config, {path: value})
    known = flatten(config)
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1)
        now = renamed.hint(path) or (f"did you mean {near[0]}?" if near else "")
        raise ConfigError(f"the config has no field {path}" + (f" ({now})" if now else ""))
    *sections, leaf = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    try:
        section[leaf] = value
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from None


def unknown_field(argv: Sequence[str], schema: ml_collections.ConfigDict) -> str:
    """What is wrong with the first ``--config.KEY=VALUE`` whose field there is not; "" if none."""
    for flag in (word.partition("=")[0] for word in argv):
        if not flag.startswith("--config.") or "[" in flag:
            continue
        if now := renamed.hint(flag.removeprefix("--config.")):
            return f"{flag}: {now}"
        section, above = schema, "the config"
        for key in flag.removeprefix("--config.").split("."):
            if not isinstance(section, ml_collections.ConfigDict):
                return f"{flag}: {above} is a field and has none inside"
            if key not in section and above == "precision" and key in NETWORKS:
                fields = ", ".join(f"{flag}.{name}" for name in NETWORKS[key].defaults)
                return f"{flag} is a network; set one of its fields: {fields}"
            if key not in section:
                near = difflib.get_close_matches(key, list(section), cutoff=0.6)
                has = f"did you mean {' or '.join(near)}?"
                has = has if near else f"it has {', '.join(section)}"
                return f"{flag}: {above} has no field {key!r}; {has}"
            section, above = section[key], key if above == "the config" else f"{above}.{key}"
    return ""


def without_overrides(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """(the command line without those words that override the precision of networks, overrides).

    These are --config.precision.override=NETWORK.FIELD=VALUE,... and, for one of them,
    --config.precision.NETWORK.FIELD=VALUE; all are appended to those of the config.
    """
    section = precision_section()
    rest: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        path, equals, value = word.removeprefix("--config.").partition("=")
        is_list = path == "precision.override"
        if not word.startswith("--config.") or not (is_list or is_override(path, section)):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        overrides += entries(value) if is_list else [f"{path.removeprefix('precision.')}={value}"]
    return rest, tuple(overrides)
