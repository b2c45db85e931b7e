"""The semantic teacher: a learned downsampler on top of a frozen vision backbone.

Algorithm 1 of GAE: an attention layer over the backbone's tokens, then one Linear per window
that mixes its tokens down to ``latent_dim`` channels each. A feature decoder trains it to keep
what the backbone sees, and is then dropped.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.models.gae import Block, position_table
from gae_jax.models.layers import Attention, linear, rms_norm

# The paper's teachers over DINOv2-L and 256 patches, as arguments of `SemanticTeacher`.
_LARGE = dict(feature_dim=1024, decoder_layers=4, num_patches=256, window_size=4, heads=16)
SIZES = {f"L_d{latent_dim}": dict(latent_dim=latent_dim, **_LARGE) for latent_dim in (32, 64)}


def to_windows(x: jax.Array, window: int) -> jax.Array:
    """[B, N, C] on a square grid -> [B, windows, window^2 * C], row-major inside a window."""
    grid = math.isqrt(x.shape[1])
    return rearrange(
        x,
        "b (h p w q) c -> b (h w) (p q c)",
        h=grid // window,
        p=window,
        w=grid // window,
        q=window,
    )


def from_windows(x: jax.Array, window: int, grid: int) -> jax.Array:
    """[B, windows, window^2 * D] -> [B, grid^2, D]; the inverse of `to_windows`."""
    return rearrange(x, "b (h w) (p q d) -> b (h p w q) d", h=grid // window, p=window, q=window)


class SemanticTeacher(nnx.Module):
    """Downsampler and feature decoder; the backbone stays outside.

    Args:
      feature_dim: width C of the backbone's tokens.
      latent_dim: channels d of the semantic latent.
      decoder_layers: blocks of the feature decoder.
      num_patches: tokens N of the backbone, a square number.
      window_size: edge w of the windows; must divide the grid.
      heads: attention heads.
    """

    def __init__(
        self,
        *,
        feature_dim: int,
        latent_dim: int,
        decoder_layers: int,
        num_patches: int,
        window_size: int,
        heads: int,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.window_size, self.grid = window_size, math.isqrt(num_patches)
        if self.grid**2 != num_patches or self.grid % window_size:
            raise ValueError(
                f"teacher: {num_patches} patches do not form a square grid that windows of "
                f"{window_size} x {window_size} tile"
            )
        make = partial(linear, dtype=dtype, rngs=rngs)
        area = window_size**2
        self.pos_embed_pro = position_table(rngs, num_patches, feature_dim)
        self.projector_block = nnx.Dict(attn=Attention(feature_dim, heads, dtype=dtype, rngs=rngs))
        self.to_latent = make(area * feature_dim, area * latent_dim)
        self.recon_head = make(latent_dim, feature_dim)
        self.pos_embed_dec = position_table(rngs, num_patches, feature_dim)
        self.decoder_layers = nnx.List(
            Block(feature_dim, heads, dtype=dtype, rngs=rngs) for _ in range(decoder_layers)
        )

    def downsample(self, features: jax.Array) -> jax.Array:
        """Backbone tokens [B, N, C] -> semantic latents [B, N, d] with mean square 1."""
        x = rms_norm(features)
        x = x + self.pos_embed_pro[...].astype(x.dtype)
        x = rms_norm(self.projector_block["attn"](rms_norm(x)))
        x = self.to_latent(to_windows(x, self.window_size))
        return rms_norm(from_windows(x, self.window_size, self.grid))

    def reconstruct(self, latents: jax.Array) -> jax.Array:
        """Semantic latents [B, N, d] -> features [B, N, C] with mean square 1."""
        x = self.recon_head(latents)
        x = x + self.pos_embed_dec[...].astype(x.dtype)
        for block in self.decoder_layers:
            x = block(x)
        return rms_norm(x)
