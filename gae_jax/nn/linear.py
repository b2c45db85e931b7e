"""A Linear layer whose bias gradient is cheaper on TPUs."""

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.runtime.mesh import platform


class Linear(nnx.Linear):
    """Flax's Linear; on a TPU in bf16 the bias has the gradient of `add_bias`."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # no out_sharding
        """[..., features_in] -> [..., features_out] in ``dtype``."""
        if self.bias is None or platform() != "tpu" or jnp.dtype(self.dtype) != jnp.bfloat16:
            return super().__call__(x)
        kernel, bias = (part[...].astype(self.dtype) for part in (self.kernel, self.bias))
        return add_bias(x.astype(self.dtype) @ kernel, bias)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Add a bias: x [..., C] + bias [C], of the same dtype.

    The gradient of the bias is a matmul with ones, accumulated in fp32, instead of a sum: XLA's
    compiler for TPUs estimates a sixth of the cycles (docs/performance_tpu.md).
    """
    return x + bias


ROWS = 8  # of ones: a tile of the matrix unit; XLA would turn a single row into a sum again


def _bias_backward(_, on: jax.Array) -> tuple[jax.Array, jax.Array]:
    # the barrier keeps XLA from seeing that they are ones
    ones = jax.lax.optimization_barrier(jnp.ones((ROWS, *on.shape[:-1]), on.dtype))
    axes = tuple(range(on.ndim - 1))
    total = jax.lax.dot_general(
        ones,
        on,
        ((tuple(axis + 1 for axis in axes), axes), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return on, total[0].astype(on.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, None), _bias_backward)
