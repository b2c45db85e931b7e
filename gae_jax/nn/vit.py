"""Blocks of the ViT of GAE and the way through a row of them, by XLA or by kernels."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.kernels.fp8 import Scaled
from gae_jax.kernels.norm import Stream, use_kernels
from gae_jax.kernels.swiglu import rounded_swiglu, swiglu_obstacle
from gae_jax.kernels.swiglu_matmul import swiglu_of
from gae_jax.nn.attention import Attention
from gae_jax.nn.layers import linear, rematerialize, rms_norm
from gae_jax.nn.quantized import QuantizedLinear, normed_for, unscaled
from gae_jax.runtime.mesh import constrain


def mlp_hidden(dim: int, mlp_ratio: float) -> int:
    """Hidden width of the SwiGLU: 2/3 of dim * mlp_ratio, rounded up to a multiple of 256."""
    return -(-int(dim * mlp_ratio * 2 / 3) // 256) * 256


class SwiGLU(nnx.Module):
    """fc2(silu(fc1 x) * gate x) without biases, as in the released GAE."""

    def __init__(self, dim: int, hidden: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        make = partial(linear, dtype=dtype, rngs=rngs)
        self.fc1 = make(dim, hidden)
        self.gate = make(dim, hidden)
        self.fc2 = make(hidden, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(x)) * self.gate(x))

    @property
    def obstacle(self) -> str | None:
        """Why there is no `streamed` for these layers, or None."""
        first = self.fc1, self.gate
        if not all(isinstance(layer, nnx.Linear | QuantizedLinear) for layer in first):
            return "fc1 and gate are other layers than Linear"
        return swiglu_obstacle(self.fc1.out_features)

    def streamed(self, x: jax.Array, h: jax.Array | Scaled, kernels: str) -> Stream:
        """x and what becomes of h [B, N, C], by kernels; fc1 and gate are one product."""
        first = self.fc1, self.gate
        nothing = jnp.zeros((2 * self.fc1.out_features,), jnp.float32)  # there are no biases
        if not isinstance(self.fc2, QuantizedLinear):
            matrix = jnp.concatenate([layer.kernel[...] for layer in first], axis=1)
            hidden = swiglu_of(h.astype(self.fc1.dtype), matrix, nothing, kernels)
            return Stream(x + self.fc2(hidden))
        columns = jnp.concatenate([layer.scale[...] for layer in first])
        rounded = rounded_swiglu(unscaled(first, h), nothing, h.scale, columns, kernels)
        hidden = Scaled(*rounded)
        y = self.fc2.unscaled(hidden)
        return Stream(x, y, rows=hidden.scale, columns=self.fc2.scale[...])


class Block(nnx.Module):
    """x += attn(rms(x)); x += mlp(rms(x)). The norms have no weights."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        more = dict(attention=attention, dtype=dtype, rngs=rngs)
        self.attn = Attention(dim, num_heads, num_kv_heads=num_kv_heads, **more)
        self.mlp = SwiGLU(dim, mlp_hidden(dim, mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(rms_norm(x))
        return x + self.mlp(rms_norm(x))

    def streamed(self, stream: Stream, kernels: str) -> Stream:
        """The same by `kernels`. What a branch gives is added by the product that it ends with."""
        x, h = normed_for(self.attn.qkv, stream.normed, kernels)
        x, h = normed_for(self.mlp.fc1, Stream(x + self.attn(h)).normed, kernels)
        return self.mlp.streamed(x, h, kernels)


def through_blocks(blocks, x: jax.Array, *, remat: str, kernels: str) -> jax.Array:
    """Tokens [B, N, C] through `Block`s and the norm after them."""
    obstacles = [block.mlp.obstacle for block in blocks]
    if use_kernels(kernels, x.dtype, x.shape, next(filter(None, obstacles), None)):
        stream = Stream(x)
        for block in blocks:
            call = rematerialize(block, remat, lambda block, s: block.streamed(s, kernels))
            stream = call(stream.constrained())
        return stream.normed(kernels)[1]
    for block in blocks:
        x = rematerialize(block, remat)(constrain(x))
    return rms_norm(x)
