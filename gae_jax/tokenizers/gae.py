"""The Geometric Autoencoder and the ViT that it is made of (arXiv 2603.10365, Table 13)."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn.gaussian import LOGVAR_RANGE
from gae_jax.nn.layers import linear, rms_norm
from gae_jax.nn.vit import Decoder, Encoder
from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer, at_linear
from gae_jax.tokenizers.gae_kind import BOTTLENECKS


class Adapter(nnx.Module):
    """Projector A_p: one Linear from features to the latent width."""

    def __init__(self, dim: int, latent_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.model = linear(dim, latent_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.model(x)


class GAE(Tokenizer):
    """Geometric Autoencoder: images [B, S, S, 3] in [-1, 1] <-> latents [B, h, w, latent_dim].

    The latent is RMSNorm(A_p(E_p(x))): every token has mean square 1, instead of a KL
    term. Training decodes z = mu + |s| eps with one s ~ N(0, (noise_std * noise_factor)^2) per
    image ("dynamic noise").

    The paper's baseline (Table 7) is the bottleneck "kl": A_p gives means and log-variances of a
    diagonal Gaussian, nothing is normalised, and training decodes a sample.

    Args:
      image_size, patch_size: S and pixels per token edge.
      embed_dim, num_layers, num_heads, num_kv_heads, mlp_ratio: of encoder and decoder alike.
      latent_dim: channels of the latent.
      bottleneck: "norm" or "kl".
      noise_std: C_sigma of the paper; of "norm" only.
      noise_factor: 1/0.8 as in the released code, or 1 as the paper reads.
      patch_init: as `Encoder`.
      remat: of the blocks, as `layers.REMAT`.
      attention: how it is computed, as `attention.ATTENTIONS`.
      kernels: how norms are computed, as `kernels.KERNELS`.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        patch_size: int = 16,
        embed_dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        latent_dim: int = 32,
        bottleneck: str = "norm",
        noise_std: float = 0.2,
        noise_factor: float = 1 / 0.8,
        patch_init: str = "fan_out",
        remat: str = "none",
        attention: str = "xla",
        kernels: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if bottleneck not in BOTTLENECKS:
            raise ValueError(f"bottleneck is {bottleneck!r}; use one of {', '.join(BOTTLENECKS)}")
        grid = image_size // patch_size
        self.latent_shape = (grid, grid, latent_dim)
        self.bottleneck = bottleneck
        self.noise_std = noise_std * noise_factor
        sizes = (image_size, patch_size, embed_dim, num_layers, num_heads)
        common = dict(
            num_kv_heads=num_kv_heads,
            mlp_ratio=mlp_ratio,
            remat=remat,
            attention=attention,
            kernels=kernels,
            dtype=dtype,
            rngs=rngs,
        )
        width = 2 * latent_dim if bottleneck == "kl" else latent_dim
        self.foundation_encoder = Encoder(*sizes, patch_init=patch_init, **common)
        self.adapter = Adapter(embed_dim, width, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(*sizes, latent_dim=latent_dim, **common)

    def encode_all(self, images: jax.Array) -> Encoded:
        """Encode images: latents [B, h, w, d], and what the training objective needs besides."""
        features = self.foundation_encoder(images)
        tokens = self.adapter(features).astype(jnp.float32)
        grid = rearrange(tokens, "b (h w) d -> b h w d", h=self.latent_shape[0])
        logvar = None
        if self.bottleneck == "kl":
            latents, logvar = jnp.split(grid, 2, axis=-1)
            logvar = jnp.clip(logvar, *LOGVAR_RANGE)
        else:
            latents = rms_norm(grid)
        return Encoded(latents, logvar, features.astype(jnp.float32))

    def perturbed(
        self, latents: jax.Array, key: jax.Array, logvar: jax.Array | None = None
    ) -> jax.Array:
        """Perturb latents as the decoder sees them in training.

        Raises:
          ValueError: unless there is a ``logvar`` with the "kl" bottleneck, and none without.
        """
        if (logvar is not None) != (self.bottleneck == "kl"):
            raise ValueError(
                f"perturbed: bottleneck {self.bottleneck!r} takes "
                + ("the logvar of encode_all" if logvar is None else "no logvar")
            )
        if logvar is not None:
            return latents + jnp.exp(logvar / 2) * jax.random.normal(key, latents.shape)
        scale_key, noise_key = jax.random.split(key)
        batch = latents.shape[0]
        scale = self.noise_std * jax.random.normal(scale_key, (batch, 1, 1, 1))
        return latents + jnp.abs(scale) * jax.random.normal(noise_key, latents.shape)

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Decode latents -> images [B, S, S, 3] in fp32; about [-1, 1], not clamped."""
        del keys
        return self.decode_all(latents)[0]

    def decode_all(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `decode`'s images and the tokens [B, N, embed_dim] before its last layer."""
        hidden = self.decoder.hidden(rearrange(latents, "b h w d -> b (h w) d"))
        return self.decoder.images(hidden), hidden

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...] = (), mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """Run the training pass: encoder, `perturbed` and decoder."""
        del terms, mode
        encoded = self.encode_all(images)
        decoded, hidden = self.decode_all(self.perturbed(encoded.latents, key, encoded.logvar))
        return encoded, Decoded(decoded, hidden, {})

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute the gradient at the kernel of `linear_out`, which has no bias; see `base`."""
        return at_linear(hidden, gradient, self.decoder.patch_size)
