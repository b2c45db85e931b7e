"""Backbones: released vision encoders, and a small ViT classifier that stands in for them.

Their interface is what the teacher, the perceptual loss and tokenizers on top of a backbone ask:
`features` of images in [-1, 1], `features_and_maps` with the tokens at every depth, and
`preprocess`, which makes of images what the encoder takes; ``grid`` is the edge of the square of
tokens, ``width`` their channels, ``image_mean`` and ``image_std`` are of images in [0, 1].
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.attention import check_attention
from gae_jax.nn.layers import layer_norm, linear, rms_norm
from gae_jax.nn.network import Network
from gae_jax.nn.positions import resize_matrix
from gae_jax.nn.vit import Encoder
from gae_jax.pretrained.dinov2 import Dinov2
from gae_jax.pretrained.dinov3 import Dinov3
from gae_jax.pretrained.efficientnet import EfficientNetBackbone, efficientnet_shape
from gae_jax.pretrained.mae import MAEEncoder
from gae_jax.pretrained.siglip import SiglipVision

# ViTs whose weights are released, by their names in the config.
ENCODERS = {"dinov2": Dinov2, "dinov3": Dinov3, "mae": MAEEncoder, "siglip": SiglipVision}


RELEASED = (*ENCODERS, "efficientnet_lite0")


class VisionBackbone(nnx.Module):
    """One of `ENCODERS` on images in [-1, 1] of any size.

    Images are resized (bicubic, antialiased) and normalised as the encoder was trained.

    Args:
      kind: a name in `ENCODERS`.
      input_size: pixels that images are resized to.
      attention: implementation, as `Attention`.
      sizes: as the encoder of that name.
    """

    def __init__(
        self,
        *,
        kind: str,
        input_size: int,
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **sizes,
    ):
        self.input_size = input_size
        self.encoder = ENCODERS[kind](**sizes, dtype=dtype, rngs=rngs)
        for block in self.encoder.blocks:
            block.attn.attention = check_attention(attention)
        self.grid = input_size // self.encoder.patch_embed.patch_size
        self.width = self.encoder.patch_embed.kernel.shape[-1]

    @property
    def image_mean(self) -> np.ndarray:
        return self.encoder.image_mean

    @property
    def image_std(self) -> np.ndarray:
        return self.encoder.image_std

    def preprocess(self, images: jax.Array, *, antialias: bool = True) -> jax.Array:
        """[B, H, W, 3] in [-1, 1] -> [B, input_size, input_size, 3], normalised, in fp32."""
        images = (images.astype(jnp.float32) + 1) / 2
        if images.shape[1:3] != (self.input_size, self.input_size):
            rows, columns = (
                resize_matrix(size, self.input_size, antialias=antialias)
                for size in images.shape[1:3]
            )
            images = jnp.einsum(
                "ih,jw,bhwc->bijc", rows, columns, images, precision=jax.lax.Precision.HIGHEST
            )
        return (images - self.image_mean) / self.image_std

    def features(
        self, images: jax.Array, *, affine: bool = True, antialias: bool = True
    ) -> jax.Array:
        """Images -> normalised patch tokens [B, N, C].

        Args:
          affine: False leaves out weight and bias of the last norm, as RAE and PAE do.
          antialias: of the resize; RAE and PAE do without.
        """
        pixels = self.preprocess(images, antialias=antialias)
        return self.encoder.patch_tokens(pixels, affine=affine)

    def class_token(self, pixel_values: jax.Array) -> jax.Array:
        """CLS after the last norm [B, C] of images that are resized and normalised already.

        Raises:
          ValueError: if the encoder has none.
        """
        if self.encoder.cls_token is None:
            name = type(self.encoder).__name__
            raise ValueError(f"{name} has no CLS token; take the mean of its patch tokens")
        return self.encoder(pixel_values)[:, 0]

    def features_and_maps(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """`features`, and the patch tokens after every block."""
        return self.encoder.patch_tokens(self.preprocess(images), every_block=True)


def frozen_backbone(kind: str, sizes: Mapping, **compute) -> nnx.Module:
    """A released encoder on images in [-1, 1], by its name in the config.

    Args:
      kind: a name in `RELEASED`.
      sizes: the section of that name.
      compute: dtype, attention and rngs.
    """
    if kind == "efficientnet_lite0":
        return EfficientNetBackbone(**sizes, **compute)
    return VisionBackbone(kind=kind, **sizes, **compute)


class ViTBackbone(nnx.Module):
    """The encoder of GAE, as a backbone of images [B, S, S, 3] in [-1, 1].

    Args:
      all: as `Encoder`.
    """

    image_mean = image_std = np.full(3, 0.5, np.float32)  # its input is in [-1, 1]

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.grid, self.width = image_size // patch_size, embed_dim
        sizes = (image_size, patch_size, embed_dim, num_layers, num_heads)
        options = dict(mlp_ratio=mlp_ratio, patch_init="fan_in", attention=attention)
        self.encoder = Encoder(*sizes, **options, dtype=dtype, rngs=rngs)

    def preprocess(self, images: jax.Array, *, antialias: bool = True) -> jax.Array:
        """Return the images unchanged."""
        del antialias
        return images

    def features(
        self, images: jax.Array, *, affine: bool = True, antialias: bool = True
    ) -> jax.Array:
        """Images [B, S, S, 3] -> tokens [B, N, C]; ``affine=False`` normalises them."""
        del antialias
        tokens = self.encoder(images)
        return tokens if affine else layer_norm(tokens)

    def features_and_maps(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """`features`, and the tokens after every block."""
        return self.encoder(images, every_block=True)


class ViTClassifier(ViTBackbone):
    """A `ViTBackbone` with a linear classifier on its mean token.

    Args:
      num_classes: classes of the training data.
      sizes: as `ViTBackbone`.
    """

    def __init__(self, *, num_classes: int, dtype=jnp.float32, rngs: nnx.Rngs, **sizes):
        super().__init__(dtype=dtype, rngs=rngs, **sizes)
        options = dict(bias=True, dtype=dtype, rngs=rngs)
        self.head = linear(sizes["embed_dim"], num_classes, **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [B, num_classes]."""
        pooled = jnp.mean(rms_norm(self.encoder(images)), axis=1)
        return self.head(pooled).astype(jnp.float32)


def backbone_network(backbone, num_classes: int | None = None, **compute) -> Network:
    """Make the network of a backbone section.

    Args:
      num_classes: of the classifier "vit", which replaces a released encoder.
      compute: dtype and attention.
    """
    kind = backbone["name"]
    if kind == "vit":
        options = dict(num_classes=num_classes, **compute)
        return Network(lambda rngs: ViTClassifier(**backbone["vit"], **options, rngs=rngs))
    return Network(lambda rngs: frozen_backbone(kind, backbone[kind], **compute, rngs=rngs))


def make_backbone(section: Mapping, **more) -> nnx.Module:
    """Make the module of a section ``backbone``, without a classifier.

    Args:
      more: dtype and rngs.
    """
    kind = section["name"]
    if kind == "vit":
        return ViTBackbone(**section["vit"], **more)
    return frozen_backbone(kind, section[kind], **more)


def backbone_shape(backbone: Mapping) -> tuple[int, int]:
    """Return (edge of the grid of tokens, width) of the backbone that a section describes."""
    model = backbone[backbone["name"]]
    if backbone["name"] == "vit":
        return model["image_size"] // model["patch_size"], model["embed_dim"]
    if backbone["name"] == "efficientnet_lite0":
        return efficientnet_shape(model["input_size"], model["strides"])
    return model["input_size"] // model["patch_size"], model["hidden_size"]
