"""Backbones: released vision encoders, and a small ViT classifier that stands in for them."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.attention import check_attention
from gae_jax.nn.layers import layer_norm, linear, rms_norm
from gae_jax.nn.network import Network
from gae_jax.nn.vit import Encoder
from gae_jax.pretrained.base import Backbone
from gae_jax.pretrained.dinov2 import Dinov2
from gae_jax.pretrained.dinov3 import Dinov3
from gae_jax.pretrained.efficientnet import EfficientNetBackbone, efficientnet_shape
from gae_jax.pretrained.mae import MAEEncoder
from gae_jax.pretrained.siglip import SiglipVision
from gae_jax.pretrained.vision import VisionEncoder

# ViTs whose weights are released, by their names in the config.
ENCODERS: dict[str, Callable[..., VisionEncoder]] = {
    "dinov2": Dinov2,
    "dinov3": Dinov3,
    "mae": MAEEncoder,
    "siglip": SiglipVision,
}
RELEASED = (*ENCODERS, "efficientnet_lite0")


class VisionBackbone(Backbone):
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
    def image_mean(self) -> np.ndarray:  # type: ignore[override]  # read-only: the encoder's
        return self.encoder.image_mean

    @property
    def image_std(self) -> np.ndarray:  # type: ignore[override]  # read-only: the encoder's
        return self.encoder.image_std

    def features(
        self, images: jax.Array, *, affine: bool = True, antialias: bool = True
    ) -> jax.Array:
        """Compute normalised patch tokens [B, N, C] of images."""
        pixels = self.preprocess(images, antialias=antialias)
        return self.encoder.patch_tokens(pixels, affine=affine)

    def class_token(self, pixel_values: jax.Array) -> jax.Array:
        """Compute CLS [B, C] after the last norm, of images that are preprocessed already.

        Raises:
          ValueError: if the encoder has none.
        """
        if self.encoder.cls_token is None:
            name = type(self.encoder).__name__
            raise ValueError(f"{name} has no CLS token; take the mean of its patch tokens")
        return self.encoder(pixel_values)[:, 0]

    def features_and_maps(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Compute `features`, and the patch tokens [B, N, C] after every block."""
        return self.encoder.patch_tokens(self.preprocess(images), every_block=True)


def frozen_backbone(kind: str, sizes: Mapping, **compute) -> Backbone:
    """Make a released encoder on images in [-1, 1], by its name in the config.

    Args:
      kind: a name in `RELEASED`.
      sizes: the section of that name.
      compute: dtype, attention and rngs.
    """
    if kind == "efficientnet_lite0":
        return EfficientNetBackbone(**sizes, **compute)
    return VisionBackbone(kind=kind, **sizes, **compute)


class ViTBackbone(Backbone):
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
        self.input_size, self.grid, self.width = image_size, image_size // patch_size, embed_dim
        self.encoder = Encoder(
            *(image_size, patch_size, embed_dim, num_layers, num_heads),
            mlp_ratio=mlp_ratio,
            patch_init="fan_in",
            attention=attention,
            dtype=dtype,
            rngs=rngs,
        )

    def preprocess(self, images: jax.Array, *, antialias: bool = True) -> jax.Array:
        """Return the images unchanged."""
        del antialias
        return images

    def features(
        self, images: jax.Array, *, affine: bool = True, antialias: bool = True
    ) -> jax.Array:
        """Compute tokens [B, N, C] of images [B, S, S, 3]; ``affine=False`` normalises them."""
        del antialias
        tokens = self.encoder(images)
        return tokens if affine else layer_norm(tokens)

    def features_and_maps(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Compute `features`, and the tokens [B, N, C] after every block."""
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
        """Compute logits [B, num_classes] of images."""
        pooled = jnp.mean(rms_norm(self.encoder(images)), axis=1)
        return self.head(pooled).astype(jnp.float32)


def backbone_network(
    backbone: Mapping, num_classes: int | None = None, **compute
) -> Network[Backbone]:
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


def make_backbone(section: Mapping, **compute) -> Backbone:
    """Make the module of a section ``backbone``, without a classifier.

    Args:
      compute: dtype and rngs.
    """
    kind = section["name"]
    if kind == "vit":
        return ViTBackbone(**section["vit"], **compute)
    return frozen_backbone(kind, section[kind], **compute)


def backbone_shape(backbone: Mapping) -> tuple[int, int]:
    """Return (edge of the grid of tokens, width) of the backbone that a section describes."""
    model = backbone[backbone["name"]]
    if backbone["name"] == "vit":
        return model["image_size"] // model["patch_size"], model["embed_dim"]
    if backbone["name"] == "efficientnet_lite0":
        return efficientnet_shape(model["input_size"], model["strides"])
    return model["input_size"] // model["patch_size"], model["hidden_size"]
