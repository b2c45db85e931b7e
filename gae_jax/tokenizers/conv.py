"""KL-VAE and VA-VAE: the convolutional autoencoder with a Gaussian of the latents.

arXiv 2112.10752 (Stable Diffusion's, f8) and 2501.01423 (VA-VAE, f16, whose alignment is
`losses.vf_loss` on a Linear of the latents: align.point="post", align.loss="vf").
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer
from gae_jax.tokenizers.conv_kind import PRESETS, factor
from gae_jax.tokenizers.conv_vae import ConvDecoder, ConvEncoder


class ConvTokenizer(Tokenizer):
    """Images [B, S, S, 3] in [-1, 1] <-> latents [B, S/f, S/f, embed_dim], f = 2^(levels - 1).

    Training decodes a sample of the Gaussian; `encode` gives its mean.

    Args:
      image_size: S, in pixels.
      ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels, embed_dim: of both
        halves, as `ConvEncoder` and `ConvDecoder`.
      remat: of the blocks, as `layers.REMAT`.
      dtype: of the activations.

    Raises:
      ValueError: if f does not divide the images.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        ch: int = 128,
        ch_mult=PRESETS["vavae"]["ch_mult"],
        num_res_blocks: int = 2,
        attn_resolutions=PRESETS["vavae"]["attn_resolutions"],
        resolution: int = 256,
        z_channels: int = 32,
        embed_dim: int = 32,
        remat: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        grid = image_size // factor(ch_mult, image_size)
        self.image_size = image_size
        self.latent_shape = (grid, grid, embed_dim)
        sizes = dict(
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            resolution=resolution,
            z_channels=z_channels,
            embed_dim=embed_dim,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.encoder, self.decoder = ConvEncoder(**sizes), ConvDecoder(**sizes)

    def encode_all(self, images: jax.Array) -> Encoded:
        """Return the Gaussian of the latents; there are no features."""
        return Encoded(*self.encoder(images), features=None)

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Decode latents -> images in fp32, about [-1, 1]; deterministic, ``keys`` are ignored."""
        del keys
        return self.decoder(latents)

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...], mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """Run the training pass, which decodes a sample of the Gaussian."""
        del terms, mode
        posterior = self.encoder(images)
        hidden = self.decoder.hidden(posterior.sample(key))
        decoded = Decoded(self.decoder.images(hidden), hidden, {})
        return Encoded(*posterior, features=None), decoded

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute the gradient at the kernel of the last convolution from that at the images."""
        return self.decoder.at_last_layer(hidden, gradient)
