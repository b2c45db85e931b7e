"""fp8 matmuls, for inference-only networks.

The matrix units of NVIDIA's Ada, Hopper and later GPUs multiply float8_e4m3fn numbers at up to
twice the rate of bf16. In x W, W has a scale per output channel and is rounded once; x has a scale
per token and is rounded in every call.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gae_jax.kernels.fp8 import Scaled, quantize
from gae_jax.nn.layers import Buffer, M
from gae_jax.nn.lora import merged
from gae_jax.nn.network import Arrays, Network, variables_of
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.sharding import shard

MULTIPLE = 16  # channels are padded to a multiple, for cuBLAS

# Matmuls of an inference-only network: in its dtype, or in fp8 in the layers of `LAYERS`.
MATMULS = ("same", "fp8")

# The Linear layers of transformer blocks but proj: with a twelfth of the operations it would gain,
# by estimate, no more than the rounding of its input costs.
LAYERS = {"attn": ("qkv",), "mlp": ("w12", "w3", "fc1", "gate", "fc2")}


class QuantizedLinear(nnx.Module):
    """A Linear layer with an fp8 matmul: [..., in] -> [..., out] in the layer's dtype.

    The weights are stored as [out, in], so that the summed channels are contiguous in both
    operands, as cuBLAS requires, and padded to multiples of `MULTIPLE`.
    """

    def __init__(self, layer: nnx.Linear):
        self.out_features, self.dtype = layer.out_features, layer.dtype
        values, scale = quantize(layer.kernel[...].T)
        filled = jnp.pad(values, [(0, -size % MULTIPLE) for size in values.shape])
        self.quantized, self.scale = Buffer(filled), Buffer(scale[:, 0])
        self.bias = layer.bias

    def __call__(self, x: jax.Array | Scaled) -> jax.Array:
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def matmul(self, x: jax.Array | Scaled) -> jax.Array:
        """Compute x W, without the bias."""
        x = x if isinstance(x, Scaled) else quantize(x)
        y = self.unscaled_matmul(x).astype(jnp.float32)
        return (y * x.scale * self.scale[...]).astype(self.dtype)

    def unscaled_matmul(self, x: Scaled) -> jax.Array:
        """Compute x W in the layer's dtype, without bias and scales of tokens and channels."""
        return unscaled_matmul((self,), x)


def unscaled_matmul(layers: Sequence[QuantizedLinear], x: Scaled) -> jax.Array:
    """Compute `QuantizedLinear.unscaled_matmul` of several layers in one matmul: [..., sum out]."""
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


def normed_for(
    layer: nnx.Module, normed: Callable, kernels: str, **options
) -> tuple[jax.Array, jax.Array | Scaled]:
    """Return (sum, norm) of a stream, the norm in fp8 if that is what the next layer takes.

    Args:
      layer: that takes the norm.
      normed: `kernels.stream.Stream.normed`, or a function that calls it with ``options``.
    """
    if isinstance(layer, QuantizedLinear):
        x, *h = normed(kernels, fp8=True, **options)
        return x, Scaled(*h)
    return normed(kernels, **options)


def with_fp8_matmuls(module: M) -> M:
    """Replace all `LAYERS` of a module by `QuantizedLinear`; LoRA updates are merged first.

    Raises:
      ValueError: if it has none of them.
    """
    module = merged(module)
    linears = [
        (part, name)
        for path, part in nnx.iter_modules(module)
        for name in LAYERS.get(str(path[-1]) if path else "", ())
        if isinstance(getattr(part, name, None), nnx.Linear)
    ]
    if not linears:
        raise ValueError(f"matmuls are 'fp8', but {type(module).__name__} has no layers for them")
    for part, name in linears:
        setattr(part, name, QuantizedLinear(getattr(part, name)))
    return module


def fp8_obstacle() -> str | None:
    """Return why this machine's devices cannot multiply in fp8, or None if they can.

    CPUs can, slowly, for tests.
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


def with_matmuls(network: Network, matmuls: str) -> Network:
    """Return an inference-only network with the matmuls that ``matmuls`` says.

    Args:
      matmuls: a name in `MATMULS`.

    Raises:
      ConfigError: if "fp8" is not possible on this device or for this network.
    """
    if matmuls == "same":
        return network
    if obstacle := fp8_obstacle():
        raise ConfigError(f"matmuls are {matmuls!r}, but {obstacle}: use {MATMULS[0]!r}")
    try:
        return network.changed(with_fp8_matmuls)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def weight_quantizer(network: Network, changed: Network, mesh: Mesh) -> Callable[[Arrays], Arrays]:
    """Return a function: arrays of a network -> arrays of its `with_matmuls`, on the mesh.

    Args:
      changed: what `with_matmuls` returned for the network.
    """
    if changed is network:
        return lambda arrays: arrays

    def convert(arrays):
        return variables_of(with_fp8_matmuls(network(*arrays)))

    return jax.jit(convert, out_shardings=shard(changed.abstract, mesh))
