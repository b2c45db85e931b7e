"""FAE, the feature autoencoder whose encoder is one attention layer (arXiv 2512.07829).

Tokens of a frozen backbone become the posterior of a small latent and come back; a second decoder
turns tokens into pixels. No code was released. Parameter counts are the paper's to the unit; what
it leaves open is marked as our choice.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn.attention import Attention, attention_implementation, check_attention
from gae_jax.nn.gaussian import LOGVAR_RANGE
from gae_jax.nn.layers import (
    LayerNorm,
    RMSNorm,
    check_remat,
    linear,
    rematerialize,
    rope_table,
    unpatchify,
)
from gae_jax.nn.mlp import FusedSwiGLU
from gae_jax.nn.vit import position_table
from gae_jax.pretrained.vision import VisionBlock
from gae_jax.runtime.mesh import constrain
from gae_jax.tokenizers.fae_kind import ENCODERS


class AttentionEncoder(nnx.Module):
    """moments(silu(attention(x) + skip(x))): tokens [B, N, C] -> [B, N, features_out].

    The heads are wider than the tokens, and the Linear that would follow the attention is merged
    into ``moments``. The paper names no activation, norm or positions: SiLU and none is our choice.
    """

    def __init__(
        self,
        dim: int,
        features_out: int,
        *,
        num_heads: int,
        head_dim: int,
        attention: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.attention = num_heads, check_attention(attention)
        inner = num_heads * head_dim
        make = partial(linear, bias=True, dtype=dtype, rngs=rngs)
        self.qkv = make(dim, 3 * inner)
        self.skip = make(dim, inner)
        self.moments = make(inner, features_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = rearrange(self.qkv(x), "b n (t h d) -> t b n h d", t=3, h=self.num_heads)
        implementation = attention_implementation(self.attention, v.dtype, v.shape[-1])
        attended = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        attended = rearrange(attended, "b n h d -> b n (h d)")
        return self.moments(jax.nn.silu(attended + self.skip(x)))


class FeatureBlock(nnx.Module):
    """x += attn(norm1 x); x += mlp(norm2 x), with RMSNorm, RoPE, SwiGLU and biases."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, *, attention: str, dtype, rngs: nnx.Rngs
    ):
        common = dict(dtype=dtype, rngs=rngs)
        self.norm1 = RMSNorm(dim, rngs=rngs)
        self.attn = Attention(
            dim, num_heads, qk_norm=None, bias=True, attention=attention, **common
        )
        self.norm2 = RMSNorm(dim, rngs=rngs)
        self.mlp = FusedSwiGLU(dim, hidden, **common)

    def __call__(self, x: jax.Array, rope) -> jax.Array:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class FeatureDecoder(nnx.Module):
    """Latent tokens [B, N, latent_dim] -> features [B, N, C]; the last norm is the way out."""

    def __init__(
        self,
        latent_dim: int,
        dim: int,
        *,
        num_patches: int,
        depth: int,
        num_heads: int,
        hidden: int,
        remat: str,
        attention: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.remat = check_remat(remat)
        self.rope_shape = (math.isqrt(num_patches), dim // num_heads)
        common = dict(dtype=dtype, rngs=rngs)
        self.z_proj = linear(latent_dim, dim, bias=True, **common)
        self.pos_embed = position_table(rngs, num_patches, dim)
        self.blocks = nnx.List(
            FeatureBlock(dim, num_heads, hidden, attention=attention, **common)
            for _ in range(depth)
        )
        self.norm = RMSNorm(dim, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.z_proj(z)
        x = x + self.pos_embed[...].astype(x.dtype)
        rope = rope_table(*self.rope_shape)
        for block in self.blocks:
            x = rematerialize(block, self.remat)(constrain(x), rope)
        return self.norm(x)


class FeatureAutoencoder(nnx.Module):
    """Features [B, N, C] of a frozen backbone <-> a diagonal Gaussian of latents [B, N, d].

    Trained by mse + beta * `losses.gaussian_kl`. The defaults are the paper's for DINOv2-g.

    Args:
      feature_dim: C.
      latent_dim: d, channels of the latent; the paper has 32, 48 and 64.
      num_patches: N, a square number.
      encoder: a name in `ENCODERS`.
      encoder_heads, encoder_head_dim: of the encoder "attention".
      decoder_depth, decoder_heads, decoder_hidden: blocks of the feature decoder, their attention
        heads and the width inside their SwiGLU.
      remat: of the decoder's blocks, as `layers.REMAT`.
      attention: how it is computed, as `attention.ATTENTIONS`; cuDNN has no heads as wide as the
        encoder's, so not "cudnn" with the defaults.

    Raises:
      ValueError: for an unknown encoder, or patches that form no square.
    """

    def __init__(
        self,
        *,
        feature_dim: int = 1536,
        latent_dim: int = 32,
        num_patches: int = 256,
        encoder: str = "attention",
        encoder_heads: int = 24,
        encoder_head_dim: int = 256,
        decoder_depth: int = 6,
        decoder_heads: int = 24,
        decoder_hidden: int = 4096,
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if encoder not in ENCODERS:
            raise ValueError(f"encoder is {encoder!r}; use one of {', '.join(ENCODERS)}")
        if math.isqrt(num_patches) ** 2 != num_patches:
            raise ValueError(f"num_patches is {num_patches}, which is not a square number")
        common = dict(dtype=dtype, rngs=rngs)
        self.encoder: AttentionEncoder | nnx.Linear
        if encoder == "attention":
            self.encoder = AttentionEncoder(
                feature_dim,
                2 * latent_dim,
                num_heads=encoder_heads,
                head_dim=encoder_head_dim,
                attention=attention,
                **common,
            )
        else:
            self.encoder = linear(feature_dim, 2 * latent_dim, bias=True, **common)
        self.decoder = FeatureDecoder(
            latent_dim,
            feature_dim,
            num_patches=num_patches,
            depth=decoder_depth,
            num_heads=decoder_heads,
            hidden=decoder_hidden,
            remat=remat,
            attention=attention,
            **common,
        )

    def encode(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (means, clamped log-variances) [B, N, latent_dim] in fp32."""
        mean, logvar = jnp.split(self.encoder(features).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def sample(self, mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
        """Sample from the posterior of `encode`."""
        return mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)

    def reconstruct(self, latents: jax.Array) -> jax.Array:
        """Decode latents [B, N, latent_dim] -> features [B, N, C] in fp32."""
        return self.decoder(latents).astype(jnp.float32)


class PixelDecoder(nnx.Module):
    """Features [B, N, C] -> images [B, S, S, 3] in fp32, unbounded: a ViT-L with SwiGLU.

    The paper says ViT-L; norms, hidden width and biases follow from its parameter count.

    Args:
      feature_dim: C.
      num_patches, patch_size: N and pixels per token edge; S = sqrt(N) * patch_size.
      embed_dim, depth, num_heads, hidden: of the transformer; ``hidden`` inside the SwiGLU.
      remat: of the blocks, as `layers.REMAT`.
    """

    def __init__(
        self,
        *,
        feature_dim: int = 1536,
        num_patches: int = 256,
        patch_size: int = 16,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        hidden: int = 2736,
        remat: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.remat = patch_size, check_remat(remat)
        common = dict(dtype=dtype, rngs=rngs)
        self.z_proj = linear(feature_dim, embed_dim, bias=True, **common)
        self.pos_embed = position_table(rngs, num_patches, embed_dim)
        self.blocks = nnx.List(
            VisionBlock(embed_dim, num_heads, hidden, eps=1e-6, swiglu=True, **common)
            for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim, eps=1e-6, rngs=rngs)
        self.linear_out = linear(embed_dim, 3 * patch_size**2, bias=True, **common)

    def hidden(self, features: jax.Array) -> jax.Array:
        """Compute the normalised tokens [B, N, embed_dim] that enter `linear_out`."""
        x = self.z_proj(features)
        x = x + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = rematerialize(block, self.remat)(constrain(x))
        return self.norm(x)

    def images(self, hidden: jax.Array) -> jax.Array:
        """Apply the last layer to `hidden`, in fp32."""
        return unpatchify(self.linear_out(hidden).astype(jnp.float32), self.patch_size)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.images(self.hidden(features))
