"""The residual stream of a transformer, with the output of a branch that is not yet added."""

from typing import NamedTuple

import jax

from gae_jax.kernels.norm import add_and_norm, add_and_norm_fp8
from gae_jax.runtime.mesh import constrain


class Stream(NamedTuple):
    """A residual stream x [B, N, C] with the pending output of a branch, gate (y + bias).

    `normed` computes the sum together with the norm that follows. Shapes as in `add_and_norm`;
    ``rows`` and ``columns`` are scales of y, as in `add_and_norm_fp8`.
    """

    x: jax.Array
    y: jax.Array | None = None
    gate: jax.Array | None = None
    bias: jax.Array | None = None
    rows: jax.Array | None = None
    columns: jax.Array | None = None

    def normed(self, kernels: str, *, fp8: bool = False, **arrays) -> tuple[jax.Array, ...]:
        """Return (sum, norm), or with ``fp8`` what `add_and_norm_fp8` returns.

        Args:
          arrays: weight, shift, scale and eps of `add_and_norm`.
        """
        arrays |= dict(x=self.x, y=self.y, gate=self.gate, bias=self.bias, kernels=kernels)
        if fp8 or self.rows is not None:
            return add_and_norm_fp8(**arrays, rows=self.rows, columns=self.columns, fp8=fp8)
        return add_and_norm(**arrays)

    def constrained(self) -> "Stream":
        """Constrain the sharding of x and y as `mesh.constrain` does."""
        return self._replace(x=constrain(self.x), y=None if self.y is None else constrain(self.y))
