"""The interface of a tokenizer's module; `kind.Kind` is what the pipeline knows besides it.

A tokenizer is a `Tokenizer` with

- ``latent_shape``: (h, w, d);
- ``encode_all(images)``: [B, S, S, 3] in [-1, 1] -> `Encoded`, deterministic;
- ``decode(latents, keys=None)``: images in fp32, about [-1, 1], not clamped. A decoder that draws
  noise takes one key per image; without keys every image gets the same noise;
- ``forward(images, key, *, terms, mode="")``: the pass of training with the tokenizer's own
  perturbation of latents, (`Encoded`, `Decoded`); what none of the ``terms`` needs is left out;
- ``at_last_layer(hidden, gradient)``: from `Decoded.hidden` and a loss's gradient with respect to
  the images, the loss's gradient with respect to the kernel of the decoder's last layer.
"""

from typing import NamedTuple

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
    """Base class of tokenizers."""

    def encode(self, images: jax.Array) -> jax.Array:
        """Encode images [B, S, S, 3] in [-1, 1] -> latents [B, h, w, d] in fp32."""
        return self.encode_all(images).latents


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
