"""Fields whose values are names: the default and the names it can be replaced by, side by side."""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
from ml_collections.config_dict import FieldReference


class _Operation(NamedTuple):
    """What a `FieldReference` computes from the field that it refers to."""

    fn: Callable[[Any], Any]
    args: tuple = ()


class Choice(FieldReference):
    """A config field that is a name, or a tuple of names.

    Attributes:
      choices: the names. One with a colon, ``MODULE:NAME``, stands for the names in ``NAME`` of
        ``gae_jax.MODULE``, which is imported only when they are asked for.
    """

    def __init__(self, default: Any, choices: Sequence[str], operation: _Operation | None = None):
        kind = str if isinstance(default, FieldReference) else type(default)
        super().__init__(default, field_type=kind, op=operation)
        self.choices = tuple(choices)

    def names(self) -> tuple[str, ...]:
        """All names that can be chosen."""
        return tuple(name for choice in self.choices for name in _expand(choice))


def _expand(choice: str) -> Sequence[str]:
    if ":" not in choice:
        return (choice,)
    module, name = choice.split(":")
    return tuple(getattr(importlib.import_module(f"gae_jax.{module}"), name))


def choice(default: str, *others: str) -> Choice:
    """A field with one of these names; ``others``: names, or ``MODULE:NAME``, as `Choice` has."""
    return Choice(default, others if any(":" in name for name in others) else (default, *others))


def choices(default: tuple[str, ...], *names: str) -> Choice:
    """A field with a tuple of names: of those in the default if none are given."""
    return Choice(default, names or default)


def follow(source: Choice, table: Mapping[str, str], otherwise: str, *names: str) -> Choice:
    """A field that depends on another one, ``source``, until it is set itself.

    Args:
      table: value of ``source`` -> value of this field.
      otherwise: its value where ``source`` has none of these.
      names: what it can be set to, as of `Choice`.
    """
    return Choice(source, names, _Operation(functools.partial(_look_up, table, otherwise)))


def _look_up(table: Mapping[str, str], otherwise: str, value: str) -> str:
    return table.get(value, otherwise)


def declared(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Choice]:
    """The fields of a config that are a `Choice`, by dotted path."""
    found = {}
    for name, field in config.items(preserve_field_references=True):
        if isinstance(field, ml_collections.ConfigDict):
            found |= declared(field, f"{prefix}{name}.")
        elif isinstance(field, Choice):
            found[prefix + name] = field
    return found


def choice_problems(values: Mapping[str, Any], fields: Mapping[str, Choice]) -> dict[str, str]:
    """Dotted path -> what is wrong with the name or the names that a field has.

    Args:
      values: of a config, by dotted path.
      fields: as `declared` finds them in the default config.
    """
    problems = {}
    for path, field in fields.items():
        value, names = values[path], field.names()
        if field.get_type() is tuple:
            if unknown := sorted(set(value) - set(names)):
                problems[path] = f"{path} has {unknown}; known are {', '.join(names)}"
        elif value not in names:
            shown = ", ".join(name or "'' (empty)" for name in names)
            problems[path] = f"{path} is {value!r}; use one of {shown}"
    return problems
