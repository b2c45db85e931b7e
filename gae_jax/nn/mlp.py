"""The MLPs of transformers, computed by XLA or by kernels."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.kernels.fp8 import Scaled, unscaled
from gae_jax.kernels.stream import Stream
from gae_jax.kernels.swiglu import swiglu_fp8, swiglu_obstacle
from gae_jax.kernels.swiglu_matmul import matmul_swiglu
from gae_jax.nn.layers import bias_of, linear, matmul
from gae_jax.nn.quantized import QuantizedLinear, unscaled_matmul

XAVIER = nnx.initializers.xavier_uniform()


class FusedSwiGLU(nnx.Module):
    """w3(silu(a) * b) with (a, b) = split(w12 x), with biases."""

    def __init__(self, dim: int, hidden: int, *, init=XAVIER, dtype, rngs: nnx.Rngs):
        make = partial(linear, bias=True, init=init, dtype=dtype, rngs=rngs)
        self.w12 = make(dim, 2 * hidden)
        self.w3 = make(hidden, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(gate) * value)

    def streamed(self, x: jax.Array | Scaled, kernels: str) -> dict[str, jax.Array]:
        """Compute the MLP by kernels; return the fields of the `Stream` that adds its output."""
        w12, biases = self.w12, (bias_of(self.w12), bias_of(self.w3))
        if not isinstance(self.w3, QuantizedLinear):
            x = unscaled(x).astype(w12.dtype)
            hidden = matmul_swiglu(x, w12.kernel[...], biases[0], kernels)
            return dict(y=matmul(self.w3, hidden), bias=biases[1])
        columns = [layer.scale[...] for layer in (w12, self.w3)]
        hidden = Scaled(
            *swiglu_fp8(w12.unscaled_matmul(x), biases[0], x.scale, columns[0], kernels)
        )
        y = self.w3.unscaled_matmul(hidden)
        return dict(y=y, bias=biases[1], rows=hidden.scale, columns=columns[1])


def mlp_hidden(dim: int, mlp_ratio: float) -> int:
    """Return the hidden width of the SwiGLU: 2/3 dim * mlp_ratio, up to a multiple of 256."""
    return -(-int(dim * mlp_ratio * 2 / 3) // 256) * 256


class SwiGLU(nnx.Module):
    """fc2(silu(fc1 x) * gate x) without biases, as in the released GAE."""

    def __init__(self, dim: int, hidden: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        make = partial(linear, dtype=dtype, rngs=rngs)
        self.fc1 = make(dim, hidden)
        self.gate = make(dim, hidden)
        self.fc2 = make(hidden, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(x)) * self.gate(x))

    @property
    def obstacle(self) -> str | None:
        """Return why `streamed` cannot compute these layers, or None if it can."""
        first = self.fc1, self.gate
        if not all(isinstance(layer, nnx.Linear | QuantizedLinear) for layer in first):
            return "fc1 and gate are other layers than Linear"
        return swiglu_obstacle(self.fc1.out_features)

    def streamed(self, x: jax.Array, h: jax.Array | Scaled, kernels: str) -> Stream:
        """Return the stream of x plus the MLP of h [B, N, C], by kernels.

        fc1 and gate are one matmul.
        """
        first = self.fc1, self.gate
        no_bias = jnp.zeros((2 * self.fc1.out_features,), jnp.float32)
        if not isinstance(self.fc2, QuantizedLinear):
            matrix = jnp.concatenate([layer.kernel[...] for layer in first], axis=1)
            hidden = matmul_swiglu(unscaled(h).astype(self.fc1.dtype), matrix, no_bias, kernels)
            return Stream(x + self.fc2(hidden))
        columns = jnp.concatenate([layer.scale[...] for layer in first])
        rounded = swiglu_fp8(unscaled_matmul(first, h), no_bias, h.scale, columns, kernels)
        hidden = Scaled(*rounded)
        y = self.fc2.unscaled_matmul(hidden)
        return Stream(x, y, rows=hidden.scale, columns=self.fc2.scale[...])
