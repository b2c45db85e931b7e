"""LightningDiT: a diffusion transformer with RoPE, SwiGLU and RMSNorm (arXiv 2501.01423).

The defaults are the paper's; arguments, named as in the released code, turn each of these off.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.kernels.norm import check_kernels, use_kernels
from gae_jax.kernels.stream import Stream
from gae_jax.kernels.swiglu import swiglu_obstacle
from gae_jax.nn.attention import Attention
from gae_jax.nn.layers import (
    Buffer,
    Mlp,
    RMSNorm,
    check_remat,
    layer_norm,
    linear,
    rematerialize,
    rope_table,
    sincos_table,
    unpatchify,
)
from gae_jax.nn.mlp import XAVIER, FusedSwiGLU
from gae_jax.nn.quantized import normed_for
from gae_jax.nn.vit import PatchEmbed
from gae_jax.runtime.mesh import constrain

# Presets of the released code, as arguments of `LightningDiT`; "XL/1" is width XL, patch size 1.
_WIDTHS = {
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
    "1p0B": dict(hidden_size=1536, depth=24, num_heads=24),
    "1p6B": dict(hidden_size=1792, depth=28, num_heads=28),
}
SIZES = {f"{name}/{p}": dict(patch_size=p, **_WIDTHS[name]) for name in _WIDTHS for p in (1, 2)}

NORMAL = nnx.initializers.normal(0.02)
ZERO = nnx.initializers.zeros


def modulate(x: jax.Array, shift: jax.Array | None, scale: jax.Array) -> jax.Array:
    """Return x * (1 + scale) + shift; both [B, 1, C] per image or [B, N, C] per token."""
    x = x * (1 + scale)
    return x if shift is None else x + shift


class Modulation(nnx.Module):
    """adaLN: SiLU -> Linear, split into ``parts``; starts at zero."""

    def __init__(self, dim: int, parts: int, *, dtype, rngs: nnx.Rngs):
        self.parts = parts
        self.linear = linear(dim, parts * dim, bias=True, init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, c: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(jax.nn.silu(c)), self.parts, axis=-1)


def make_norm(dim: int, *, use_rmsnorm: bool, rngs: nnx.Rngs):
    """Make an RMSNorm with weight, or a LayerNorm without weight and bias."""
    return RMSNorm(dim, rngs=rngs) if use_rmsnorm else layer_norm


class DiTBlock(nnx.Module):
    """Attention and MLP, each modulated and gated by the condition; options as `LightningDiT`.

    The condition is one of the image, c [B, 1, C], or one of each token, c [B, N, C]. ``init`` is
    that of the Linear layers; None takes PyTorch's default.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        use_qknorm: bool,
        use_swiglu: bool,
        use_rmsnorm: bool,
        wo_shift: bool,
        attention: str,
        init=XAVIER,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.wo_shift = wo_shift
        self.norm1 = make_norm(dim, use_rmsnorm=use_rmsnorm, rngs=rngs)
        learned = "learned" if use_rmsnorm else "layer"
        self.attn = Attention(
            dim,
            num_heads,
            qk_norm=learned if use_qknorm else None,
            bias=True,
            attention=attention,
            init=init,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = make_norm(dim, use_rmsnorm=use_rmsnorm, rngs=rngs)
        hidden = int(dim * mlp_ratio)
        self.mlp: Any  # FusedSwiGLU or Mlp; `streamed` needs the first
        if use_swiglu:
            self.mlp = FusedSwiGLU(dim, int(2 / 3 * hidden), init=init, dtype=dtype, rngs=rngs)
        else:
            self.mlp = Mlp(dim, hidden, init=init, approximate=True, dtype=dtype, rngs=rngs)
        self.adaLN_modulation = Modulation(dim, 4 if wo_shift else 6, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, rope) -> jax.Array:
        parts = self.adaLN_modulation(c)
        if self.wo_shift:
            scale_msa, gate_msa, scale_mlp, gate_mlp = parts
            shift_msa = shift_mlp = None
        else:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        attended = self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope)
        x = x + gate_msa * attended
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def streamed(self, stream: Stream, c: jax.Array, rope, kernels: str) -> Stream:
        """Compute the same by `kernels`, with RMSNorm, SwiGLU and one condition per image."""
        parts = [part[:, 0] for part in self.adaLN_modulation(c)]
        if self.wo_shift:
            scale_msa, gate_msa, scale_mlp, gate_mlp = parts
            shift_msa = shift_mlp = None
        else:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        common = dict(shift=shift_msa, scale=scale_msa)
        x, h = normed_for(self.attn.qkv, partial(self.norm1.streamed, stream), kernels, **common)
        y = self.attn.without_bias(h, rope, kernels)
        bias = self.attn.proj.bias
        assert bias is not None  # made with bias=True
        stream = Stream(x, y, gate_msa, bias[...])
        common = dict(shift=shift_mlp, scale=scale_mlp)
        x, h = normed_for(self.mlp.w12, partial(self.norm2.streamed, stream), kernels, **common)
        return Stream(x, gate=gate_mlp, **self.mlp.streamed(h, kernels))


class TimestepEmbedder(nnx.Module):
    """Sinusoid of t in [0, 1] (not scaled), 256 channels [cos | sin] -> Linear, SiLU, Linear."""

    def __init__(self, dim: int, *, channels: int = 256, dtype, rngs: nnx.Rngs):
        self.channels = channels
        make = partial(linear, bias=True, init=NORMAL, dtype=dtype, rngs=rngs)
        self.mlp = nnx.Dict({"0": make(channels, dim), "2": make(dim, dim)})

    def __call__(self, t: jax.Array) -> jax.Array:
        half = self.channels // 2
        frequencies = np.exp(-np.log(10_000.0) * np.arange(half, dtype=np.float32) / half)
        angles = t.astype(jnp.float32)[:, None] * frequencies
        sinusoid = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.mlp["2"](jax.nn.silu(self.mlp["0"](sinusoid)))


class FourierTimestepEmbedder(nnx.Module):
    """[sin | cos](2 pi t W) with fixed random frequencies W ~ N(0, 1) -> Linear, SiLU, Linear.

    The embedding of RAE (arXiv 2510.11690, released code), computed in fp32.
    """

    def __init__(self, dim: int, *, frequencies: int = 256, dtype, rngs: nnx.Rngs):
        self.W = Buffer(jax.random.normal(rngs.params(), (frequencies,), jnp.float32))
        make = partial(linear, bias=True, init=NORMAL, dtype=dtype, rngs=rngs)
        self.mlp = nnx.Dict({"0": make(2 * frequencies, dim), "2": make(dim, dim)})

    def __call__(self, t: jax.Array) -> jax.Array:
        angles = t.astype(jnp.float32)[:, None] * self.W[...] * (2 * np.pi)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return self.mlp["2"](jax.nn.silu(self.mlp["0"](waves)))


class LabelEmbedder(nnx.Module):
    """Embedding of the classes and, with ``null_class`` as the last row, of "no class"."""

    def __init__(self, num_classes: int, dim: int, *, null_class: bool, dtype, rngs: nnx.Rngs):
        self.embedding_table = nnx.Embed(
            num_classes + null_class, dim, embedding_init=NORMAL, dtype=dtype, rngs=rngs
        )

    def __call__(self, labels: jax.Array) -> jax.Array:
        return self.embedding_table(labels)


class FinalLayer(nnx.Module):
    """Modulated norm and a Linear to the patch's channels; starts at zero."""

    def __init__(self, dim: int, features_out: int, *, use_rmsnorm: bool, dtype, rngs: nnx.Rngs):
        self.norm_final = make_norm(dim, use_rmsnorm=use_rmsnorm, rngs=rngs)
        self.linear = linear(dim, features_out, bias=True, init=ZERO, dtype=dtype, rngs=rngs)
        self.adaLN_modulation = Modulation(dim, 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(self.norm_final(x), shift, scale))

    def streamed(self, stream: Stream, c: jax.Array, kernels: str) -> jax.Array:
        """Compute the same by `kernels`, with RMSNorm and one condition per image."""
        shift, scale = (part[:, 0] for part in self.adaLN_modulation(c))
        return self.linear(self.norm_final.streamed(stream, kernels, shift=shift, scale=scale)[1])


class LightningDiT(nnx.Module):
    """Velocity of the flow: (x [B, S, S, C], t [B], labels [B]) -> [B, S, S, C].

    t = 0 is noise, t = 1 is data. Label ``num_classes`` means "no class"; there is none, and thus
    no guidance, if ``class_dropout_prob`` is 0.

    Args:
      input_size: S, the edge of the latent grid.
      in_channels: C.
      patch_size: latent pixels per token edge.
      hidden_size, depth, num_heads, mlp_ratio: of the transformer.
      num_classes: classes, without the null class.
      class_dropout_prob: share of training labels replaced by the null class.
      use_qknorm: norm with weight on q and k.
      use_swiglu: SwiGLU of 2/3 the hidden width, or an MLP with the GELU of a tanh.
      use_rope: rotates q and k.
      use_rmsnorm: RMSNorm, or LayerNorm: with weight and bias on q and k only.
      wo_shift: modulation without shifts.
      use_abs_pos: adds the fixed position table; otherwise it stays zero.
      use_gembed: embeds t as RAE's LightningDiT does, `FourierTimestepEmbedder`.
      remat: of the blocks, as `layers.REMAT`.
      attention: how it is computed, as `attention.ATTENTIONS`.
      kernels: how norms, gates and SwiGLU are computed, as `kernels.KERNELS`.
    """

    def __init__(
        self,
        *,
        input_size: int = 16,
        in_channels: int = 32,
        patch_size: int = 1,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_abs_pos: bool = True,
        use_gembed: bool = False,
        remat: str = "none",
        attention: str = "xla",
        kernels: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernels = check_kernels(kernels)
        self.obstacle = None
        if not (use_swiglu and use_rmsnorm):
            self.obstacle = "there are kernels of RMSNorm and SwiGLU only"
        else:
            self.obstacle = swiglu_obstacle(int(2 / 3 * int(hidden_size * mlp_ratio)))
        self.patch_size, self.num_classes = patch_size, num_classes
        self.class_dropout_prob = class_dropout_prob
        self.use_rope, self.use_abs_pos = use_rope, use_abs_pos
        self.remat = check_remat(remat)
        grid = input_size // patch_size
        self.rope_shape = (grid, hidden_size // num_heads)
        common = dict(dtype=dtype, rngs=rngs)
        self.x_embedder = nnx.Dict(
            proj=PatchEmbed(in_channels, hidden_size, patch_size, bias=True, init=XAVIER, **common)
        )
        embedder = FourierTimestepEmbedder if use_gembed else TimestepEmbedder
        self.t_embedder = embedder(hidden_size, **common)
        self.y_embedder = LabelEmbedder(
            num_classes, hidden_size, null_class=class_dropout_prob > 0, **common
        )
        table = jnp.asarray(sincos_table(hidden_size, grid))[None]
        self.pos_embed = Buffer(table if use_abs_pos else jnp.zeros_like(table))
        self.blocks = nnx.List(
            DiTBlock(
                hidden_size,
                num_heads,
                mlp_ratio=mlp_ratio,
                use_qknorm=use_qknorm,
                use_swiglu=use_swiglu,
                use_rmsnorm=use_rmsnorm,
                wo_shift=wo_shift,
                attention=attention,
                **common,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            hidden_size, in_channels * patch_size**2, use_rmsnorm=use_rmsnorm, **common
        )

    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        tokens = self.x_embedder["proj"](x)
        if self.use_abs_pos:
            tokens = tokens + self.pos_embed[...].astype(tokens.dtype)
        c = (self.t_embedder(t) + self.y_embedder(labels))[:, None]
        rope = rope_table(*self.rope_shape) if self.use_rope else None
        if use_kernels(self.kernels, tokens.dtype, tokens.shape, self.obstacle):
            output = self._streamed(tokens, c, rope)
        else:
            for block in self.blocks:
                tokens = rematerialize(block, self.remat)(constrain(tokens), c, rope)
            output = self.final_layer(tokens, c)
        return unpatchify(output.astype(jnp.float32), self.patch_size)

    def _streamed(self, tokens: jax.Array, c: jax.Array, rope) -> jax.Array:
        stream = Stream(tokens)
        for block in self.blocks:
            call = rematerialize(
                block, self.remat, lambda block, *inputs: block.streamed(*inputs, self.kernels)
            )
            stream = call(stream.constrained(), c, rope)
        return self.final_layer.streamed(stream, c, self.kernels)

    def drop_labels(self, labels: jax.Array, key: jax.Array) -> jax.Array:
        """Replace the given share of training labels by the null class."""
        drop = jax.random.bernoulli(key, self.class_dropout_prob, labels.shape)
        return jnp.where(drop, self.num_classes, labels)
