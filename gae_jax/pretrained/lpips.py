"""LPIPS, the learned perceptual distance (Zhang et al. 2018): VGG16 trunk, v0.1 linear heads.

The same function as `lpips.LPIPS(net="vgg")` of lpips 0.1.4 in eval mode, whose module names the
attributes follow. taming-transformers and torchmetrics ship the same heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Slices of torchvision's VGG16: (number of the convolution in `features`, its channels). Each
# slice ends with a ReLU (relu1_2, 2_2, 3_3, 4_3, 5_3); a 2 x 2 max pool starts all but the first.
SLICES = {
    "slice1": ((0, 64), (2, 64)),
    "slice2": ((5, 128), (7, 128)),
    "slice3": ((10, 256), (12, 256), (14, 256)),
    "slice4": ((17, 512), (19, 512), (21, 512)),
    "slice5": ((24, 512), (26, 512), (28, 512)),
}
# ImageNet's mean and std, as lpips has them for images in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
SMALLEST = 2 ** (len(SLICES) - 1)  # a smaller image has no pixel left in the last slice


class LPIPS(nnx.Module):
    """Pairs of images -> perceptual distance, 0 (up to rounding) for equal images.

    There is no dropout: lpips has one before each head, which is inactive in eval mode.

    Args:
      precision: of the convolutions; a lower one than HIGHEST means TF32 or bf16 on accelerators,
        and other distances than published.
      dtype: that the convolutions compute in and the features are kept in; distances are fp32.
    """

    def __init__(self, *, precision=jax.lax.Precision.HIGHEST, dtype=jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        slices: dict[str, nnx.Dict] = {}
        heads, width = [], 3
        for name, layers in SLICES.items():
            slices[name] = nnx.Dict()
            for number, features in layers:
                slices[name][str(number)] = nnx.Conv(
                    width, features, (3, 3), padding=1, precision=precision, dtype=dtype, rngs=rngs
                )
                width = features
            heads.append(nnx.Conv(width, 1, (1, 1), use_bias=False, rngs=rngs))
        self.net = nnx.Dict(slices)
        for number, head in enumerate(heads):
            setattr(self, f"lin{number}", nnx.Dict(model=nnx.Dict({"1": head})))

    def features(self, images: jax.Array) -> list[jax.Array]:
        """Compute the five maps [B, h, w, C], not normalised, of images [B, H, W, 3] in [-1, 1]."""
        x = (images.astype(jnp.float32) - SHIFT) / SCALE
        maps: list[jax.Array] = []
        for name, layers in SLICES.items():
            if maps:
                x = max_pool(x)
            for number, _ in layers:
                x = relu(self.net[name][str(number)](x))
            maps.append(x)
        return maps

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Compute distances [B] of images a and b, both [B, H, W, 3] in [-1, 1]; not clamped.

        Raises:
          ValueError: if the shapes differ or the images are smaller than 16 pixels.
        """
        if a.shape != b.shape or min(a.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"LPIPS compares images of one shape [B, H, W, 3] with sides of at least "
                f"{SMALLEST}, not {list(a.shape)} and {list(b.shape)}"
            )
        # Two passes, not one of twice the batch: the backward pass of a target that needs no
        # gradient is then left out.
        return self.compare(self.features(a), self.features(b))

    def compare(self, a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
        """Compute distances [B] of two lists of `features`."""
        total = jnp.zeros(len(a[0]), jnp.float32)
        for number, (first, second) in enumerate(zip(a, b, strict=True)):
            first, second = (part.astype(jnp.float32) for part in (first, second))
            difference = jnp.square(unit_length(first) - unit_length(second))
            # a convolution of one pixel to one channel, written as the sum that it is: the
            # differences need not be stored
            head = getattr(self, f"lin{number}").model["1"].kernel[...][0, 0, :, 0]
            total += jnp.mean(jnp.sum(difference * head, axis=-1), axis=(1, 2))
        return total


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """Compute max(x, 0); its gradient needs only the result, so convolutions can fuse it."""
    return jnp.maximum(x, 0)


def _relu_saved(x):
    y = relu(x)
    return y, y


relu.defvjp(_relu_saved, lambda y, dy: (jnp.where(y > 0, dy, 0),))


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Pool maxima of 2 x 2 pixels: [B, H, W, C] -> [B, H // 2, W // 2, C].

    The gradient goes to the first of equal values, as in PyTorch, in one pass over memory.
    """
    return nnx.max_pool(x, (2, 2), strides=(2, 2))


def _max_pool_saved(x):
    y = max_pool(x)
    return y, (x, y)


def _max_pool_backward(saved, dy):
    x, y = saved
    h, w = y.shape[1:3]
    rows, unclaimed = [], jnp.ones(y.shape, bool)
    for i in range(2):
        row = []
        for j in range(2):
            hit = unclaimed & (x[:, i : 2 * h : 2, j : 2 * w : 2] == y)
            unclaimed &= ~hit
            row.append(jnp.where(hit, dy, 0))
        rows.append(jnp.stack(row, axis=3))
    dx = jnp.stack(rows, axis=2).reshape(y.shape[0], 2 * h, 2 * w, y.shape[3])
    rest = [(0, 0), (0, x.shape[1] - 2 * h), (0, x.shape[2] - 2 * w), (0, 0)]
    return (jnp.pad(dx, rest),)


max_pool.defvjp(_max_pool_saved, _max_pool_backward)


def unit_length(features: jax.Array, eps: float = 1e-10) -> jax.Array:
    """Compute f / (sqrt(sum f^2) + eps) over the last axis; gradients are finite at zero."""
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    positive = square > 0
    # The derivative of sqrt is infinite at 0, and infinity times 0 is NaN also where the outer
    # `where` takes the other branch: the root must not see the zero.
    length = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
    return features / (length + eps)
