"""Show how tensors were mapped, and compare a network before and after."""

from collections import Counter

from gae_jax.interop.convert import Mapped

TOLERANCE = 1e-5  # of the outputs on the fixed batch, relative


def mapping_table(rows: list[Mapped]) -> str:
    """Show a mapping as text: torch name, our name, transform, number of tensors and shapes."""
    cells = [("torch", "here", "transform", "tensors")]
    for row in rows:
        counts = Counter(row.shapes)
        sizes = ", ".join(f"{count} x {list(shape)}" for shape, count in counts.items())
        cells.append((row.torch, row.ours, row.transform, sizes))
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def difference_line(differences: dict[str, float]) -> str:
    """Show the differences of `largest_difference`."""
    pairs = ", ".join(f"{name} {value:.3g}" for name, value in differences.items())
    return f"  largest difference on a fixed batch, before and after, relative: {pairs}"
