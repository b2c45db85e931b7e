"""Batch normalisation as torch computes it."""

import jax
import jax.numpy as jnp
from flax import nnx

NORMAL = nnx.initializers.normal(0.02)


class BatchNorm(nnx.Module):
    """BatchNorm over all axes but the last, with PyTorch's running statistics.

    Flax keeps the biased variance in the running statistics, PyTorch the unbiased one; this layer
    exists for that difference, and for ``stat_groups``: parts of the batch with statistics of their
    own, as in `PatchGAN`. Under jit on a mesh the statistics are those of the global batch or of
    its groups, on whichever devices their rows are.
    """

    def __init__(
        self,
        dim: int,
        *,
        momentum: float = 0.1,
        eps: float = 1e-5,
        stat_groups: int = 1,
        rngs: nnx.Rngs,
    ):
        self.momentum, self.eps, self.stat_groups = momentum, eps, stat_groups
        self.weight = nnx.Param(1 + NORMAL(rngs.params(), (dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.running_mean = nnx.BatchStat(jnp.zeros((dim,), jnp.float32))
        self.running_var = nnx.BatchStat(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalise x [B, ..., C]; ``train``: by the batch, and update the running statistics."""
        wide = x.astype(jnp.float32)
        if train:
            mean, var = self._of_groups(wide)
        else:
            mean, var = self.running_mean[...], self.running_var[...]
        scale = self.weight[...] * jax.lax.rsqrt(var + self.eps)
        return ((wide - mean) * scale + self.bias[...]).astype(x.dtype)

    def _of_groups(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute mean and variance for every row, and update the running statistics.

        These follow the averages of the groups' statistics.
        """
        batch, groups = len(x), self.stat_groups
        if batch % groups:
            raise ValueError(f"a batch of {batch} does not divide into stat_groups={groups}")
        grouped = x.reshape(groups, batch // groups, *x.shape[1:])
        axes = tuple(range(1, grouped.ndim - 1))
        mean, var = jnp.mean(grouped, axes), jnp.var(grouped, axes)  # [groups, C]
        count = x.size // (groups * x.shape[-1])
        self._move(self.running_mean, jnp.mean(mean, axis=0))
        self._move(self.running_var, jnp.mean(var, axis=0) * count / max(count - 1, 1))

        def of_rows(values):
            shape = (batch, *(1,) * (x.ndim - 2), x.shape[-1])
            return jnp.repeat(values, batch // groups, axis=0).reshape(shape)

        return of_rows(mean), of_rows(var)

    def _move(self, running: nnx.Variable, value: jax.Array) -> None:
        value = jax.lax.stop_gradient(value)
        running[...] = (1 - self.momentum) * running[...] + self.momentum * value
