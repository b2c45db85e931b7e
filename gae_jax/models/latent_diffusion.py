"""A diffusion model together with the scale of the latents that it was trained on."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax import flow, sphere
from gae_jax.models.dit import LightningDiT
from gae_jax.models.layers import Buffer


class LatentDiffusion(nnx.Module):
    """LightningDiT plus latent statistics, so that a checkpoint knows how to undo them.

    Args:
      mean, std: per latent channel, [d].
      latent_multiplier: factor after normalisation.
      path, prediction: what the DiT's output means, names in `flow.PATHS` and `flow.PREDICTIONS`.
      geometry: "flat", or "sphere": the DiT sees latents as they are, without statistics, and its
        velocity is tangential (`sphere`).
      dit: arguments of `LightningDiT`.
    """

    def __init__(
        self,
        *,
        mean: np.ndarray,
        std: np.ndarray,
        latent_multiplier: float = 1.0,
        path: str = "linear",
        prediction: str = "velocity",
        geometry: str = "flat",
        rngs: nnx.Rngs,
        **dit,
    ):
        self.dit = LightningDiT(rngs=rngs, **dit)
        self.latent_multiplier = latent_multiplier
        self.path, self.prediction = flow.PATHS[path], prediction
        self.geometry = geometry
        self.time_range = flow.time_range(path, prediction)
        self.latent_mean = Buffer(jnp.asarray(mean, jnp.float32))
        self.latent_std = Buffer(jnp.asarray(std, jnp.float32))

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Tokenizer latents -> what the DiT sees."""
        if self.geometry == "sphere":
            return sphere.onto(latents)
        scaled = (latents - self.latent_mean[...]) / self.latent_std[...]
        return scaled * self.latent_multiplier

    def denormalize(self, x: jax.Array) -> jax.Array:
        """The inverse of `normalize`. In flat geometry latents are not put back on the sphere."""
        if self.geometry == "sphere":
            return x
        return x / self.latent_multiplier * self.latent_std[...] + self.latent_mean[...]

    def prior(self, noise: jax.Array) -> jax.Array:
        """Normal noise [B, h, w, d] -> what the flow starts from."""
        return sphere.onto(noise) if self.geometry == "sphere" else noise

    def velocity(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """Of x [B, h, w, d] at one time t for all, whatever the DiT predicts."""
        output = self.dit(x, jnp.full(len(x), t), labels)
        if self.geometry == "sphere":
            return sphere.project(x, output)
        return flow.velocity_of(output, x, t, path=self.path, prediction=self.prediction)
