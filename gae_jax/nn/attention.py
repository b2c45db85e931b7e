"""Self-attention, and the choice of its implementation."""

import logging
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.kernels.attention import WIDTHS, Heads, attend, attend_fp8, attention_obstacle
from gae_jax.kernels.fp8 import Scaled, quantize, unscaled
from gae_jax.kernels.rope import RotatedHeads, rotated_heads, rotation_obstacle
from gae_jax.nn.layers import LayerNorm, RMSNorm, apply_rope, bias_of, linear, matmul, rms_norm
from gae_jax.nn.quantized import QuantizedLinear
from gae_jax.runtime.mesh import splits_channels

# How softmax(q k^T) v is computed: by XLA, by cuDNN's fused kernel, or together with norm and
# rotation of q and k by `kernels.attention` ("triton"). "auto" takes the last of these that runs.
ATTENTIONS = ("auto", "xla", "cudnn", "triton")


def check_attention(attention: str) -> str:
    """Return the name; raise ValueError if it is not one of `ATTENTIONS`."""
    if attention not in ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; use one of {', '.join(ATTENTIONS)}")
    return attention


def cudnn_obstacle(dtype, head_dim: int) -> str | None:
    """Return why cuDNN's fused attention cannot run, or None if it can."""
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


def attention_implementation(attention: str, dtype, head_dim: int) -> Literal["xla", "cudnn"]:
    """Choose "xla" or "cudnn" for `jax.nn.dot_product_attention`.

    Raises:
      ValueError: for "cudnn" where it cannot run, or an unknown name.
    """
    if check_attention(attention) == "xla":
        return "xla"
    obstacle = cudnn_obstacle(dtype, head_dim)
    if attention != "auto" and obstacle:
        raise ValueError(f"attention is {attention!r}, but {obstacle}; use 'auto' or 'xla'")
    choice: Literal["xla", "cudnn"] = "xla" if obstacle else "cudnn"
    if attention == "auto":
        reason = f"half precision on a GPU; heads of {WIDTHS} channels by our own kernel"
        _log_choice(choice, obstacle or reason)
    return choice


_logged: list[str] = []


def _log_choice(choice: str, reason: str) -> None:
    """Log the first choice of "auto" in this process, and no other."""
    if not _logged:
        _logged.append(choice)
        logging.info("attention: %s (%s)", choice, reason)


class Attention(nnx.Module):
    """Multi-head self-attention as in the released GAE and LightningDiT.

    Args:
      dim: width of the tokens.
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads, each shared by consecutive query heads.
      qk_norm: norm of q and k per head: None, "fixed" (RMSNorm without weight), "learned" (RMSNorm)
        or "layer" (LayerNorm with PyTorch's default epsilon).
      bias: whether both Linear layers have biases.
      features_out: width of the output; None: that of the tokens.
      attention: implementation, a name in `ATTENTIONS`; "auto" decides when it is called.
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
        """Return the heads' outputs side by side [B, N, C]: all but the last Linear layer."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if self._in_one_kernel(x.shape[1]):
            static = Heads(heads, self.head_dim, self.qk_norm)
            if isinstance(self.qkv, QuantizedLinear) and self.qkv.bias is None:
                x = x if isinstance(x, Scaled) else quantize(x)
                factors = x.scale, self.qkv.scale[...]
                return attend_fp8(self.qkv.unscaled_matmul(x), factors, rope, static)
            bias = None if self.qkv.bias is None else self.qkv.bias[...]
            return attend(matmul(self.qkv, x), bias, rope, static)
        # x is Scaled only if qkv is a QuantizedLinear
        qkv = self.qkv(x)  # type: ignore[arg-type]
        qkv = rearrange(qkv, "b n (h d) -> b n h d", h=heads + 2 * kv_heads)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        if self.qk_norm == "fixed":
            q, k = rms_norm(q), rms_norm(k)
        elif self.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return self._attended(q, k, v)

    def _attended(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Compute softmax(q k^T / sqrt(head_dim)) v, heads side by side: [B, N, heads head_dim].

        Args:
          q, k, v: [B, N, heads, head_dim].
        """
        implementation = attention_implementation(self.attention, v.dtype, v.shape[-1])
        out = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        return rearrange(out, "b n h d -> b n (h d)")

    def without_bias(self, x: jax.Array | Scaled, rope, kernels: str) -> jax.Array:
        """Compute `__call__` without the bias of proj [B, N, features_out].

        q, k and v are made by `kernels.rope` where that can run.
        """
        if self._in_one_kernel(x.shape[1]) or self.rotation_obstacle(rope):
            return matmul(self.proj, self.heads(x, rope))
        static = RotatedHeads(self.num_heads, self.head_dim, kernels)
        x, bias = unscaled(x).astype(self.qkv.dtype), bias_of(self.qkv)
        q, k, v = rotated_heads(x, self.qkv.kernel[...], bias, rope, static)
        return matmul(self.proj, self._attended(q, k, v))

    def rotation_obstacle(self, rope) -> str | None:
        """Return why `kernels.rope` cannot make q, k and v, or None if it can."""
        if self.num_kv_heads != self.num_heads:
            return "heads share keys and values"
        if not isinstance(self.qkv, nnx.Linear):
            return "qkv is not a Linear layer"
        return rotation_obstacle(self.head_dim, self.qk_norm, rope, self.qkv.bias)

    def _in_one_kernel(self, tokens: int) -> bool:
        """Return whether `kernels.attention` computes it."""
        dtype = self.qkv.dtype
        implementation = attention_implementation(self.attention, dtype, self.head_dim)
        if implementation == "xla" or self.attention == "cudnn":
            return False
        static = Heads(self.num_heads, self.head_dim, self.qk_norm)
        obstacle = attention_obstacle(dtype, tokens, static)
        if self.num_kv_heads != self.num_heads:
            obstacle = "heads share keys and values"
        if splits_channels():
            obstacle = "mesh.tensor splits the heads"
        if obstacle and self.attention == "triton":
            raise ValueError(f"attention is 'triton', but {obstacle}; use 'auto' or 'cudnn'")
        return obstacle is None
