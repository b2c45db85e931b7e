"""The decoder of RAE (arXiv 2510.11690) and PAE (arXiv 2605.07915): MAE's, with its own CLS token.

Arguments and attributes are named as in the released GeneralDecoder, which both share.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from flax import nnx

from gae_jax.nn.layers import (
    Buffer,
    LayerNorm,
    check_remat,
    linear,
    rematerialize,
    sincos_table,
    unpatchify,
)
from gae_jax.nn.torch_init import start_as_torch
from gae_jax.pretrained.vision import VisionBlock
from gae_jax.runtime.mesh import constrain


class GeneralDecoder(nnx.Module):
    """ViT decoder: tokens [B, M, hidden_size] -> patches of an image, normalised as the encoder's.

    Args:
      hidden_size: width of the tokens that come in.
      decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads,
        decoder_intermediate_size: of the transformer, as `rae_kind.DECODERS`.
      image_size, patch_size: of the image that comes out, in pixels; tokens of another square
        grid than (image_size / patch_size)^2 are resized to it.
      layer_norm_eps: of all norms.
      remat: of the blocks, as `layers.REMAT`.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 1024,
        decoder_hidden_size: int = 1024,
        decoder_num_hidden_layers: int = 24,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 4096,
        image_size: int = 256,
        patch_size: int = 16,
        num_channels: int = 3,
        layer_norm_eps: float = 1e-12,
        remat: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        self.grid, self.patch_size = image_size // patch_size, patch_size
        self.remat = check_remat(remat)
        width = decoder_hidden_size
        self.decoder_embed = linear(hidden_size, width, bias=True, dtype=dtype, rngs=rngs)
        self.trainable_cls_token = nnx.Param(jnp.zeros((1, 1, width), jnp.float32))
        patches = sincos_table(width, self.grid)
        table = np.concatenate([np.zeros_like(patches[:1]), patches])  # CLS has position 0
        self.decoder_pos_embed = Buffer(jnp.asarray(table)[None])
        self.decoder_layers = nnx.List(
            VisionBlock(
                width,
                decoder_num_attention_heads,
                decoder_intermediate_size,
                eps=layer_norm_eps,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(decoder_num_hidden_layers)
        )
        self.decoder_norm = LayerNorm(width, eps=layer_norm_eps, rngs=rngs)
        self.decoder_pred = linear(
            width, patch_size**2 * num_channels, bias=True, dtype=dtype, rngs=rngs
        )
        start_as_torch(self, rngs)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Compute the input of the last layer `decoder_pred`: [B, N, decoder_hidden_size], no CLS.

        Raises:
          ValueError: unless the tokens are those of a square grid.
        """
        x = self._to_grid(self.decoder_embed(tokens))
        cls = repeat(self.trainable_cls_token[...].astype(x.dtype), "1 1 c -> b 1 c", b=len(x))
        x = jnp.concatenate([cls, x], axis=1) + self.decoder_pos_embed[...].astype(x.dtype)
        for block in self.decoder_layers:
            x = rematerialize(block, self.remat)(constrain(x))
        return self.decoder_norm(x)[:, 1:]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Decode tokens -> patches [B, N, p*p*channels] in fp32; as `hidden`."""
        return self.decoder_pred(self.hidden(tokens)).astype(jnp.float32)

    def unpatchify(self, patches: jax.Array) -> jax.Array:
        """Join patches [B, N, p*p*channels] into images [B, S, S, channels]."""
        return unpatchify(patches, self.patch_size)

    def _to_grid(self, x: jax.Array) -> jax.Array:
        """Resize tokens of any square grid to the decoder's: bilinear, edges repeated."""
        batch, count, width = x.shape
        if count == self.grid**2:
            return x
        side = math.isqrt(count)
        if side**2 != count:
            raise ValueError(
                f"the decoder takes tokens of a square grid, got {count}; leave out those that are "
                "no patches, such as CLS"
            )
        x = jax.image.resize(
            x.reshape(batch, side, side, width),
            (batch, self.grid, self.grid, width),
            "bilinear",
            antialias=False,
        )
        return x.reshape(batch, self.grid**2, width)
