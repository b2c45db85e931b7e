"""PatchGAN discriminator (Isola et al. 2017), as the released GAE uses it."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

NORMAL = nnx.initializers.normal(0.02)


class BatchNorm(nnx.Module):
    """BatchNorm over all axes but the last, with PyTorch's running statistics.

    Flax keeps the biased variance in the running statistics, PyTorch the unbiased one; this
    layer exists for that difference, and for ``stat_groups``, as `PatchGAN`. Under jit on a mesh
    the statistics are those of the global batch or of its groups, wherever their rows lie.
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
        """``train`` normalises by the batch and moves the running statistics."""
        wide = x.astype(jnp.float32)
        if train:
            mean, var = self._of_groups(wide)
        else:
            mean, var = self.running_mean[...], self.running_var[...]
        scale = self.weight[...] * jax.lax.rsqrt(var + self.eps)
        return ((wide - mean) * scale + self.bias[...]).astype(x.dtype)

    def _of_groups(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance for every row of the batch; moves the running statistics.

        These follow the means of the groups' statistics: no group is preferred.
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


class PatchGAN(nnx.Module):
    """Images [B, H, W, 3] -> logits [B, h, w, 1], one per overlapping patch.

    Convolutions of kernel 4: ``n_layers`` of stride 2, then two of stride 1, with BatchNorm and
    LeakyReLU(0.2) between them; N(0, 0.02) initialisation.

    Args:
      ndf: channels of the first layer, doubled by each next one up to eight times.
      n_layers: layers of stride 2.
      stat_groups: equal parts of the batch, in its order, that are each normalised by their own
        statistics in training: with as many as the released code has processes, what its
        DistributedDataParallel without SyncBatchNorm computes. It keeps the running statistics of
        its first process, we the mean of all.
    """

    def __init__(
        self,
        *,
        ndf: int = 64,
        n_layers: int = 3,
        stat_groups: int = 1,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv = partial(
            nnx.Conv, kernel_size=(4, 4), padding=1, kernel_init=NORMAL, dtype=dtype, rngs=rngs
        )
        # Numbered like the released nn.Sequential: conv, LeakyReLU, then conv, norm, LeakyReLU.
        layers = {"0": conv(3, ndf, strides=2)}
        width, index = ndf, 2
        for n in range(1, n_layers + 1):
            wider = ndf * min(2**n, 8)
            strides = 2 if n < n_layers else 1
            layers[str(index)] = conv(width, wider, strides=strides, use_bias=False)
            layers[str(index + 1)] = BatchNorm(wider, stat_groups=stat_groups, rngs=rngs)
            width, index = wider, index + 3
        layers[str(index)] = conv(width, 1)
        self.order = tuple(layers)
        self.main = nnx.Dict(layers)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """``train`` normalises by the batch and moves the running statistics.

        Raises:
          ValueError: if a batch in training does not divide into the groups.
        """
        x = jax.nn.leaky_relu(self.main["0"](images), 0.2)
        for name in self.order[1:-1]:
            layer = self.main[name]
            if isinstance(layer, BatchNorm):
                x = jax.nn.leaky_relu(layer(x, train=train), 0.2)
            else:
                x = layer(x)
        return self.main[self.order[-1]](x).astype(jnp.float32)
