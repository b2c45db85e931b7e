"""``COMMAND --help``: the fields of the config that a command reads; imports no JAX."""

import textwrap

from gae_jax.commands.field_notes import notes
from gae_jax.config import default_config, flatten
from gae_jax.config.choices import Choice, choice, declared
from gae_jax.config.precision import FIELDS, NETWORKS

_NOTE = textwrap.TextWrapper(100, initial_indent=6 * " ", subsequent_indent=6 * " ")
_IMAGES = ("data", "mesh")
# Command -> the sections, or parts of them, that it reads.
READ = {
    "backbone": ("backbone", *_IMAGES),
    "teacher": ("teacher", "backbone", "precision", *_IMAGES),
    "tokenizer": ("tokenizer", "backbone", "precision", *_IMAGES),
    "latents": ("latents", "precision", *_IMAGES),
    "diffusion": ("diffusion", "evaluate.online", "sample", "precision", "mesh"),
    "evaluate": ("evaluate", *_IMAGES),
    "reference": ("reference", "evaluate", *_IMAGES),
    "likelihood": ("likelihood", *_IMAGES),
    "doctor": ("doctor", *_IMAGES),
    "bench": ("bench", "precision", "mesh"),
    "plan": ("plan", "precision", "mesh"),
    "import-torch": ("import_torch",),
    "export-torch": ("export_torch",),
}


def _text(value) -> str:
    """A value as the command line takes it."""
    return repr(tuple(value)).replace(" ", "") if isinstance(value, list) else str(value)


def _line(path: str, value, names: tuple[str, ...], note: str = "") -> str:
    field = f"--config.{path}={_text(value)}"
    said = " | ".join(name or "'' (empty)" for name in names)
    return "\n".join([f"  {field:<48}  {said}".rstrip(), *_NOTE.wrap(note)])


def _of_sections(command: str) -> list[str]:
    """For every field of the sections that a command reads its flag, its choices, its meaning."""
    default = default_config()
    fields: dict[str, Choice] = declared(default)
    values, meanings, lines = flatten(default), notes(), []
    for section in READ[command]:
        for path, value in values.items():
            if path.startswith(f"{section}.") and path != "precision.override":
                names = fields[path].written_names() if path in fields else ()
                lines.append(_line(path, value, names, meanings.get(path, "")))
    return lines


def _of_networks(command: str) -> list[str]:
    """A line for every field of a network that a command computes, or may."""
    stages = {"bench": "", "plan": ""}.get(command, command)
    lines = []
    for network, use in NETWORKS.items():
        if stages and use.stage != stages:
            continue
        lines.append(f"  {use.what} ({network}), of precision.{use.group}:")
        for field, value in use.defaults.items():
            names = choice(*FIELDS[field]).written_names()
            lines.append(_line(f"precision.{network}.{field}", value, names))
    return lines


def field_help(command: str) -> str:
    """The fields that a command reads, with default and choices; "" if it reads none."""
    if command not in READ:
        return ""
    lines = [f"fields that {command} reads, with their defaults, choices and meaning:"]
    lines += _of_sections(command)
    if "precision" in READ[command]:
        lines += [
            "",
            "single networks, which override their group and the preset:",
            *_of_networks(command),
        ]
    return "\n".join(lines)
