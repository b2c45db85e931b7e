"""The teacher of PAE's stage 0, the prior refinement (arXiv 2605.07915).

A projector P_t brings the frozen encoder's tokens to latents whose Gram matrix follows a target,
while a small transformer Q_t keeps them able to give the tokens back. P_t then teaches PAE's
latents. The stage is not released and was read second hand: Q_t has 4 layers of width 1024; that
P_t is laid out as PAE's own projector, and how Q_t begins and ends, is ours.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn.layers import Buffer, LayerNorm, linear, sincos_table
from gae_jax.nn.torch_init import start_as_torch
from gae_jax.pretrained.vision import VisionBlock
from gae_jax.runtime.mesh import constrain
from gae_jax.tokenizers.pae_networks import Projector, conv3x3

EPS = 1e-12  # of Q_t's norms, as in PAE's decoder


class PriorTeacher(Projector):
    """P_t and Q_t; the encoder stays outside. They take its tokens as PAE does: the last norm
    without weight and bias, of images resized without antialias.

    P_t's attributes are called as those of PAE's projector, which may start from it.

    Args:
      feature_dim: width C of the encoder's tokens, and of Q_t.
      latent_dim: channels d of the latents.
      decoder_layers: blocks of Q_t.
      num_patches: tokens N of the encoder, a square number.
      heads: attention heads of both.
    """

    takes: ClassVar[dict] = dict(affine=False, antialias=False)

    def __init__(
        self,
        *,
        feature_dim: int,
        latent_dim: int,
        decoder_layers: int,
        num_patches: int,
        heads: int,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        super().__init__(hidden_size=feature_dim, num_heads=heads, latent_dim=latent_dim, **common)
        grid = round(num_patches**0.5)
        if grid**2 != num_patches:
            raise ValueError(f"teacher: {num_patches} patches do not form a square grid")
        self.latent_decompressor = nnx.List([conv3x3(latent_dim, feature_dim, **common)])
        self.pos_embed_dec = Buffer(jnp.asarray(sincos_table(feature_dim, grid))[None])
        self.decoder_layers = nnx.List(
            VisionBlock(feature_dim, heads, 4 * feature_dim, eps=EPS, **common)
            for _ in range(decoder_layers)
        )
        self.decoder_norm = LayerNorm(feature_dim, eps=EPS, rngs=rngs)
        self.recon_head = linear(feature_dim, feature_dim, bias=True, **common)
        start_as_torch(self, rngs)

    def downsample(self, features: jax.Array) -> jax.Array:
        """Map tokens [B, N, C] -> latents [B, N, d] with mean square 1, in fp32."""
        return rearrange(self.compress(features), "b h w d -> b (h w) d")

    def reconstruct(self, latents: jax.Array) -> jax.Array:
        """Map latents [B, N, d] -> tokens [B, N, C] in fp32."""
        grid = round(latents.shape[1] ** 0.5)
        (conv,) = self.latent_decompressor
        x = conv(rearrange(latents, "b (h w) d -> b h w d", h=grid))
        x = rearrange(x, "b h w c -> b (h w) c")
        x = x + self.pos_embed_dec[...].astype(x.dtype)
        for block in self.decoder_layers:
            x = block(constrain(x))
        return self.recon_head(self.decoder_norm(x)).astype(jnp.float32)
