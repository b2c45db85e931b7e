"""AlignTok (arXiv 2509.25162): a foundation encoder that becomes a tokenizer.

Three phases, which the config holds: adapter and decoder on the frozen encoder; everything, held
near the latents that the tokenizer had when that began (align.target="snapshot"); the decoder
alone. No code is released: what the paper leaves open is tagged in `sizes`.

With ``lora.rank`` the encoder stays, and low-rank updates of its layers learn instead: the
paper's LoRA arm.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn import vit
from gae_jax.nn.layers import freeze, linear
from gae_jax.nn.lora import check_lora, with_lora
from gae_jax.pretrained.base import Backbone
from gae_jax.tokenizers.aligntok_kind import pixels_per_token
from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer, at_linear
from gae_jax.tokenizers.conv_vae import ConvDecoder


class Adapter(nnx.Module):
    """fc2(gelu(fc1 x)) from the encoder's width to that of the latents, token by token."""

    def __init__(self, dim: int, hidden: int, latent_dim: int, *, dtype, rngs: nnx.Rngs):
        self.fc1 = linear(dim, hidden, bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, latent_dim, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Project tokens [B, N, dim] -> [B, N, latent_dim]."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class ViTDecoder(vit.Decoder):
    """The decoder of GAE on maps of latents [B, h, w, d], instead of the paper's decoder."""

    def hidden(self, latents: jax.Array) -> jax.Array:
        """Compute the tokens [B, N, embed_dim] that enter the last layer."""
        return super().hidden(rearrange(latents, "b h w d -> b (h w) d"))

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute the gradient at the kernel of `linear_out` from that at the images."""
        return at_linear(hidden, gradient, self.patch_size)


class AlignTok(Tokenizer):
    """Images [B, S, S, 3] in [-1, 1] <-> latents [B, h, w, latent_dim], without noise.

    The latent is the adapter's output on the encoder's normalised patch tokens.

    Args:
      encoder: a backbone, as `pretrained.backbone`; it learns, or with ``lora`` its updates do.
      image_size: S, in pixels.
      latent_dim: channels of the latent.
      hidden: of the adapter.
      decoder: "conv", VA-VAE's, or "vit", GAE's.
      conv: sizes of the former: ch, ch_mult, num_res_blocks, attn_resolutions and resolution, as
        `ConvDecoder`.
      vit: sizes of the latter: embed_dim, num_layers, num_heads and mlp_ratio, as `vit.Decoder`.
      lora: rank, alpha and layers of the updates, as `with_lora`; None or a rank of 0: none.
      remat: of the decoder's blocks, as `layers.REMAT`.
      attention: of the "vit" decoder, as `attention.ATTENTIONS`.
      dtype: of the activations of adapter and decoder.

    Raises:
      ValueError: for a decoder of another name, if its images are not of ``image_size``, or for
        LoRA that the encoder cannot have.
    """

    def __init__(
        self,
        encoder: Backbone,
        *,
        image_size: int,
        latent_dim: int = 32,
        hidden: int = 1024,
        decoder: str = "conv",
        conv: Mapping | None = None,
        vit: Mapping | None = None,
        lora: Mapping | None = None,
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        grid = encoder.grid
        patch = pixels_per_token(grid, image_size, decoder, conv or {})
        self.latent_shape = (grid, grid, latent_dim)
        self.encoder = encoder
        common = dict(dtype=dtype, rngs=rngs)
        self.adapter = Adapter(encoder.width, hidden, latent_dim, **common)
        self.decoder: ConvDecoder | ViTDecoder
        if decoder == "conv":
            self.decoder = ConvDecoder(
                **(conv or {}),
                z_channels=latent_dim,
                embed_dim=latent_dim,
                post_quant=False,
                remat=remat,
                **common,
            )
        else:
            self.decoder = ViTDecoder(
                image_size=image_size,
                patch_size=patch,
                latent_dim=latent_dim,
                **(vit or {}),
                attention=attention,
                remat=remat,
                **common,
            )
        if lora and lora["rank"]:
            check_lora(**lora, width=encoder.width)
            # last, so that all the rest starts as it does without
            self.encoder = with_lora(freeze(encoder), **lora, rngs=rngs)

    def encode_all(self, images: jax.Array) -> Encoded:
        """Encode images: latents [B, h, w, d] and the tokens before the adapter [B, N, width]."""
        features = self.encoder.features(images)
        tokens = self.adapter(features).astype(jnp.float32)
        latents = rearrange(tokens, "b (h w) d -> b h w d", h=self.latent_shape[0])
        return Encoded(latents, None, features.astype(jnp.float32))

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Decode latents -> images in fp32, about [-1, 1]; deterministic, ``keys`` are ignored."""
        del keys
        return self.decoder(latents)

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...], mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """Run the training pass: `encode_all` and decoding, without perturbation."""
        del key, terms, mode
        encoded = self.encode_all(images)
        hidden = self.decoder.hidden(encoded.latents)
        return encoded, Decoded(self.decoder.images(hidden), hidden, {})

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute the gradient at the decoder's last kernel from that at the images."""
        return self.decoder.at_last_layer(hidden, gradient)
