"""Text of tables."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, right: bool = False, indent: str = "  ") -> str:
    """Align rows of equal length as columns, one row per line.

    Args:
      right: align all columns but the first to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:{'>' if right and index else '<'}{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
