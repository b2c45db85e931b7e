"""PyTorch's default start values, for networks that were trained from them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.vit import PatchEmbed


def start_as_torch(module: nnx.Module, rngs: nnx.Rngs) -> None:
    """Draws kernels and biases of all Linear layers and convolutions anew, as PyTorch would.

    Both are uniform within +-1/sqrt(fan in) (`torch.nn.Linear.reset_parameters` and
    `torch.nn.Conv2d.reset_parameters`); biases start at zero in NNX. What is neither, norms and
    tokens, stays.
    """
    for _, part in nnx.iter_modules(module):
        if not isinstance(part, nnx.Linear | nnx.Conv | PatchEmbed):
            continue
        bound = 1 / math.sqrt(math.prod(part.kernel.shape[:-1]))
        for parameter in (part.kernel, part.bias):
            if parameter is not None:
                draw = jax.random.uniform(
                    rngs.params(), parameter.shape, jnp.float32, minval=-bound, maxval=bound
                )
                parameter.set_value(draw)
