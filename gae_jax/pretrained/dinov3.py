"""The ViTs of DINOv3 (arXiv 2508.10104), as released.

Arguments are named as in the config of Hugging Face transformers (DINOv3ViTModel), attributes as in
our other encoders. There is no position table: queries and keys of patches are rotated.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from gae_jax.kernels.fp8 import Scaled
from gae_jax.nn.attention import Attention
from gae_jax.nn.layers import LayerNorm, apply_rope, linear
from gae_jax.nn.vit import PatchEmbed, position_table
from gae_jax.pretrained.vision import NORMAL, VisionBlock, VisionEncoder

ROPE_BASE = 100.0  # of every released network

# The released networks, all of patch 16 with four registers (facebookresearch/dinov3,
# `dinov3/hub/backbones.py`).
PRESETS = {
    name: dict(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=hidden,
        use_gated_mlp=gated,
        qkv_bias=name != "7b",
    )
    for name, width, depth, heads, hidden, gated in (
        ("small", 384, 12, 6, 1536, False),
        ("small_plus", 384, 12, 6, 1536, True),
        ("base", 768, 12, 12, 3072, False),
        ("large", 1024, 24, 16, 4096, False),
        ("huge_plus", 1280, 32, 20, 5120, True),
        ("7b", 4096, 40, 32, 8192, True),
    )
}


class Dinov3Attention(Attention):
    """Attention by XLA in which queries and values have a bias and keys have none.

    The biases are outside of the Linear layer, which `quantized` and `lora` may thus replace.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, dtype, rngs: nnx.Rngs):
        options = dict(init=NORMAL, dtype=dtype, rngs=rngs)
        super().__init__(dim, num_heads, qk_norm=None, bias=True, **options)
        self.qkv = linear(dim, 3 * dim, **options)
        self.q_bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if qkv_bias else None
        self.v_bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if qkv_bias else None

    def heads(self, x: jax.Array | Scaled, rope=None) -> jax.Array:
        """Compute all but the last Linear layer, as `Attention.heads`."""
        # x is Scaled only if qkv is a QuantizedLinear
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)  # type: ignore[arg-type]
        if self.q_bias is not None and self.v_bias is not None:
            q, v = q + self.q_bias[...].astype(q.dtype), v + self.v_bias[...].astype(v.dtype)
        q, k, v = (rearrange(part, "b n (h d) -> b n h d", h=self.num_heads) for part in (q, k, v))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return self._attended(q, k, v)


class Dinov3Block(VisionBlock):
    """A `VisionBlock` with `Dinov3Attention`; ``options``: its other arguments."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, *, qkv_bias: bool, dtype, rngs, **options
    ):
        super().__init__(dim, num_heads, hidden, dtype=dtype, rngs=rngs, **options)
        self.attn = Dinov3Attention(dim, num_heads, qkv_bias=qkv_bias, dtype=dtype, rngs=rngs)


class Dinov3(VisionEncoder):
    """DINOv3: images, normalised by ImageNet's mean and std -> tokens.

    Args:
      hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the transformer.
      patch_size: in pixels; images may have any size that is a multiple of it.
      num_register_tokens: "storage tokens" of the release.
      use_gated_mlp: SwiGLU instead of the GELU MLP, of the same hidden width.
      qkv_bias: whether queries and values have biases; keys never have one.
      use_mask_token: whether to have the mask token, which only pretraining uses and every released
        checkpoint holds.
      rope_theta: base of the rotation's periods.
      layer_norm_eps: of all norms.
      layerscale_value: initial value of the layer scales.

    Raises:
      ValueError: if heads have a number of channels that is no multiple of 4.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        patch_size: int = 16,
        num_register_tokens: int = 4,
        use_gated_mlp: bool = False,
        qkv_bias: bool = True,
        use_mask_token: bool = True,
        rope_theta: float = ROPE_BASE,
        layer_norm_eps: float = 1e-5,
        layerscale_value: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of 4 x num_attention_heads "
                f"{num_attention_heads}: a quarter of a head's channels is rotated by each angle"
            )
        self.rope_theta, self.head_dim = rope_theta, hidden_size // num_attention_heads
        self.pos_embed = None
        self.cls_token = position_table(rngs, 1, hidden_size)
        self.mask_token = (
            nnx.Param(jnp.zeros((1, 1, hidden_size), jnp.float32)) if use_mask_token else None
        )
        self.register_tokens = (
            position_table(rngs, num_register_tokens, hidden_size) if num_register_tokens else None
        )
        self.patch_embed = PatchEmbed(
            3, hidden_size, patch_size, bias=True, init=NORMAL, dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List(
            Dinov3Block(
                hidden_size,
                num_attention_heads,
                intermediate_size,
                eps=layer_norm_eps,
                layer_scale=layerscale_value,
                swiglu=use_gated_mlp,
                qkv_bias=qkv_bias,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(num_hidden_layers)
        )
        self.norm = LayerNorm(hidden_size, eps=layer_norm_eps, rngs=rngs)

    def rotation(self, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the `rotation_table` of all tokens, with angles of 0 for CLS and registers."""
        cos, sin = rotation_table(grid, self.head_dim, self.rope_theta)
        still = np.zeros((self.leading_tokens, self.head_dim // 2), np.float32)
        return np.concatenate([still + 1, cos]), np.concatenate([still, sin])


def rotation_table(
    grid: tuple[int, int], head_dim: int, base: float = ROPE_BASE
) -> tuple[np.ndarray, np.ndarray]:
    """Compute cosines and sines for `layers.apply_rope`, each [h * w, head_dim / 2] in fp32.

    The first half of the angles is of the row, the second of the column: 2 pi y / base^(4i /
    head_dim), where y in [-1, 1] is the patch's centre on an axis whose ends are the image's edges
    (transformers, DINOv3ViTRopePositionEmbedding, nothing drawn).
    """
    periods = base ** (np.arange(head_dim // 4, dtype=np.float64) / (head_dim // 4))
    rows, columns = (2 * (np.arange(size) + 0.5) / size - 1 for size in grid)
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = (2 * np.pi * places / periods).reshape(-1, head_dim // 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
