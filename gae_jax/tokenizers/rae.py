"""RAE (arXiv 2510.11690): the tokens of a frozen backbone are the latents; a decoder learns."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from gae_jax.nn.layers import freeze
from gae_jax.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.pretrained.backbone import ViTBackbone
from gae_jax.pretrained.base import Backbone
from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer, at_linear
from gae_jax.tokenizers.mae_decoder import GeneralDecoder
from gae_jax.tokenizers.rae_kind import NOISES


class RAE(Tokenizer):
    """Images [B, S, S, 3] in [-1, 1] <-> the tokens [B, h, w, C] of a frozen backbone.

    Each token has mean 0 and variance 1 over its channels: the backbone's last LayerNorm without
    weight and bias. The backbone sees images resized by a bicubic without antialias. Training
    decodes z + sigma n with one sigma per image. Attributes are `encoder` and `decoder`.

    Args:
      image_size: S.
      backbone: makes the backbone from ``rngs``.
      patch_size: of the decoder; with other than S / h its tokens are resized to its grid.
      decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads,
        decoder_intermediate_size: as `GeneralDecoder`, and as its `rae_kind.DECODERS`.
      noise_tau: the largest sigma, or its scale; 0 trains without noise.
      noise: law of sigma, a name in `NOISES`.
      remat, dtype: of the decoder; the backbone has its own.
      attention: "xla" or "auto": the decoder's blocks know no other than XLA's.

    Raises:
      ValueError: for an unknown law or a negative tau.
    """

    def __init__(
        self,
        *,
        image_size: int,
        backbone: Callable[[nnx.Rngs], Backbone],
        patch_size: int = 16,
        decoder_hidden_size: int = 1152,
        decoder_num_hidden_layers: int = 28,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 4096,
        noise_tau: float = 0.8,
        noise: str = "uniform",
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if noise not in NOISES:
            raise ValueError(f"noise is {noise!r}; use one of {', '.join(NOISES)}")
        if noise_tau < 0:
            raise ValueError(f"noise_tau is {noise_tau}; it must be >= 0 (0: no noise)")
        del attention
        self.encoder = freeze(backbone(rngs))
        self.latent_shape = (self.encoder.grid, self.encoder.grid, self.encoder.width)
        self.noise_tau, self.noise = noise_tau, noise
        self.decoder = GeneralDecoder(
            hidden_size=self.encoder.width,
            decoder_hidden_size=decoder_hidden_size,
            decoder_num_hidden_layers=decoder_num_hidden_layers,
            decoder_num_attention_heads=decoder_num_attention_heads,
            decoder_intermediate_size=decoder_intermediate_size,
            image_size=image_size,
            patch_size=patch_size,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )

    def encode_all(self, images: jax.Array) -> Encoded:
        """Encode images: latents [B, h, w, d], and the same as tokens [B, N, C]."""
        tokens = self.encoder.features(images, affine=False, antialias=False)
        tokens = jax.lax.stop_gradient(tokens).astype(jnp.float32)
        latents = rearrange(tokens, "b (h w) c -> b h w c", h=self.latent_shape[0])
        return Encoded(latents, None, tokens)

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Decode latents -> images [B, S, S, 3] in fp32, about [-1, 1]; deterministic."""
        del keys
        return self._images(latents)[0]

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...], mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """Run the training pass, which decodes latents with noise."""
        del terms, mode
        encoded = self.encode_all(images)
        return encoded, Decoded(*self._images(self.perturbed(encoded.latents, key)), {})

    def perturbed(self, latents: jax.Array, key: jax.Array) -> jax.Array:
        """Return z + sigma n, with one sigma for each image and n ~ N(0, I)."""
        scale_key, noise_key = jax.random.split(key)
        shape = (len(latents), 1, 1, 1)
        if self.noise == "uniform":
            sigma = jax.random.uniform(scale_key, shape)
        else:
            sigma = jnp.abs(jax.random.normal(scale_key, shape))
        return latents + self.noise_tau * sigma * jax.random.normal(noise_key, latents.shape)

    @property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and std [3] of images in [0, 1] that the decoder's patches are normalised by.

        Those of the encoder; on the small ViT, which takes images as they are, ImageNet's.
        """
        if isinstance(self.encoder, ViTBackbone):
            return IMAGENET_MEAN, IMAGENET_STD
        return self.encoder.image_mean, self.encoder.image_std

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute the gradient at the kernel of `decoder_pred` from that at the images."""
        return at_linear(hidden, gradient * (2 * self._statistics[1]), self.decoder.patch_size)

    def _images(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (images, input of the decoder's last layer)."""
        mean, std = self._statistics
        hidden = self.decoder.hidden(rearrange(latents, "b h w c -> b (h w) c"))
        patches = self.decoder.decoder_pred(hidden).astype(jnp.float32)
        images = self.decoder.unpatchify(patches) * std + mean  # in [0, 1]
        return 2 * images - 1, hidden
