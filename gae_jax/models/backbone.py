"""A small ViT classifier whose features stand in for DINOv2's where none can be had.

Its interface is what the teacher and the perceptual loss ask of any backbone: `features` of
images in [-1, 1], and `maps` at several depths.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.models.gae import Encoder
from gae_jax.models.layers import linear, rms_norm


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
        self.encoder = Encoder(*sizes, mlp_ratio=mlp_ratio, dtype=dtype, rngs=rngs)
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
