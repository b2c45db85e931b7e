"""The interface of backbones: what teachers, the perceptual loss and tokenizers ask of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.positions import resize_images


class Backbone(nnx.Module):
    """A vision encoder on images in [-1, 1] of any size, which are resized and normalised for it.

    Attributes:
      input_size: pixels that images are resized to.
      grid: edge of the square of tokens; N = grid^2.
      width: channels C of the tokens.
      encoder: the network on preprocessed images.
      image_mean, image_std: [3], of images in [0, 1], as the encoder was trained.
    """

    input_size: int
    grid: int
    width: int
    encoder: Any
    image_mean: np.ndarray
    image_std: np.ndarray

    def preprocess(self, images: jax.Array, *, antialias: bool = True) -> jax.Array:
        """Resize and normalise images [B, H, W, 3] -> [B, input_size, input_size, 3] in fp32."""
        images = (images.astype(jnp.float32) + 1) / 2
        images = resize_images(images, self.input_size, antialias=antialias)
        return (images - self.image_mean) / self.image_std

    def features(
        self, images: jax.Array, *, affine: bool = True, antialias: bool = True
    ) -> jax.Array:
        """Compute the tokens [B, N, C] of images, row-major.

        Args:
          affine: False leaves out weight and bias of the last norm, as RAE and PAE do.
          antialias: of the resize; RAE and PAE do without.
        """
        raise NotImplementedError

    def features_and_maps(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Compute `features`, and the tokens [B, N, C] at every depth, not normalised."""
        raise NotImplementedError
