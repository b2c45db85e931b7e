"""PatchGAN discriminator (Isola et al. 2017), as the released GAE uses it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.batch_norm import NORMAL, BatchNorm


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
        layers: dict[str, nnx.Conv | BatchNorm] = {"0": conv(3, ndf, strides=2)}
        width, index = ndf, 2
        for n in range(1, n_layers + 1):
            wider = ndf * min(2**n, 8)
            strides = 2 if n < n_layers else 1
            layers[str(index)] = conv(width, wider, strides=strides, use_bias=False)
            layers[str(index + 1)] = BatchNorm(wider, stat_groups=stat_groups, rngs=rngs)
            width, index = wider, index + 3
        layers[str(index)] = conv(width, 1)
        self.order = tuple(layers)
        self.main: nnx.Dict[Any] = nnx.Dict(layers)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Compute the logits; ``train`` normalises by the batch and updates running statistics.

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
