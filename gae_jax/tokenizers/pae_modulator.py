"""The modulator of PAE (arXiv 2605.07915): an image's details in a frozen encoder's tokens.

Attributes are named as in the released DeltaEncoder.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn.attention import Attention, attention_implementation, check_attention
from gae_jax.nn.layers import (
    Buffer,
    LayerNorm,
    Mlp,
    check_remat,
    linear,
    rematerialize,
    sincos_table,
    torch_uniform,
)
from gae_jax.nn.torch_init import start_as_torch
from gae_jax.nn.vit import PatchEmbed
from gae_jax.runtime.mesh import constrain
from gae_jax.tokenizers.pae_kind import FUSIONS

EPS = 1e-5  # of the modulator's norms, PyTorch's default


class CrossAttention(nnx.Module):
    """Multi-head cross-attention with separate query, key and value layers."""

    def __init__(self, dim: int, num_heads: int, *, attention="xla", dtype, rngs: nnx.Rngs):
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads, self.attention = num_heads, check_attention(attention)
        make = partial(linear, dim, dim, bias=True, dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.proj = make(), make(), make(), make()

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """[B, N, C], [B, M, C] -> [B, N, C]."""
        q, k, v = (
            rearrange(project(tokens), "b n (h d) -> b n h d", h=self.num_heads)
            for project, tokens in (
                (self.q_proj, x),
                (self.k_proj, context),
                (self.v_proj, context),
            )
        )
        implementation = attention_implementation(self.attention, v.dtype, v.shape[-1])
        out = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        return self.proj(rearrange(out, "b n h d -> b n (h d)"))


class DeltaLayer(nnx.Module):
    """x += self_attn(norm1 x); x += cross_attn(norm2_q x, norm2_kv u); x += mlp(norm3 x)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        norm = partial(LayerNorm, dim, eps=EPS, rngs=rngs)
        common = dict(attention=attention, dtype=dtype, rngs=rngs)
        self.norm1 = norm()
        self.self_attn = Attention(dim, num_heads, qk_norm=None, bias=True, **common)
        self.norm2_q, self.norm2_kv = norm(), norm()
        self.cross_attn = CrossAttention(dim, num_heads, **common)
        self.norm3 = norm()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, u: jax.Array) -> jax.Array:
        """[B, N, C], [B, N, C] -> [B, N, C]."""
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2_q(x), self.norm2_kv(u))
        return x + self.mlp(self.norm3(x))


class DeltaEncoder(nnx.Module):
    """Detail-aware modulator: details of the image, written into the encoder's tokens.

    Args:
      dim, num_heads: of the transformer, as the encoder's.
      img_size, patch_size: as the encoder's, in pixels.
      depth: layers.
      mlp_ratio: hidden width of the MLPs over dim.
      fusion_mode: a name in `FUSIONS`.
      remat: of the layers, as `layers.REMAT`.
      attention: how it is computed, as `attention.ATTENTIONS`.
    """

    def __init__(
        self,
        *,
        dim: int = 1024,
        num_heads: int = 16,
        img_size: int = 224,
        patch_size: int = 14,
        depth: int = 6,
        mlp_ratio: float = 4.0,
        fusion_mode: str = "sft",
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if fusion_mode not in FUSIONS:
            raise ValueError(f"fusion_mode is {fusion_mode!r}; use one of {', '.join(FUSIONS)}")
        self.fusion_mode, self.remat = fusion_mode, check_remat(remat)
        self.patch_embed = PatchEmbed(
            3, dim, patch_size, bias=True, init=torch_uniform(), dtype=dtype, rngs=rngs
        )
        table = sincos_table(dim, img_size // patch_size)
        self.pos_embed = Buffer(jnp.asarray(table)[None])
        self.layers = nnx.List(
            DeltaLayer(
                dim, num_heads, mlp_ratio=mlp_ratio, attention=attention, dtype=dtype, rngs=rngs
            )
            for _ in range(depth)
        )
        if fusion_mode != "none":
            ways_in, ways_out = {"sft": (1, 2), "add": (1, 1), "concat": (2, 1)}[fusion_mode]
            self.fusion_proj = linear(
                ways_in * dim, ways_out * dim, bias=True, dtype=dtype, rngs=rngs
            )
            self.final_ln = LayerNorm(dim, eps=EPS, rngs=rngs)
        start_as_torch(self, rngs)
        if fusion_mode in ("sft", "add"):  # it starts as the encoder alone
            for parameter in (self.fusion_proj.kernel, self.fusion_proj.bias):
                if parameter is not None:
                    parameter.set_value(jnp.zeros_like(parameter[...]))

    def __call__(self, pixel_values: jax.Array, vfm_tokens: jax.Array) -> jax.Array:
        """Modulate the encoder's tokens by images [B, S, S, 3], normalised as for it -> [B, N, C].

        Raises:
          ValueError: unless both have the same number of tokens as the position table.
        """
        x = self.patch_embed(pixel_values)
        if not x.shape[1] == vfm_tokens.shape[1] == self.pos_embed.shape[1]:
            raise ValueError(
                f"the modulator takes {self.pos_embed.shape[1]} tokens of image and encoder each, "
                f"got {x.shape[1]} and {vfm_tokens.shape[1]}; build it with the encoder's "
                "img_size and patch_size"
            )
        x = x + self.pos_embed[...].astype(x.dtype)
        u = vfm_tokens.astype(x.dtype)
        for layer in self.layers:
            x = rematerialize(layer, self.remat)(constrain(x), u)
        if self.fusion_mode == "none":
            return x
        if self.fusion_mode == "concat":
            return self.final_ln(self.fusion_proj(jnp.concatenate([u, x], axis=-1)))
        x = self.fusion_proj(x)
        if self.fusion_mode == "add":
            return self.final_ln(u + x)
        gamma, beta = jnp.split(x, 2, axis=-1)
        return self.final_ln(u * (1 + gamma) + beta)
