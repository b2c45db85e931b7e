"""A diffusion model together with the scale of the latents that it was trained on."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.models.dit import LightningDiT
from gae_jax.models.layers import Buffer


class LatentDiffusion(nnx.Module):
    """LightningDiT plus latent statistics, so that a checkpoint knows how to undo them.

    Args:
      mean, std: per latent channel, [d].
      latent_multiplier: factor after normalisation.
      dit: arguments of `LightningDiT`.
    """

    def __init__(
        self,
        *,
        mean: np.ndarray,
        std: np.ndarray,
        latent_multiplier: float = 1.0,
        rngs: nnx.Rngs,
        **dit,
    ):
        self.dit = LightningDiT(rngs=rngs, **dit)
        self.latent_multiplier = latent_multiplier
        self.latent_mean = Buffer(jnp.asarray(mean, jnp.float32))
        self.latent_std = Buffer(jnp.asarray(std, jnp.float32))

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Tokenizer latents -> what the DiT sees."""
        scaled = (latents - self.latent_mean[...]) / self.latent_std[...]
        return scaled * self.latent_multiplier

    def denormalize(self, x: jax.Array) -> jax.Array:
        """The inverse of `normalize`. Latents are not put back on the sphere."""
        return x / self.latent_multiplier * self.latent_std[...] + self.latent_mean[...]
