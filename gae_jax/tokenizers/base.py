"""The interface of a tokenizer's module; `kind.Kind` is what the pipeline knows besides it."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.layers import patchify


class Encoded(NamedTuple):
    """The encoder's outputs for images, in fp32.

    Attributes:
      latents: [B, h, w, d], without noise; the means where there is a posterior.
      logvar: logarithms of its variances [B, h, w, d], clamped; None without a posterior.
      features: tokens [B, N, C] before the projection to the latent; None if there are none.
    """

    latents: jax.Array
    logvar: jax.Array | None
    features: jax.Array | None


class Decoded(NamedTuple):
    """The decoder's outputs for perturbed latents in training.

    Attributes:
      images: [B, S, S, 3] in fp32, about [-1, 1]; None in a mode that decodes none.
      hidden: what enters the last layer; None where gradients there mean nothing.
      extras: inputs of the tokenizer's own loss terms, by name.
    """

    images: jax.Array | None
    hidden: jax.Array | None
    extras: dict[str, jax.Array]


class Tokenizer(nnx.Module):
    """Base class of tokenizers.

    Attributes:
      latent_shape: (h, w, d).
    """

    latent_shape: tuple[int, int, int]

    def encode_all(self, images: jax.Array) -> Encoded:
        """Encode images [B, S, S, 3] in [-1, 1]; deterministic."""
        raise NotImplementedError

    def encode(self, images: jax.Array) -> jax.Array:
        """Encode images [B, S, S, 3] in [-1, 1] -> latents [B, h, w, d] in fp32."""
        return self.encode_all(images).latents

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Decode latents [B, h, w, d] -> images [B, S, S, 3] in fp32, about [-1, 1], not clamped.

        Args:
          keys: one for each image [B], for decoders that draw noise; None: all images get the same
            noise.
        """
        raise NotImplementedError

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...], mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """Run the training pass with the tokenizer's own perturbation of latents.

        Args:
          images: [B, S, S, 3] in [-1, 1].
          terms: names of losses; what none of them needs is left out.
          mode: one of `Kind.modes`.
        """
        raise NotImplementedError

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute a loss's gradient with respect to the kernel of the decoder's last layer.

        Args:
          hidden: `Decoded.hidden`.
          gradient: of the loss with respect to the images [B, S, S, 3].
        """
        raise NotImplementedError


T = TypeVar("T")


def needed(value: T | None, name: str) -> T:
    """Return a value that a loss term or a pass needs; raise ValueError, naming it, for None."""
    if value is None:
        raise ValueError(f"there is no {name}, which this term or pass needs")
    return value


def at_linear(hidden: jax.Array, gradient: jax.Array, patch_size: int) -> jax.Array:
    """Compute `at_last_layer` of a Linear that outputs patches: tokens^T times their gradient.

    Args:
      hidden: tokens [B, N, D] that enter the layer.
      gradient: of a loss with respect to the images [B, S, S, C].

    Returns:
      [D, p*p*C].
    """
    patches = patchify(gradient, patch_size)
    return jnp.einsum("bnd,bnp->dp", hidden.astype(jnp.float32), patches)
