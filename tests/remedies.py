"""What an error advises, found in its text, so that tests can follow it word for word."""

import difflib
import re
import shlex

# A flag with what belongs to it; the full stop, the comma and the bracket after it do not.
FLAG = re.compile(r"--[a-z][\w.-]*(?:=(?:'[^']*'|[^\s,;)\"']*))?")
# A command, with the flags and paths behind it, up to the words of the sentence.
COMMAND = re.compile(r"python -m gae_jax ([a-z][a-z-]*(?: (?:--|/)[^\s,;()]+)*)")
FIELD = re.compile(r"(?<![\w/.{}])([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w({/])")


def flags_in(text: str) -> list[str]:
    """The flags that a text names, in order, as a command line takes them."""
    found = [match.group().rstrip(".:-") for match in FLAG.finditer(text)]
    return [part for flag in found for part in shlex.split(flag)]


def commands_in(text: str) -> list[list[str]]:
    """The commands that a text names, as lists of arguments behind ``python -m gae_jax``."""
    return [match.group(1).split() for match in COMMAND.finditer(text)]


def fields_in(text: str, known) -> tuple[list[str], list[str]]:
    """(fields of the config that a text names, what looks like one and is none).

    Args:
      known: dotted paths of all fields.
    """
    found, odd = [], []
    for match in FIELD.finditer(text):
        path = match.group(1)
        root = path.split(".")[0]
        if any(field.startswith(f"{root}.") for field in known):
            is_there = any(f"{field}.".startswith(f"{path}.") for field in known)
            (found if is_there else odd).append(path)
        elif any(field.endswith(f".{path}") for field in known):
            odd.append(path)  # without its section, nobody can pass it on
    return found, odd


def near(path: str, known) -> str:
    """The field that was meant, for a test's message."""
    return ", ".join(difflib.get_close_matches(path, known, n=1))
