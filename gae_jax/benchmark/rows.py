"""Rows of figures, one a workload: made one after the other, written as JSON, shown as a table."""

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gae_jax.runtime.errors import number_of
from gae_jax.runtime.files import write_json
from gae_jax.runtime.text import columns as aligned

# Title, dotted path in a row, factor, format.
Column = tuple[str, str, float, str]


def attempt(command: str, name: str, make: Callable[[], dict]) -> dict[str, Any]:
    """Make a row, or one that says what went wrong: the other workloads are tried all the same."""
    try:
        row = {"work": name, "error": None, **make()}
    except Exception as error:  # compilers and allocators raise errors of many kinds
        logging.debug("%s: %s", command, name, exc_info=True)
        text = next(iter(str(error).splitlines()), "")
        row = {"work": name, "error": f"{type(error).__name__}: {text}"[:300]}
    gc.collect()  # arrays and programs that only a cycle or a traceback kept
    return row


def make_rows(
    command: str,
    makers: Iterable[tuple[str, Callable[[], dict]]],
    result: dict[str, Any],
    path: Path,
    *,
    finish: Callable[[dict], None] = lambda row: None,
) -> list[str]:
    """Make the rows of ``result`` and write it to ``path`` after every one of them.

    Args:
      makers: (name of a workload, function that makes its row).
      result: what the file holds beside "rows"; they are added to it.
      finish: completes a row that was made without an error, and logs it.

    Returns:
      The workloads that failed.
    """
    result["rows"] = []
    for name, make in makers:
        row = attempt(command, name, make)
        if row["error"]:
            logging.info("%s: %s: %s", command, name, row["error"])
        else:
            finish(row)
        result["rows"].append(row)
        write_json(path, result)  # what was measured stays, whatever comes
    logging.info("%s: %s", command, path)
    return [row["work"] for row in result["rows"] if row["error"]]


def failure(command: str, failed: Sequence[str], total: int) -> str:
    """The message of an error for workloads that failed."""
    what = number_of(total, "workload")
    return f"{command}: {len(failed)} of {what} failed: {', '.join(failed)}; the table says why"


def value_at(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path of a row, or None."""
    for key in path.split("."):
        row = (row or {}).get(key)
    return row


def table_of(
    rows: list[dict[str, Any]],
    columns: Sequence[Column],
    mark: Callable[[dict, str], str] = lambda row, path: "",
) -> str:
    """Show rows as aligned text, failed ones below the others; "-" is an unknown value.

    Columns without any value are left out.

    Args:
      mark: (row, path) -> what stands before that value.
    """

    def cell(row, path, factor, form):
        value = value_at(row, path)
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return mark(row, path) + format(value if factor == 1 else value * factor, form)

    shown = [c for c in columns if any(value_at(row, c[1]) is not None for row in rows)]
    made = [row for row in rows if not row["error"]]
    cells = [["work", *(title for title, *_ in shown)]]
    cells += [[row["work"], *(cell(row, *column[1:]) for column in shown)] for row in made]
    lines = aligned(cells, right=True, indent="").splitlines()
    failed = [f"{row['work']}: {row['error']}" for row in rows if row["error"]]
    return "\n".join([*lines, *failed])
