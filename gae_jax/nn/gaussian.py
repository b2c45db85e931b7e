"""The diagonal Gaussian of KL autoencoders, as released with LDM and LightningDiT."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOGVAR_RANGE = (-30.0, 20.0)  # as released


class DiagonalGaussian(NamedTuple):
    """A Gaussian with independent elements.

    Attributes:
      mean: [B, ..., C].
      logvar: logarithms of the variances [B, ..., C], clamped to `LOGVAR_RANGE`.
    """

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments: jax.Array) -> "DiagonalGaussian":
        """Make it of moments [B, ..., 2 C], means then logarithms of variances; in fp32."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    @property
    def std(self) -> jax.Array:
        return jnp.exp(self.logvar / 2)

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw mean + std * N(0, 1)."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape)
