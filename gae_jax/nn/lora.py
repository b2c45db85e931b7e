"""LoRA (arXiv 2106.09685): low-rank updates of frozen Linear layers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.layers import Buffer, M, torch_uniform
from gae_jax.nn.linear import Linear

# Names of the Linear layers in the blocks of all encoders of this package: attention, and MLPs with
# a GELU, with a gate, and with both in one matrix. An encoder has some of them.
LAYERS = ("qkv", "proj", "fc1", "gate", "fc2", "w12", "w3")


class LowRankLinear(nnx.Module):
    """x W + b + alpha / rank * (x A) B: [..., features_in] -> [..., features_out].

    Kernel and bias keep the paths that they have in the layer. A is ``lora.lora_a``
    [features_in, rank], initialized like PyTorch's layers, B is ``lora.lora_b``
    [rank, features_out], initialized with zeros.

    Args:
      layer: whose kernel and bias it takes over, trainable or frozen.
      rank, alpha: of the update, both above 0.
    """

    def __init__(self, layer: nnx.Linear, *, rank: int, alpha: float, rngs: nnx.Rngs):
        sizes = layer.in_features, rank, layer.out_features
        self.kernel, self.bias, self.dtype = layer.kernel, layer.bias, layer.dtype
        self.scale = alpha / rank
        options = dict(dtype=layer.dtype, a_initializer=torch_uniform(), rngs=rngs)
        self.lora = nnx.LoRA(*sizes, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        """Compute all but the bias."""
        x = x.astype(self.dtype)
        return x @ self.kernel[...].astype(self.dtype) + self.scale * self.lora(x)

    def merged(self) -> nnx.Linear:
        """Return the frozen Linear layer with the kernel W + alpha / rank * A B."""
        a, b = self.lora.lora_a[...], self.lora.lora_b[...]
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        layer = nnx.eval_shape(
            lambda: Linear(
                self.lora.in_features,
                self.lora.out_features,
                use_bias=self.bias is not None,
                dtype=self.dtype,
                param_dtype=jnp.float32,
                rngs=nnx.Rngs(0),
            )
        )
        # frozen: a Buffer instead of Flax's Param
        layer.kernel = Buffer(self.kernel[...] + self.scale * update)  # type: ignore[assignment]
        layer.bias = self.bias
        return layer


def check_lora(rank: int, alpha: float, layers: Sequence[str], width: int) -> None:
    """Raise ValueError if `with_lora` cannot do this to an encoder of this width."""
    if not 0 <= rank <= width:
        raise ValueError(
            f"lora.rank is {rank}, but the encoder's layers are {width} wide; use 0 (no LoRA, the "
            f"encoder itself learns) or 1 to {width}"
        )
    if rank and alpha <= 0:
        raise ValueError(
            f"lora.alpha is {alpha}; it must be > 0 (the rank, here {rank}, weighs updates by 1)"
        )
    odd = [name for name in layers if name not in LAYERS]
    if rank and (odd or not layers):
        raise ValueError(f"lora.layers is {tuple(layers)}; name some of {', '.join(LAYERS)}")


def with_lora(module: M, *, rank: int, alpha: float, layers=LAYERS, rngs: nnx.Rngs) -> M:
    """Replace the Linear layers of these names in a module by `LowRankLinear`.

    Args:
      module: frozen, if only the updates are to be trained.
      layers: names among `LAYERS`.

    Raises:
      ValueError: if it has no such layer.
    """
    linears = [
        (part, name)
        for _, part in nnx.iter_modules(module)
        for name in LAYERS
        if isinstance(getattr(part, name, None), nnx.Linear)
    ]
    chosen = [(part, name) for part, name in linears if name in layers]
    if not chosen:
        present = sorted({name for _, name in linears}, key=LAYERS.index)
        raise ValueError(
            f"lora.layers is {tuple(layers)}, of which {type(module).__name__} has none; its "
            f"layers are {', '.join(present)}"
        )
    for part, name in chosen:
        setattr(part, name, LowRankLinear(getattr(part, name), rank=rank, alpha=alpha, rngs=rngs))
    return module


def merged(module: M) -> M:
    """Merge every low-rank update into its kernel: the same function with less work.

    For inference: ``network.changed(merged)`` with the arrays
    ``variables_of(merged(network(*arrays)))``, which have the names of the encoder without LoRA.
    """
    updated = [
        (part, name)
        for _, part in nnx.iter_modules(module)
        for name in LAYERS
        if isinstance(getattr(part, name, None), LowRankLinear)
    ]
    for part, name in updated:
        setattr(part, name, getattr(part, name).merged())
    return module
