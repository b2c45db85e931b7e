"""Show how tensors were mapped, and compare a network before and after."""

from collections import Counter

from gae_jax.interop.convert import Mapped
from gae_jax.runtime.text import columns

TOLERANCE = 1e-5  # of the outputs on the fixed batch, relative


def mapping_table(rows: list[Mapped]) -> str:
    """Show a mapping as text: torch name, our name, transform, number of tensors and shapes."""
    cells = [("torch", "here", "transform", "tensors")]
    for row in rows:
        counts = Counter(row.shapes)
        sizes = ", ".join(f"{count} x {list(shape)}" for shape, count in counts.items())
        cells.append((row.torch, row.ours, row.transform, sizes))
    return columns(cells)


def difference_line(differences: dict[str, float]) -> str:
    """Show the differences of `largest_difference`."""
    pairs = ", ".join(f"{name} {value:.3g}" for name, value in differences.items())
    return f"  largest difference on a fixed batch, before and after, relative: {pairs}"
