"""Layers that several networks share.

Attribute names follow the released PyTorch modules, so that converting weights is mostly
transposing. Token arrays are [B, N, C] (batch, tokens, channels), images [B, H, W, C].
Parameters are kept in fp32; ``dtype``, or its name, is the dtype that a layer computes in.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from gae_jax.kernels.fp8 import Scaled, unscaled
from gae_jax.kernels.stream import Stream
from gae_jax.nn.linear import Linear

M = TypeVar("M", bound=nnx.Module)


class Buffer(nnx.Variable):
    """A fixed array that belongs to the model but is never trained."""


# Rematerialisation of a block's activations: "none" keeps all of them for the backward pass, else
# a policy of `jax.checkpoint_policies` says which to keep; the rest are computed again.
REMAT = (
    "none",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)


def check_remat(remat: str) -> str:
    """Return the name; raise ValueError if it is not one of `REMAT`."""
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; use one of {', '.join(REMAT)}")
    return remat


def rematerialize(
    module: nnx.Module, remat: str, call: Callable = lambda module, *inputs: module(*inputs)
) -> Callable:
    """Return a function that calls a module and keeps the activations that ``remat`` says.

    Args:
      module: must not change its own variables in the call.
      call: (module, *inputs) -> result.
    """
    if remat == "none":
        return partial(call, module)
    graph, arrays = nnx.split(module)

    def again(arrays, *inputs):
        return call(nnx.merge(graph, arrays), *inputs)

    policy = getattr(jax.checkpoint_policies, remat)
    return partial(jax.checkpoint(again, policy=policy), arrays)


def torch_uniform(in_axis: int = -2):
    """Make PyTorch's default initializer of Linear and Conv: uniform in +-1/sqrt(fan in)."""
    return nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=in_axis)


def linear(
    features_in: int, features_out: int, *, bias=False, init=None, dtype, rngs
) -> nnx.Linear:
    """Make a Linear layer with PyTorch's default initialisation, or with ``init``."""
    return Linear(
        features_in,
        features_out,
        use_bias=bias,
        kernel_init=init or torch_uniform(),
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


class LinearLike(Protocol):
    """A layer that replaces a Linear layer."""

    def matmul(self, x: Any) -> jax.Array:
        """Compute x W, without the bias."""


def matmul(layer: nnx.Linear | LinearLike, x: jax.Array | Scaled) -> jax.Array:
    """Compute x W [..., C] -> [..., D] without the bias; ``Scaled`` for `QuantizedLinear` only."""
    if not isinstance(layer, nnx.Linear):
        return layer.matmul(x)
    return unscaled(x).astype(layer.dtype) @ layer.kernel[...].astype(layer.dtype)


def bias_of(layer: nnx.Linear) -> jax.Array:
    """Return the bias of a Linear layer that has one; raise ValueError for another."""
    if layer.bias is None:
        raise ValueError(f"{type(layer).__name__} has no bias")
    return layer.bias[...]


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Compute x / sqrt(mean(x^2) + eps) over the last axis, in fp32; returns the dtype of x."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned weight per channel."""

    def __init__(self, dim: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        del rngs  # nothing random: the weight starts at one
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = rms_norm(x.astype(jnp.float32), self.eps) * self.weight[...]
        return wide.astype(x.dtype)

    def streamed(self, stream: Stream, kernels: str, **options) -> tuple[jax.Array, ...]:
        """Return (sum, modulated norm) of a stream by kernels.

        Args:
          options: shift, scale and fp8 of `Stream.normed`.
        """
        return stream.normed(kernels, weight=self.weight[...], eps=self.eps, **options)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Normalise to mean 0 and variance 1 over the last axis, in fp32; returns the dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned weight and bias per channel."""

    def __init__(self, dim: int, *, eps: float, rngs: nnx.Rngs):
        del rngs  # nothing random
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: jax.Array, *, affine: bool = True) -> jax.Array:
        """[..., C] -> [..., C] in the dtype of x; ``affine=False`` leaves out weight and bias."""
        wide = layer_norm(x.astype(jnp.float32), self.eps)
        if affine:
            wide = wide * self.weight[...] + self.bias[...]
        return wide.astype(x.dtype)


def rope_table(grid: int, head_dim: int, base: float = 10_000.0) -> tuple[np.ndarray, np.ndarray]:
    """Compute cosines and sines of the 2-D rotary embedding, each [grid^2, head_dim / 2].

    The first half of the angles comes from the token's row, the second from its column, with
    frequencies base^(-2i / (head_dim / 2)). Angle j rotates the channels (j, j + head_dim / 2):
    halves are rotated, not interleaved pairs, which is faster; `interop` permutes the rows of
    released weights accordingly.
    """
    quarter = head_dim // 4
    frequencies = base ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(grid)[:, None] * frequencies
    row = repeat(angles, "h f -> (h w) f", w=grid)
    column = repeat(angles, "w f -> (h w) f", h=grid)
    both = np.concatenate([row, column], axis=-1)
    return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)


def apply_rope(x: jax.Array, table: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Rotate x [B, N, heads, head_dim] by a `rope_table`, in fp32; returns the dtype of x."""
    cos, sin = (jnp.asarray(part)[None, :, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Mlp(nnx.Module):
    """fc2(gelu(fc1 x)) with biases; ``approximate``: the GELU with tanh."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        init=None,
        approximate: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.approximate = approximate
        make = partial(linear, bias=True, init=init, dtype=dtype, rngs=rngs)
        self.fc1 = make(dim, hidden)
        self.fc2 = make(hidden, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.approximate))


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Split [B, H, W, C] -> [B, N, p*p*C]: row-major patches, each (row, column, channel)."""
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: jax.Array, patch_size: int) -> jax.Array:
    """Join [B, N, p*p*C] of a square grid -> [B, H, W, C]; the inverse of `patchify`."""
    grid = math.isqrt(tokens.shape[1])
    return rearrange(
        tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=grid, p=patch_size, q=patch_size
    )


def sincos_table(dim: int, grid: int, base: float = 10_000.0) -> np.ndarray:
    """Compute the fixed 2-D position table of MAE and DiT, [grid^2, dim] in fp32.

    The first half of the channels encodes the column, the second the row; each half is
    [sin | cos].
    """
    quarter = dim // 4
    frequencies = base ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(grid, dtype=np.float64)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    column = repeat(axis, "w c -> (h w) c", h=grid)
    row = repeat(axis, "h c -> (h w) c", w=grid)
    return np.concatenate([column, row], axis=-1).astype(np.float32)


def freeze(module: M) -> M:
    """Replace every parameter of a module by a `Buffer`, which has no gradient.

    Names and values stay, so that weights of the trainable module fit it.
    """
    for _, part in list(nnx.iter_modules(module)):
        for name, value in list(vars(part).items()):
            if isinstance(value, nnx.Param):
                setattr(part, name, Buffer(value[...]))
    return module
