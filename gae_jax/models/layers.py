"""Layers that several networks share.

Attribute names follow the released PyTorch modules, so that converting weights is mostly
transposing. Token arrays are [B, N, C] (batch, tokens, channels), images [B, H, W, C].
Parameters are kept in fp32; ``dtype``, or its name, is the dtype that a layer computes in.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from gae_jax.models import mosaic_attention
from gae_jax.models.attention_kernel import WIDTHS, Heads, attend, attention_obstacle
from gae_jax.models.kernels import Stream
from gae_jax.models.linear import Linear
from gae_jax.models.rotation_kernel import Turned, rotation_obstacle, turned_heads
from gae_jax.parallel import platform, splits_channels


class Buffer(nnx.Variable):
    """A fixed array that belongs to the model but is never trained."""


# What the backward pass finds of a block's activations: "none", all of them, as they are; else
# what a policy of `jax.checkpoint_policies` keeps, the rest being computed again.
REMAT = (
    "none",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)


def check_remat(remat: str) -> str:
    """The name; ValueError if it is none of `REMAT`."""
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; use one of {', '.join(REMAT)}")
    return remat


def rematerialize(
    module: nnx.Module, remat: str, call: Callable = lambda module, *inputs: module(*inputs)
) -> Callable[..., jax.Array]:
    """A module that changes nothing of its own, as a function that keeps what ``remat`` says.

    Args:
      call: (module, inputs) -> what the function gives.
    """
    if remat == "none":
        return partial(call, module)
    graph, arrays = nnx.split(module)

    def again(arrays, *inputs):
        return call(nnx.merge(graph, arrays), *inputs)

    policy = getattr(jax.checkpoint_policies, remat)
    return partial(jax.checkpoint(again, policy=policy), arrays)


def torch_uniform(in_axis: int = -2):
    """PyTorch's default for Linear and Conv: uniform within +-1/sqrt(fan in)."""
    return nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=in_axis)


def linear(
    features_in: int, features_out: int, *, bias=False, init=None, dtype, rngs
) -> nnx.Linear:
    """A Linear layer with PyTorch's default initialisation, or with ``init``."""
    return Linear(
        features_in,
        features_out,
        use_bias=bias,
        kernel_init=init or torch_uniform(),
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def product(layer: nnx.Module, x: jax.Array) -> jax.Array:
    """x W of a Linear layer, or of what takes its place, without its bias."""
    if not isinstance(layer, nnx.Linear):
        return layer.product(x)
    return x.astype(layer.dtype) @ layer.kernel[...].astype(layer.dtype)


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in fp32, in the dtype of x."""
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

    def streamed(self, stream: Stream, kernels: str, **more) -> tuple[jax.Array, ...]:
        """(sum, modulated norm) of a stream; ``more``: shift, scale and fp8 of `Stream.normed`."""
        return stream.normed(kernels, weight=self.weight[...], eps=self.eps, **more)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Mean 0 and variance 1 over the last axis, computed in fp32, in the dtype of x."""
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
    """Cosines and sines of the 2-D rotary embedding, each [grid^2, head_dim / 2].

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
    """Rotates [B, N, heads, head_dim] by a `rope_table`; computed in fp32."""
    cos, sin = (jnp.asarray(part)[None, :, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


# How softmax(q k^T) v is computed: by XLA, by cuDNN's fused kernel, or together with norm and
# rotation of q and k by `attention_kernel`. "auto" takes the last of these that runs. "mosaic" is
# `mosaic_attention`, for TPUs, which "auto" leaves alone: nobody has measured it.
ATTENTIONS = ("auto", "xla", "cudnn", "triton", "mosaic")


def check_attention(attention: str) -> str:
    """The name; ValueError if it is none of `ATTENTIONS`."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; use one of {', '.join(ATTENTIONS)}")
    return attention


def cudnn_obstacle(dtype, head_dim: int) -> str | None:
    """Why cuDNN's fused attention cannot run, or None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"activations are {jnp.dtype(dtype)}, not bfloat16 or float16"
    if head_dim > 128 or head_dim % 8:
        return f"heads have {head_dim} channels, not a multiple of 8 up to 128"
    if jax.default_backend() != "gpu":
        return f"the device is a {jax.default_backend()}, not a gpu"
    # "9.0" on an NVIDIA GPU; AMD's have names instead
    generation = str(getattr(jax.local_devices()[0], "compute_capability", "")).split(".")[0]
    if not generation.isdigit() or int(generation) < 8:
        return "the GPU is older than NVIDIA's Ampere, or not NVIDIA's"
    return None


def attention_implementation(attention: str, dtype, head_dim: int) -> str:
    """ "xla" or "cudnn", for `jax.nn.dot_product_attention`.

    Raises:
      ValueError: for "cudnn" where it cannot run, or an unknown name.
    """
    if check_attention(attention) == "xla":
        return "xla"
    if attention == "mosaic":
        raise ValueError("attention 'mosaic' has no kernel of these heads; use 'auto' or 'xla'")
    obstacle = cudnn_obstacle(dtype, head_dim)
    if attention != "auto" and obstacle:
        raise ValueError(f"attention is {attention!r}, but {obstacle}; use 'auto' or 'xla'")
    found = "xla" if obstacle else "cudnn"
    if attention == "auto":
        _say_once(
            found,
            obstacle or f"half precision on a GPU; heads of {WIDTHS} channels in a kernel of ours",
        )
    return found


_said: list[str] = []


def _say_once(found: str, why: str) -> None:
    """The first choice of "auto" in this process, and no other."""
    if not _said:
        _said.append(found)
        logging.info("attention: %s (%s)", found, why)


class Attention(nnx.Module):
    """Multi-head self-attention as in the released GAE and LightningDiT.

    Args:
      dim: width of the tokens.
      num_heads: query heads.
      num_kv_heads: key and value heads, each shared by consecutive query heads.
      qk_norm: of q and k per head: None, "fixed" (RMSNorm without weight), "learned" (RMSNorm) or
        "layer" (LayerNorm with PyTorch's default epsilon).
      bias: biases in both Linear layers.
      features_out: width of the output; None: that of the tokens.
      attention: how it is computed, a name in `ATTENTIONS`; "auto" decides when it is called.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: str | None = "fixed",
        bias: bool = False,
        features_out: int | None = None,
        attention: str = "xla",
        init=None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} key/value heads")
        self.qk_norm, self.attention = qk_norm, check_attention(attention)
        self.head_dim = head_dim = dim // num_heads
        width = head_dim * (num_heads + 2 * self.num_kv_heads)
        make = partial(linear, bias=bias, init=init, dtype=dtype, rngs=rngs)
        self.qkv = make(dim, width)
        self.proj = make(dim, features_out or dim)
        if qk_norm in ("learned", "layer"):
            norm = RMSNorm if qk_norm == "learned" else partial(LayerNorm, eps=1e-5)
            self.q_norm = norm(head_dim, rngs=rngs)
            self.k_norm = norm(head_dim, rngs=rngs)

    def __call__(self, x: jax.Array, rope=None) -> jax.Array:
        """[B, N, C] -> [B, N, features_out]; ``rope`` is a `rope_table` or None."""
        return self.proj(self.heads(x, rope))

    def heads(self, x: jax.Array, rope=None) -> jax.Array:
        """What the heads find, side by side [B, N, C]: all but the last Linear layer."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if self.attention == "mosaic":
            return mosaic_attention.attend(self.qkv(x), rope, self._mosaic(x.shape[1]))
        if self._in_one_kernel(x.shape[1]):
            static = Heads(heads, self.head_dim, self.qk_norm)
            bias = None if self.qkv.bias is None else self.qkv.bias[...]
            return attend(product(self.qkv, x), bias, rope, static)
        qkv = rearrange(self.qkv(x), "b n (h d) -> b n h d", h=heads + 2 * kv_heads)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        if self.qk_norm == "fixed":
            q, k = rms_norm(q), rms_norm(k)
        elif self.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return self._attended(q, k, v)

    def _attended(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """softmax(q k^T / sqrt(head_dim)) v, the heads side by side."""
        implementation = attention_implementation(self.attention, v.dtype, v.shape[-1])
        out = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        return rearrange(out, "b n h d -> b n (h d)")

    def before_bias(self, x: jax.Array, rope, kernels: str) -> jax.Array:
        """All but the bias of proj; q, k and v by `rotation_kernel` where that has no obstacle."""
        if self._in_one_kernel(x.shape[1]) or self.rotation_obstacle(rope):
            return product(self.proj, self.heads(x, rope))
        static = Turned(self.num_heads, self.head_dim, kernels)
        x, bias = x.astype(self.qkv.dtype), self.qkv.bias[...]
        q, k, v = turned_heads(x, self.qkv.kernel[...], bias, rope, static)
        return product(self.proj, self._attended(q, k, v))

    def rotation_obstacle(self, rope) -> str | None:
        """Why `rotation_kernel` cannot make q, k and v, or None if it can."""
        if self.num_kv_heads != self.num_heads:
            return "heads share keys and values"
        if not isinstance(self.qkv, nnx.Linear):
            return "the product of qkv is another layer's than Linear"
        return rotation_obstacle(self.head_dim, self.qk_norm, rope, self.qkv.bias)

    def _mosaic(self, tokens: int) -> Heads:
        """What `mosaic_attention` is told; ValueError where it cannot run."""
        static = Heads(self.num_heads, self.head_dim, self.qk_norm)
        found = mosaic_attention.mosaic_obstacle(self.qkv.dtype, tokens, static, platform())
        if obstacle := found or self._shape_obstacle():
            raise ValueError(f"attention is 'mosaic', but {obstacle}; use 'auto' or 'xla'")
        return static

    def _shape_obstacle(self) -> str | None:
        """What no kernel of ours takes."""
        if splits_channels():
            return "mesh.tensor splits the heads"
        if self.num_kv_heads != self.num_heads:
            return "heads share keys and values"
        return None

    def _in_one_kernel(self, tokens: int) -> bool:
        """Whether `attention_kernel` computes it."""
        dtype = self.qkv.dtype
        how = attention_implementation(self.attention, dtype, self.head_dim)
        if how == "xla" or self.attention == "cudnn":
            return False
        static = Heads(self.num_heads, self.head_dim, self.qk_norm)
        obstacle = self._shape_obstacle() or attention_obstacle(dtype, tokens, static)
        if obstacle and self.attention == "triton":
            raise ValueError(f"attention is 'triton', but {obstacle}; use 'auto' or 'cudnn'")
        return obstacle is None


class SwiGLU(nnx.Module):
    """fc2(silu(fc1 x) * gate x) without biases, as in the released GAE."""

    def __init__(self, dim: int, hidden: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        make = partial(linear, dtype=dtype, rngs=rngs)
        self.fc1 = make(dim, hidden)
        self.gate = make(dim, hidden)
        self.fc2 = make(hidden, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(x)) * self.gate(x))


class Mlp(nnx.Module):
    """fc2(gelu(fc1 x)) with biases; ``approximate`` takes the GELU with a tanh."""

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
    """[B, H, W, C] -> [B, N, p*p*C]: row-major patches, each (row, column, channel)."""
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: jax.Array, patch_size: int) -> jax.Array:
    """[B, N, p*p*C] -> [B, H, W, C] for a square grid; the inverse of `patchify`."""
    grid = math.isqrt(tokens.shape[1])
    return rearrange(
        tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=grid, p=patch_size, q=patch_size
    )


def sincos_table(dim: int, grid: int, base: float = 10_000.0) -> np.ndarray:
    """The fixed 2-D position table of MAE and DiT, [grid^2, dim] in fp32.

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
