"""Rows of works as aligned text."""


def aligned(titles: list[str], rows: list[tuple[str, list[str], str | None]]) -> str:
    """A table whose first column is to the left and whose others are to the right.

    Args:
      titles: of the columns, that of the works first.
      rows: (work, its cells, what went wrong), the last in the place of the cells.
    """
    cells = [titles, *([work, *own] for work, own, _ in rows)]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line, error in zip(cells, [None, *(error for *_, error in rows)], strict=True):
        rest = (f"{x:>{w}}" for x, w in zip(line[1:], width[1:], strict=True))
        lines.append("  ".join([f"{line[0]:<{width[0]}}", *([error] if error else rest)]))
    return "\n".join(lines)
