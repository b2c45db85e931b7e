"""Fields whose values are names: the default and the names it can be replaced by, side by side."""

import ast
import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections.config_dict import FieldReference


class Choice(FieldReference):
    """A config field that is a name, or a tuple of names.

    Attributes:
      choices: the names. One with a colon, ``MODULE:NAME``, stands for the names in ``NAME`` of
        ``gae_jax.MODULE``, which is imported only when they are asked for.
    """

    def __init__(self, default: Any, choices: Sequence[str]):
        super().__init__(default, field_type=type(default))
        self.choices = tuple(choices)

    def names(self) -> tuple[str, ...]:
        """All names that can be chosen."""
        return tuple(name for choice in self.choices for name in _expand(choice))

    def written_names(self) -> tuple[str, ...]:
        """As `names`, read from the source of the modules: nothing is imported, for help."""
        return tuple(name for choice in self.choices for name in _read(choice))


def _expand(choice: str) -> Sequence[str]:
    if ":" not in choice:
        return (choice,)
    module, name = choice.split(":")
    return tuple(getattr(importlib.import_module(f"gae_jax.{module}"), name))


def _read(choice: str) -> Sequence[str]:
    if ":" not in choice:
        return (choice,)
    module, name = choice.split(":")
    path = Path(__file__).parents[1].joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return _entries(ast.Name(name), _assigned(path))


@functools.cache
def _assigned(path: Path) -> dict[str, ast.expr]:
    """Name -> the expression that a module assigns to it."""
    values: dict[str, ast.expr] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            values |= {x.id: node.value for x in targets if isinstance(x, ast.Name)}
    return values


def _entries(node: ast.expr | None, values: Mapping[str, ast.expr]) -> tuple[str, ...]:
    """The texts in a tuple, or the keys of a dict, that an expression of a module is."""
    if isinstance(node, ast.Name):
        return _entries(values[node.id], values)
    if isinstance(node, ast.Starred):
        return _entries(node.value, values)
    if isinstance(node, ast.Tuple | ast.Dict):
        parts = node.elts if isinstance(node, ast.Tuple) else node.keys
        return tuple(name for part in parts for name in _entries(part, values))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (node.value,)
    raise TypeError(f"no tuple of texts, and no dict with such keys: {node and ast.dump(node)}")


def choice(default: str, *others: str) -> Choice:
    """A field with one of these names; ``others``: names, or ``MODULE:NAME``, as `Choice` has."""
    return Choice(default, others if any(":" in name for name in others) else (default, *others))


def choices(default: tuple[str, ...], *names: str) -> Choice:
    """A field with a tuple of names: of those in the default if none are given."""
    return Choice(default, names or default)


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
