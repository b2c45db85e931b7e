"""``compare``: how two results differ, first in protocol, then in value."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gae_jax.commands.arguments import Parser
from gae_jax.config import flatten
from gae_jax.runtime.errors import UserError, number_of
from gae_jax.runtime.files import read_figures
from gae_jax.runtime.text import columns

USAGE = """\
Print how the protocols of two results differ, then how their figures differ.

usage: python -m gae_jax compare A.json B.json

  A.json B.json     written by evaluate-samples or evaluate (RUN/evaluate/result.json), or a
                    directory with a result.json

The exit status is 0 if the protocols are the same, and 3 if they differ.
"""
# Sections that say how a figure was measured; "amended" lists fields changed during training.
PROTOCOL = ("manifest", "sampling", "amended", "started_from")
OTHER_PROTOCOL = 3
# Facts of samples in results of older versions -> their names of now.
OLDER = {"products": "matmuls", "decode_products": "decoder_matmuls"}


def read_result(path: Path) -> dict[str, Any]:
    """Read a result: dotted name -> value.

    Raises:
      UserError: if there is none.
    """
    if path.is_dir():
        path = path / "result.json"
    if not path.is_file():
        raise UserError(f"there is no result {path}")
    result = read_figures(path, remedy="make it again with: evaluate")
    if not isinstance(result, dict):
        raise UserError(f"{path} holds no result: it is a {type(result).__name__}")
    return _modern(flatten(result))


def _modern(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the names of now; in older ones the decoder had the sampler's dtype."""
    renamed: dict[str, Any] = {}
    for name, value in result.items():
        above, _, last = name.rpartition(".")
        of_samples = above.rpartition(".")[2] == "sampling"
        renamed[f"{above}.{OLDER.get(last, last)}" if of_samples else name] = value
    for name in [name for name in renamed if name.endswith("sampling.dtype")]:
        renamed.setdefault(name.replace("sampling.dtype", "sampling.decoder_dtype"), renamed[name])
    return renamed


def is_protocol(name: str) -> bool:
    """Whether a dotted name belongs to the protocol."""
    return bool(set(PROTOCOL) & set(name.split(".")))


def differences(a: Mapping, b: Mapping) -> tuple[list[tuple], list[tuple]]:
    """Compare two results: (differences of the protocol, all figures), as (name, a, b).

    A value that one of them lacks is None.
    """
    names = sorted(a.keys() | b.keys())
    protocol = [
        (name, a.get(name), b.get(name))
        for name in names
        if is_protocol(name) and _compared(name, a.get(name)) != _compared(name, b.get(name))
    ]
    figures = [
        (name, a.get(name), b.get(name))
        for name in names
        if not is_protocol(name) and any(_is_number(x.get(name)) for x in (a, b))
    ]
    return protocol, figures


def _compared(name: str, value: Any) -> Any:
    """The part of a value that is compared: not the path of weights that a stage started from."""
    if "started_from" in name.split(".") and isinstance(value, str):
        return value[max(value.rfind("(fingerprint"), 0) :]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def compare(first: Path, second: Path) -> tuple[str, bool]:
    """Compare two files: (text to print, whether the protocols are the same)."""
    protocol, figures = differences(read_result(first), read_result(second))
    lines = [f"A: {first}", f"B: {second}", ""]
    if protocol:
        lines.append(f"protocols differ in {number_of(len(protocol), 'field')}:")
        lines.append(columns([("", "A", "B"), *((n, _text(a), _text(b)) for n, a, b in protocol)]))
    else:
        lines.append("protocols are the same")
    rows = [("", "A", "B", "B - A")]
    for name, a, b in figures:
        change = ""
        if _is_number(a) and _is_number(b):  # infinity minus infinity is NaN
            change = f"{0.0 if a == b else b - a:+.6g}"
        rows.append((name, _text(a), _text(b), change))
    lines += ["", "figures:", columns(rows)]
    return "\n".join(lines), not protocol


def main(argv: list[str]) -> int:
    parser = Parser("python -m gae_jax compare --help")
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    options = parser.parse_args(argv)
    text, same = compare(options.a, options.b)
    print(text)
    return 0 if same else OTHER_PROTOCOL
