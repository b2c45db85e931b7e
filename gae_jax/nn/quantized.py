"""Products of fp8 numbers, for networks that are only called.

A product x W of float8_e4m3fn numbers is summed up by the matrix units of NVIDIA's Ada, Hopper and
later, at up to twice bf16's rate. W has a scale per output channel and is rounded once; x has one
per token and is rounded when it comes.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gae_jax.kernels.fp8 import Scaled, quantize
from gae_jax.nn.layers import Buffer
from gae_jax.nn.lora import merged
from gae_jax.nn.network import Loaded, Network, variables_of
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.sharding import shard

MULTIPLE = 16  # of channels, for cuBLAS

# What numbers the products of a frozen network are of: those of its dtype, or fp8 in `LAYERS`.
PRODUCTS = ("same", "fp8")

# The Linear layers of transformers' blocks but for one: proj, a twelfth of the products, would by
# estimate gain no more than rounding what the heads found costs.
LAYERS = {"attn": ("qkv",), "mlp": ("w12", "w3", "fc1", "gate", "fc2")}


class QuantizedLinear(nnx.Module):
    """A Linear layer whose product is of fp8 numbers: [..., in] -> [..., out] in its dtype.

    The weights lie as [out, in], with the channels that are summed over side by side in both
    operands, as cuBLAS wants them, and are filled up to multiples of `MULTIPLE`.
    """

    def __init__(self, layer: nnx.Linear):
        self.out_features, self.dtype = layer.out_features, layer.dtype
        values, scale = quantize(layer.kernel[...].T)
        filled = jnp.pad(values, [(0, -size % MULTIPLE) for size in values.shape])
        self.quantized, self.scale = Buffer(filled), Buffer(scale[:, 0])
        self.bias = layer.bias

    def __call__(self, x: jax.Array | Scaled) -> jax.Array:
        y = self.product(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def product(self, x: jax.Array | Scaled) -> jax.Array:
        """x W, without the bias."""
        x = x if isinstance(x, Scaled) else quantize(x)
        y = self.unscaled(x).astype(jnp.float32)
        return (y * x.scale * self.scale[...]).astype(self.dtype)

    def unscaled(self, x: Scaled) -> jax.Array:
        """x W in the layer's dtype without the scales of tokens and channels, and the bias."""
        return unscaled((self,), x)


def unscaled(layers: Sequence[QuantizedLinear], x: Scaled) -> jax.Array:
    """`QuantizedLinear.unscaled` of layers side by side, in one product."""
    weights = [layer.quantized[...] for layer in layers]
    if len(layers) > 1:
        sizes = [layer.out_features for layer in layers]
        weights = [part[:size] for part, size in zip(weights, sizes, strict=True)]
        weights = [jnp.pad(jnp.concatenate(weights), ((0, -sum(sizes) % MULTIPLE), (0, 0)))]
    axis = x.values.ndim - 1
    fill = weights[0].shape[1] - x.shape[-1]
    values = jnp.pad(x.values, [(0, 0)] * axis + [(0, fill)]) if fill else x.values
    y = jax.lax.dot_general(
        values, weights[0], (((axis,), (1,)), ((), ())), preferred_element_type=layers[0].dtype
    )
    return y[..., : sum(layer.out_features for layer in layers)]


def normed_for(layer: nnx.Module, normed: Callable, kernels: str, **more):
    """(sum, norm) of a stream, the latter as the layer behind it reads numbers.

    Args:
      normed: `kernels.Stream.normed`, or what calls it.
    """
    if isinstance(layer, QuantizedLinear):
        x, *h = normed(kernels, fp8=True, **more)
        return x, Scaled(*h)
    return normed(kernels, **more)


def with_fp8_products(module: nnx.Module) -> nnx.Module:
    """The module, with `QuantizedLinear` in the place of all its `LAYERS`.

    Low-rank updates go into the layers that they belong to first.

    Raises:
      ValueError: if it has none of them.
    """
    module = merged(module)
    linears = [
        (part, name)
        for path, part in nnx.iter_modules(module)
        for name in LAYERS.get(path[-1] if path else "", ())
        if isinstance(getattr(part, name, None), nnx.Linear)
    ]
    if not linears:
        raise ValueError(f"products are 'fp8', but {type(module).__name__} has no layers for them")
    for part, name in linears:
        setattr(part, name, QuantizedLinear(getattr(part, name)))
    return module


def fp8_obstacle() -> str | None:
    """Why this machine's devices cannot multiply in fp8, or None if they can.

    CPUs can, for tests: they compute the same slowly.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    # "9.0" on an NVIDIA GPU; AMD's have names instead
    capability = str(getattr(device, "compute_capability", "")).split(".")
    if device.platform != "gpu" or not all(part.isdigit() for part in capability):
        return f"the device is a {device.device_kind}, not an NVIDIA GPU"
    if tuple(map(int, capability)) < (8, 9):
        return f"the device is a {device.device_kind}, older than NVIDIA's Ada and Hopper"
    return None


def multiplying(network: Network, products: str) -> Network:
    """A frozen network with Linear layers that multiply numbers as ``products`` says.

    Args:
      products: of `PRODUCTS`.

    Raises:
      ConfigError: where "fp8" cannot be had.
    """
    if products == "same":
        return network
    if obstacle := fp8_obstacle():
        raise ConfigError(f"products are {products!r}, but {obstacle}: use {PRODUCTS[0]!r}")
    try:
        return network.changed(with_fp8_products)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def rounding(network: Network, changed: Network, mesh: Mesh) -> Callable[[tuple], tuple]:
    """Of a network's arrays -> those of what `multiplying` made of it, on the mesh."""
    if changed is network:
        return lambda arrays: arrays

    def convert(arrays):
        return variables_of(with_fp8_products(network(*arrays)))

    return jax.jit(convert, out_shardings=shard(changed.abstract, mesh))


def with_products(loaded: Loaded, products: str, mesh: Mesh) -> Loaded:
    """As `multiplying`, with the arrays, on the mesh; raises as it does."""
    network = multiplying(loaded[0], products)
    return network, rounding(loaded[0], network, mesh)(loaded[1])
