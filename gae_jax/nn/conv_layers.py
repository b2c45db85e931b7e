"""Layers that convolutional networks share: normalisation, convolution, upsampling, attention.

Maps are [B, H, W, C]. Parameters are kept in fp32; ``dtype`` is the dtype that a layer computes in.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from gae_jax.nn.attention import attention_implementation
from gae_jax.nn.layers import torch_uniform

GROUPS = 32


class GroupNorm(nnx.GroupNorm):
    """GroupNorm of 32 groups, computed in fp32, in the dtype of x.

    Raises:
      ValueError: if the channels do not divide into the groups.
    """

    def __init__(self, channels: int, *, eps: float, rngs: nnx.Rngs):
        if channels % GROUPS:
            raise ValueError(
                f"{channels} channels do not divide into {GROUPS} groups; use a "
                f"multiple of {GROUPS}"
            )
        super().__init__(
            channels,
            num_groups=GROUPS,
            epsilon=eps,
            dtype=jnp.float32,
            use_fast_variance=False,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # no mask
        """[B, ..., C] -> [B, ..., C]."""
        return super().__call__(x).astype(x.dtype)


def conv(
    features_in: int,
    features_out: int,
    kernel: int = 3,
    *,
    strides: int = 1,
    padding=None,
    zero: bool = False,
    dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Make a square convolution with bias.

    Args:
      kernel: edge of the kernel, odd.
      padding: as `nnx.Conv`; None pads all sides alike, so that stride 1 keeps the size.
      zero: initialize the kernel with zeros, else as PyTorch does.
    """
    init = nnx.initializers.zeros if zero else torch_uniform()
    return nnx.Conv(
        features_in,
        features_out,
        (kernel, kernel),
        strides=strides,
        padding=kernel // 2 if padding is None else padding,
        kernel_init=init,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def upsample(x: jax.Array, factor: int = 2) -> jax.Array:
    """Upsample [B, H, W, C] to [B, factor * H, factor * W, C] by repeating every pixel."""
    return repeat(x, "b h w c -> b (h p) (w q) c", p=factor, q=factor)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, attention: str = "xla") -> jax.Array:
    """Compute softmax(q k^T / sqrt(head_dim)) v over all pixels.

    Args:
      q, k, v: maps [B, H, W, heads, head_dim].
      attention: implementation, a name in `attention.ATTENTIONS`.
    """
    height = q.shape[1]
    q, k, v = (rearrange(x, "b h w n d -> b (h w) n d") for x in (q, k, v))
    implementation = attention_implementation(attention, v.dtype, v.shape[-1])
    out = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    return rearrange(out, "b (h w) n d -> b h w n d", h=height)


class Upsample(nnx.Module):
    """Repeat every pixel to 2 x 2, then apply a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 2 H, 2 W, C]."""
        return self.conv(upsample(x))
