"""The Inception network of FID, sFID, Inception Score and precision/recall, with two front ends.

It is the network of TensorFlow's `inception-2015-12-05`, as ported by pytorch-fid 0.3.0 and
torch-fidelity 0.4.0, whose module names the attributes follow; torchvision's InceptionV3 is
another one: its average pools count padding, its last block pools by average, it has 1000 logits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.batch_norm import BatchNorm
from gae_jax.nn.layers import bias_of

SIDE = 299  # of the images that the network sees
SPATIAL_BLOCK, SPATIAL_UNIT, SPATIAL_CHANNELS = "Mixed_6d", "branch1x1", 7


class Unit(NamedTuple):
    """A convolution without bias, BatchNorm and ReLU."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)  # (height, width)
    strides: int = 1
    padding: str = "SAME"


class Fork(NamedTuple):
    """Units that share an input and lie side by side in the output."""

    units: tuple[Unit, ...]


class Pool(NamedTuple):
    """A 3 x 3 pool; averages are of the cells inside the image only."""

    kind: str  # "avg" or "max"
    strides: int = 1
    padding: str = "SAME"


AVG = Pool("avg")
SHRINK = Pool("max", 2, "VALID")
Branch = tuple[Unit | Fork | Pool, ...]  # one after the other


def _shrink(name: str, features: int) -> Unit:
    return Unit(name, features, (3, 3), 2, "VALID")


def _block_5(pool: int) -> tuple[Branch, ...]:
    return (
        (Unit("branch1x1", 64),),
        (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5))),
        (
            Unit("branch3x3dbl_1", 64),
            Unit("branch3x3dbl_2", 96, (3, 3)),
            Unit("branch3x3dbl_3", 96, (3, 3)),
        ),
        (AVG, Unit("branch_pool", pool)),
    )


def _block_6(c: int) -> tuple[Branch, ...]:
    return (
        (Unit("branch1x1", 192),),
        (
            Unit("branch7x7_1", c),
            Unit("branch7x7_2", c, (1, 7)),
            Unit("branch7x7_3", 192, (7, 1)),
        ),
        (
            Unit("branch7x7dbl_1", c),
            Unit("branch7x7dbl_2", c, (7, 1)),
            Unit("branch7x7dbl_3", c, (1, 7)),
            Unit("branch7x7dbl_4", c, (7, 1)),
            Unit("branch7x7dbl_5", 192, (1, 7)),
        ),
        (AVG, Unit("branch_pool", 192)),
    )


def _block_7(pool: Pool) -> tuple[Branch, ...]:
    def fork(name):
        return Fork((Unit(f"{name}a", 384, (1, 3)), Unit(f"{name}b", 384, (3, 1))))

    return (
        (Unit("branch1x1", 320),),
        (Unit("branch3x3_1", 384), fork("branch3x3_2")),
        (
            Unit("branch3x3dbl_1", 448),
            Unit("branch3x3dbl_2", 384, (3, 3)),
            fork("branch3x3dbl_3"),
        ),
        (pool, Unit("branch_pool", 192)),
    )


STEM: Branch = (
    Unit("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Unit("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Unit("Conv2d_2b_3x3", 64, (3, 3)),
    SHRINK,
    Unit("Conv2d_3b_1x1", 80),
    Unit("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    SHRINK,
)
# Branches in the order of their channels in the block's output.
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_5(32),
    "Mixed_5c": _block_5(64),
    "Mixed_5d": _block_5(64),
    "Mixed_6a": (
        (_shrink("branch3x3", 384),),
        (
            Unit("branch3x3dbl_1", 64),
            Unit("branch3x3dbl_2", 96, (3, 3)),
            _shrink("branch3x3dbl_3", 96),
        ),
        (SHRINK,),
    ),
    "Mixed_6b": _block_6(128),
    "Mixed_6c": _block_6(160),
    "Mixed_6d": _block_6(160),
    "Mixed_6e": _block_6(192),
    "Mixed_7a": (
        (Unit("branch3x3_1", 192), _shrink("branch3x3_2", 320)),
        (
            Unit("branch7x7x3_1", 192),
            Unit("branch7x7x3_2", 192, (1, 7)),
            Unit("branch7x7x3_3", 192, (7, 1)),
            _shrink("branch7x7x3_4", 192),
        ),
        (SHRINK,),
    ),
    "Mixed_7b": _block_7(AVG),
    "Mixed_7c": _block_7(Pool("max")),
}


def _units(branch: Branch) -> Iterator[Unit]:
    for step in branch:
        if isinstance(step, Fork):
            yield from step.units
        elif isinstance(step, Unit):
            yield step


def unit_names() -> list[str]:
    """Return the dotted names of the 94 units."""
    names = [unit.name for unit in _units(STEM)]
    for block, branches in BLOCKS.items():
        names += [f"{block}.{unit.name}" for branch in branches for unit in _units(branch)]
    return names


class ConvUnit(nnx.Module):
    """What a `Unit` describes: [B, H, W, features_in] -> [B, h, w, features]."""

    def __init__(self, features_in: int, unit: Unit, *, precision, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            features_in,
            unit.features,
            unit.kernel,
            unit.strides,
            padding=unit.padding,
            use_bias=False,
            precision=precision,
            rngs=rngs,
        )
        self.bn = BatchNorm(unit.features, eps=1e-3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.bn(self.conv(x), train=False))


class FIDInception(nnx.Module):
    """uint8 images -> the activations that metrics of generated images are computed from.

    Args:
      precision: of the convolutions and the last layer; a lower one than HIGHEST means TF32 or
        bf16 on accelerators, and other activations than published.
    """

    def __init__(self, *, precision=jax.lax.Precision.HIGHEST, rngs: nnx.Rngs):
        self.precision = precision

        def build(owner, branch: Branch, width: int) -> int:
            for step in branch:
                units = tuple(_units((step,)))
                for unit in units:
                    setattr(owner, unit.name, ConvUnit(width, unit, precision=precision, rngs=rngs))
                width = sum(unit.features for unit in units) or width
            return width

        width = build(self, STEM, 3)
        for name, branches in BLOCKS.items():
            block = nnx.Module()
            width = sum(build(block, branch, width) for branch in branches)
            setattr(self, name, block)
        self.fc = nnx.Linear(width, 1008, rngs=rngs)

    def __call__(self, images: jax.Array, front_end: str = "tf") -> dict[str, jax.Array]:
        """Compute activations of uint8 images [B, H, W, 3] of any size, all float32.

        Args:
          front_end: "tf" as in the TensorFlow evaluators (ADM) and torch-fidelity, or
            "pytorch_fid".

        Returns:
          pool [B, 2048], the mean over the last block; spatial [B, 2023], the first 7 channels of
          `Mixed_6d.branch1x1` in the order (row, column, channel); logits_unbiased [B, 1008],
          without the bias of the last layer, as the Inception Score takes them; logits.

        Raises:
          ValueError: if the images are not uint8 [B, H, W, 3] or the front end is unknown.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
            raise ValueError(
                f"FIDInception takes uint8 images [B, H, W, 3], not {images.dtype} "
                f"{list(images.shape)}"
            )
        if front_end not in FRONT_ENDS:
            raise ValueError(f"no front end {front_end!r}; there are {sorted(FRONT_ENDS)}")
        x = _run(self, STEM, FRONT_ENDS[front_end](images))
        for name, branches in BLOCKS.items():
            block = getattr(self, name)
            if name == SPATIAL_BLOCK:
                spatial = getattr(block, SPATIAL_UNIT)(x)[..., :SPATIAL_CHANNELS]
            x = jnp.concatenate([_run(block, branch, x) for branch in branches], axis=-1)
        pool = jnp.mean(x, axis=(1, 2))
        logits = jnp.dot(pool, self.fc.kernel[...], precision=self.precision)
        return {
            "pool": pool,
            "spatial": spatial.reshape(len(spatial), -1),
            "logits_unbiased": logits,
            "logits": logits + bias_of(self.fc),
        }


def _run(owner: nnx.Module, branch: Branch, x: jax.Array) -> jax.Array:
    for step in branch:
        if isinstance(step, Pool):
            strides = (step.strides, step.strides)
            if step.kind == "max":
                x = nnx.max_pool(x, (3, 3), strides, step.padding)
            else:
                x = nnx.avg_pool(x, (3, 3), strides, step.padding, count_include_pad=False)
        else:
            outputs = [getattr(owner, unit.name)(x) for unit in _units((step,))]
            x = jnp.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]
    return x


def _interpolate(x: jax.Array, positions: np.ndarray, axis: int) -> jax.Array:
    """Interpolate linearly along an axis at positions (float32) within [0, size)."""
    low = np.floor(positions).astype(np.int32)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    weight = np.expand_dims(positions - low, tuple(range(1, x.ndim - axis)))
    first, second = (jnp.take(x, at, axis=axis) for at in (low, high))
    return first + (second - first) * weight


def tf1_resize(images: jax.Array) -> jax.Array:
    """Resize uint8 [B, H, W, 3] -> fp32 [B, 299, 299, 3] in [-1, 1), as TensorFlow 1.

    As its resize_bilinear: output pixel i lies at i * in / out; no half pixels, no antialiasing.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):  # columns first, as TensorFlow
        scale = np.float32(x.shape[axis] / SIDE)
        x = _interpolate(x, np.arange(SIDE, dtype=np.float32) * scale, axis)
    return (x - 128) / 128


def half_pixel_resize(images: jax.Array) -> jax.Array:
    """Resize uint8 [B, H, W, 3] -> fp32 [B, 299, 299, 3] in [-1, 1], as pytorch-fid.

    Output pixel i lies at (i + 1/2) * in / out - 1/2, as in torch's interpolate with
    align_corners=False; without antialiasing.
    """
    x = images.astype(jnp.float32) / 255
    for axis in (2, 1):
        scale = np.float32(x.shape[axis] / SIDE)
        positions = scale * (np.arange(SIDE, dtype=np.float32) + np.float32(0.5))
        x = _interpolate(x, np.maximum(positions - np.float32(0.5), 0), axis)
    return 2 * x - 1


FRONT_ENDS = {"tf": tf1_resize, "pytorch_fid": half_pixel_resize}
