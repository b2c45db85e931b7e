"""PyTorch's default initialisation, for networks that were trained from it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.vit import PatchEmbed


def start_as_torch(module: nnx.Module, rngs: nnx.Rngs) -> None:
    """Redraw kernels and biases of all Linear layers and convolutions as PyTorch would.

    Both are uniform in +-1/sqrt(fan in) (`torch.nn.Linear.reset_parameters` and
    `torch.nn.Conv2d.reset_parameters`); NNX would start biases at zero. Other parameters, such as
    those of norms, are unchanged.
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
