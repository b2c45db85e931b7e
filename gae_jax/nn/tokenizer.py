"""What every tokenizer says of images, and what a module must have to be one.

A tokenizer is an NNX module with

- ``latent_shape``: (h, w, d);
- ``encode(images)``: [B, S, S, 3] in [-1, 1] -> latents [B, h, w, d] in fp32, nothing drawn;
- ``encode_all(images)``: the same and more, as `Encoded`;
- ``decode(latents, keys=None)``: images in fp32, about [-1, 1], not clamped. A decoder that draws
  noise takes one key per image, or gives every image the same noise;
- ``forward(images, key, *, terms, mode="")``: the pass of training with the perturbation of its
  own, (`Encoded`, `Decoded`); what none of the ``terms`` asks for is left out;
- ``at_last_layer(hidden, gradient)``: of `Decoded.hidden` and a loss's gradient by the images, the
  loss's gradient by the kernel of the last layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.layers import Buffer, patchify


class Encoded(NamedTuple):
    """What the encoder knows of images, in fp32.

    Attributes:
      latents: [B, h, w, d], without noise; the means where there is a posterior.
      logvar: logarithms of its variances [B, h, w, d], clamped; None without a posterior.
      features: tokens [B, N, C] before the projection to the latent; None if there are none.
    """

    latents: jax.Array
    logvar: jax.Array | None
    features: jax.Array | None


class Decoded(NamedTuple):
    """What the decoder makes of perturbed latents in training.

    Attributes:
      images: [B, S, S, 3] in fp32, about [-1, 1]; None in a mode that decodes none.
      hidden: what enters the last layer; None where gradients there mean nothing.
      extras: what terms of the tokenizer's own look at, by name.
    """

    images: jax.Array | None
    hidden: jax.Array | None
    extras: dict[str, jax.Array]


def freeze(module: nnx.Module) -> nnx.Module:
    """The module with a `Buffer` in the place of every parameter: it has no gradient.

    Names and values stay, so that weights of the module that learns fit it.
    """
    for _, part in list(nnx.iter_modules(module)):
        for name, value in list(vars(part).items()):
            if isinstance(value, nnx.Param):
                setattr(part, name, Buffer(value[...]))
    return module


def at_linear(hidden: jax.Array, gradient: jax.Array, patch_size: int) -> jax.Array:
    """`at_last_layer` of a Linear that makes patches: tokens^T times the patches' gradient.

    Args:
      hidden: tokens [B, N, D].
      gradient: of a loss by the images [B, S, S, C].

    Returns:
      [D, p*p*C].
    """
    patches = patchify(gradient, patch_size)
    return jnp.einsum("bnd,bnp->dp", hidden.astype(jnp.float32), patches)
