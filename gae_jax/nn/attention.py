"""Self-attention, and by what it is computed."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.kernels import tpu_attention as mosaic_attention
from gae_jax.kernels.attention import WIDTHS, Heads, attend, attend_once, attention_obstacle
from gae_jax.kernels.fp8 import Scaled, quantize
from gae_jax.kernels.rope import Turned, rotation_obstacle, turned_heads
from gae_jax.nn.layers import LayerNorm, RMSNorm, apply_rope, linear, product, rms_norm
from gae_jax.nn.quantized import QuantizedLinear
from gae_jax.runtime.mesh import platform, splits_channels

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

    def __call__(self, x: jax.Array | Scaled, rope=None) -> jax.Array:
        """[B, N, C] -> [B, N, features_out]; ``rope`` is a `rope_table` or None."""
        return self.proj(self.heads(x, rope))

    def heads(self, x: jax.Array | Scaled, rope=None) -> jax.Array:
        """What the heads find, side by side [B, N, C]: all but the last Linear layer."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if self.attention == "mosaic":
            return mosaic_attention.attend(self.qkv(x), rope, self._mosaic(x.shape[1]))
        if self._in_one_kernel(x.shape[1]):
            static = Heads(heads, self.head_dim, self.qk_norm)
            if isinstance(self.qkv, QuantizedLinear) and self.qkv.bias is None:
                x = x if isinstance(x, Scaled) else quantize(x)
                factors = x.scale, self.qkv.scale[...]
                return attend_once(self.qkv.unscaled(x), factors, rope, static)
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
