"""KL-VAE and VA-VAE: the convolutional autoencoder with a Gaussian of the latents.

arXiv 2112.10752 (Stable Diffusion's, f8) and 2501.01423 (VA-VAE, f16, whose alignment is
`losses.vf_loss` on a Linear of the latents: align.point="post", align.loss="vf").
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.gaussian import DiagonalGaussian
from gae_jax.tokenizers.base import Decoded, Encoded, Kind
from gae_jax.tokenizers.conv_vae import PRESETS, ConvDecoder, ConvEncoder


class ConvTokenizer(nnx.Module):
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

    def encode(self, images: jax.Array) -> jax.Array:
        """Images -> means [B, h, w, embed_dim] in fp32."""
        return self.encode_all(images).latents

    def encode_all(self, images: jax.Array) -> Encoded:
        """The Gaussian of the latents; there are no features."""
        return Encoded(*self.encoder(images), features=None)

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Latents -> images in fp32, about [-1, 1]; nothing random, ``keys`` are not read."""
        del keys
        return self.decoder(latents)

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...], mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """The training pass: a sample of the Gaussian is decoded."""
        del terms, mode
        encoded = self.encode_all(images)
        sample = DiagonalGaussian(encoded.latents, encoded.logvar).sample(key)
        hidden = self.decoder.hidden(sample)
        return encoded, Decoded(self.decoder.images(hidden), hidden, {})

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """The gradient at the kernel of the last convolution, from that at the images."""
        return self.decoder.at_last_layer(hidden, gradient)


def factor(ch_mult, image_size: int) -> int:
    """f of a convolutional network with these levels; ValueError if it divides no image."""
    f = 2 ** (len(ch_mult) - 1)
    if image_size % f:
        raise ValueError(
            f"ch_mult has {len(ch_mult)} levels, which shrink images {f} times, but "
            f"data.image_size is {image_size}; use a multiple of {f} or fewer levels"
        )
    return f


def sizes() -> dict:
    """The section ``tokenizer.conv``: VA-VAE's sizes; `PRESETS` has Stable Diffusion's too."""
    return dict(
        ch=128,  # [code]
        ch_mult=(1, 1, 2, 2, 4),  # [code] f = 2^(levels - 1)
        num_res_blocks=2,  # [code]
        # [code] edges of maps with attention, for images of resolution pixels
        attn_resolutions=(16,),
        resolution=256,  # [code]
        z_channels=32,  # [code] between the networks and the 1x1 convolutions at the latent
        embed_dim=32,  # [code] channels of the latent
    )


def build(section, backbone, *, image_size, dtype, remat, attention, rngs) -> ConvTokenizer:
    """``attention`` is not read: that of maps with one wide head is XLA's."""
    del backbone, attention
    return ConvTokenizer(**section, image_size=image_size, dtype=dtype, remat=remat, rngs=rngs)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """(h, w, d) of the latents."""
    del backbone
    grid = image_size // factor(section["ch_mult"], image_size)
    return grid, grid, section["embed_dim"]


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=("l1", "perceptual", "gan", "align", "kl"),
    encoder_last="encoder/encoder/conv_out/kernel",
)
