"""What an error advises, found in its text, so that tests can follow it word for word."""

import difflib
import re
import shlex

# A flag with what belongs to it; the full stop, the comma and the bracket after it do not.
FLAG = re.compile(r"--[a-z][\w.-]*(?:=(?:'[^']*'|[^\s,;)\"']*))?")
# A command, with the flags and paths behind it, up to the words of the sentence.
COMMAND = re.compile(r"python -m gae_jax ([a-z][a-z-]*(?: (?:--|/)[^\s,;()]+)*)")
# Values that stand for something of the user's.
PLACEHOLDERS = ("FILE", "DIR", "N", "RUN", "NEW", "VALUE", "KEY=VALUE")


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
    sections = {path.rsplit(".", 1)[0] for path in known} | {path.split(".")[0] for path in known}
    sections |= {".".join(path.split(".")[:n]) for path in known for n in range(1, 5)}
    roots = {path.split(".")[0] for path in known if "." in path}
    found, odd = [], []
    for match in re.finditer(r"(?<![\w/.{}])([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w({/])", text):
        path = match.group(1)
        if path.split(".")[0] not in roots:
            if any(field.endswith("." + path) for field in known):
                odd.append(path)  # without its section, nobody can pass it on
            continue
        if path in known or path in sections:
            found.append(path)
        else:
            odd.append(path)
    return found, odd


def near(path: str, known) -> str:
    """The field that was meant, for a test's message."""
    return ", ".join(difflib.get_close_matches(path, known, n=1))
