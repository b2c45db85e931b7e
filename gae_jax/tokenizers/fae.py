"""FAE (arXiv 2512.07829): latents of a frozen backbone's features, and pixels from features.

Three phases train it. "features": the feature autoencoder gives the features back, with a KL
divergence. "noisy_features": the pixel decoder learns from the features under noise of one fixed
std. "restored_features": it continues on the autoencoder's reconstruction from a sampled latent.
The first two share nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn.layers import freeze
from gae_jax.pretrained.base import Backbone
from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer, at_linear
from gae_jax.tokenizers.fae_kind import MODES
from gae_jax.tokenizers.fae_networks import FeatureAutoencoder, PixelDecoder


class FAE(Tokenizer):
    """Images [B, S, S, 3] in [-1, 1] <-> latents [B, h, w, latent_dim] over a frozen backbone.

    The latents are the means of the posterior; decoding is the feature decoder, then the pixel
    decoder. Attributes are `encoder` (the backbone), `autoencoder` and `decoder` (of pixels).

    Args:
      image_size: S.
      backbone: makes the backbone from ``rngs``; its grid must divide S.
      latent_dim, encoder, encoder_heads, encoder_head_dim, decoder_depth, decoder_heads,
        decoder_hidden: as `FeatureAutoencoder`.
      pixel_dim, pixel_depth, pixel_heads, pixel_hidden: width, blocks, attention heads and the
        width inside the SwiGLU of the `PixelDecoder`.
      noise_std: std of the noise on the features in "noisy_features".
      remat, attention, dtype: of what learns; the backbone has its own.

    Raises:
      ValueError: if the backbone's grid does not divide the image.
    """

    def __init__(
        self,
        *,
        image_size: int,
        backbone: Callable[[nnx.Rngs], Backbone],
        latent_dim: int = 32,
        encoder: str = "attention",
        encoder_heads: int = 24,
        encoder_head_dim: int = 256,
        decoder_depth: int = 6,
        decoder_heads: int = 24,
        decoder_hidden: int = 4096,
        pixel_dim: int = 1024,
        pixel_depth: int = 24,
        pixel_heads: int = 16,
        pixel_hidden: int = 2736,
        noise_std: float = 0.4,
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.encoder = freeze(backbone(rngs))
        grid, width = self.encoder.grid, self.encoder.width
        if image_size % grid:
            raise ValueError(
                f"image_size {image_size} is not a multiple of the backbone's grid of {grid} tokens"
            )
        self.latent_shape, self.noise_std = (grid, grid, latent_dim), noise_std
        common = dict(remat=remat, dtype=dtype, rngs=rngs)
        self.autoencoder = FeatureAutoencoder(
            feature_dim=width,
            latent_dim=latent_dim,
            num_patches=grid**2,
            encoder=encoder,
            encoder_heads=encoder_heads,
            encoder_head_dim=encoder_head_dim,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            decoder_hidden=decoder_hidden,
            attention=attention,
            **common,
        )
        self.decoder = PixelDecoder(
            feature_dim=width,
            num_patches=grid**2,
            patch_size=image_size // grid,
            embed_dim=pixel_dim,
            depth=pixel_depth,
            num_heads=pixel_heads,
            hidden=pixel_hidden,
            **common,
        )

    def encode_all(self, images: jax.Array) -> Encoded:
        """Encode images: latents, their logvar, and the backbone's tokens [B, N, C]."""
        features = self._features(images)
        latents, logvar = map(self._to_grid, self.autoencoder.encode(features))
        return Encoded(latents, logvar, features)

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Decode latents -> images [B, S, S, 3] in fp32, about [-1, 1]; deterministic."""
        del keys
        return self.decoder(self.autoencoder.reconstruct(_to_tokens(latents)))

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...], mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """Run the training pass of one phase.

        Args:
          key: of the sampled latent or of the noise.
          terms: ignored: the mode says what is computed.
          mode: of `MODES`. "features" decodes no pixels: its images are None.

        Raises:
          ValueError: for another mode.
        """
        del terms
        if mode not in MODES:
            raise ValueError(
                f"fae: the mode is {mode!r}; give every phase of tokenizer.phases one of "
                f"{', '.join(MODES)}"
            )
        features = self._features(images)
        mean, logvar = self.autoencoder.encode(features)
        encoded = Encoded(self._to_grid(mean), self._to_grid(logvar), features)
        if mode == "noisy_features":
            return encoded, self._pixels(self.perturbed(features, key))
        restored = self.autoencoder.reconstruct(self.autoencoder.sample(mean, logvar, key))
        if mode == "features":
            return encoded, Decoded(None, None, {"features": restored})
        return encoded, self._pixels(jax.lax.stop_gradient(restored))

    def perturbed(self, features: jax.Array, key: jax.Array) -> jax.Array:
        """Add noise of the std ``noise_std`` to features, sampled for each element."""
        return features + self.noise_std * jax.random.normal(key, features.shape)

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute the gradient at the kernel of the pixel decoder's last layer from the images'."""
        return at_linear(hidden, gradient, self.decoder.patch_size)

    def _features(self, images: jax.Array) -> jax.Array:
        """Compute the frozen backbone's tokens [B, N, C] in fp32."""
        return jax.lax.stop_gradient(self.encoder.features(images)).astype(jnp.float32)

    def _pixels(self, features: jax.Array) -> Decoded:
        hidden = self.decoder.hidden(features)
        return Decoded(self.decoder.images(hidden), hidden, {})

    def _to_grid(self, tokens: jax.Array) -> jax.Array:
        return rearrange(tokens, "b (h w) d -> b h w d", h=self.latent_shape[0])


def _to_tokens(grid: jax.Array) -> jax.Array:
    return rearrange(grid, "b h w d -> b (h w) d")
