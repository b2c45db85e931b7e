"""Backbones: DINOv2 or MAE, and a small ViT classifier that stands in for them.

Their interface is what the teacher and the perceptual loss ask of any backbone: `features` of
images in [-1, 1], and `features_and_maps` with the tokens at every depth.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.data.images import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.models.dinov2 import Dinov2
from gae_jax.models.gae import Encoder
from gae_jax.models.layers import linear, rms_norm
from gae_jax.models.mae import MAEEncoder
from gae_jax.models.vision import resize_matrix

ENCODERS = {"dinov2": Dinov2, "mae": MAEEncoder}


class VisionBackbone(nnx.Module):
    """DINOv2 or MAE on images in [-1, 1] of any size.

    Images are resized (bicubic, antialiased) and normalised as the encoder was trained.

    Args:
      kind: "dinov2" or "mae".
      input_size: pixels that images are resized to.
      sizes: as `Dinov2` or `MAEEncoder`.
    """

    def __init__(self, *, kind: str, input_size: int, dtype=jnp.float32, rngs: nnx.Rngs, **sizes):
        self.input_size = input_size
        self.encoder = ENCODERS[kind](**sizes, dtype=dtype, rngs=rngs)

    def preprocess(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] in [-1, 1] -> [B, input_size, input_size, 3], normalised, in fp32."""
        images = (images.astype(jnp.float32) + 1) / 2
        if images.shape[1:3] != (self.input_size, self.input_size):
            rows, columns = (
                resize_matrix(size, self.input_size, antialias=True) for size in images.shape[1:3]
            )
            images = jnp.einsum(
                "ih,jw,bhwc->bijc", rows, columns, images, precision=jax.lax.Precision.HIGHEST
            )
        return (images - IMAGENET_MEAN) / IMAGENET_STD

    def features(self, images: jax.Array) -> jax.Array:
        """Images -> normalised patch tokens [B, N, C]."""
        return self.encoder.patch_tokens(self.preprocess(images))

    def class_token(self, pixel_values: jax.Array) -> jax.Array:
        """CLS after the last norm [B, C] of images that are resized and normalised already."""
        return self.encoder(pixel_values)[:, 0]

    def features_and_maps(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """`features`, and the patch tokens after every block."""
        return self.encoder.patch_tokens(self.preprocess(images), every_block=True)


class ViTClassifier(nnx.Module):
    """The encoder of GAE with a linear classifier on its mean token.

    Args:
      num_classes: classes of the training data.
      others: as `Encoder`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = (image_size, patch_size, embed_dim, num_layers, num_heads)
        more = dict(mlp_ratio=mlp_ratio, patch_init="fan_in", dtype=dtype, rngs=rngs)
        self.encoder = Encoder(*sizes, **more)
        self.head = linear(embed_dim, num_classes, bias=True, dtype=dtype, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """Images [B, S, S, 3] -> tokens [B, N, C]."""
        return self.encoder(images)

    def features_and_maps(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """`features`, and the tokens after every block."""
        return self.encoder(images, every_block=True)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [B, num_classes]."""
        pooled = jnp.mean(rms_norm(self.encoder(images)), axis=1)
        return self.head(pooled).astype(jnp.float32)
