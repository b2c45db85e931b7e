"""DINOv2 (arXiv 2304.07193) and DINOv2 with registers (arXiv 2309.16588), as released.

Arguments are named as in the configs of Hugging Face transformers (Dinov2Model,
Dinov2WithRegistersModel).
"""

import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.layers import LayerNorm
from gae_jax.nn.vit import PatchEmbed, position_table
from gae_jax.pretrained.vision import NORMAL, VisionBlock, VisionEncoder

_SIZES = {
    "small": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "giant": dict(
        hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True
    ),
}
# The released networks: "large", "large_registers", ...
PRESETS = _SIZES | {
    f"{name}_registers": sizes | dict(num_register_tokens=4) for name, sizes in _SIZES.items()
}


def swiglu_hidden(hidden_size: int, mlp_ratio: float) -> int:
    """Return the hidden width of the SwiGLU: 2/3 hidden_size * mlp_ratio, up to a multiple of 8."""
    return (int(int(hidden_size * mlp_ratio) * 2 / 3) + 7) // 8 * 8


class Dinov2(VisionEncoder):
    """DINOv2: images, normalised by ImageNet's mean and std -> tokens.

    Args:
      hidden_size, num_hidden_layers, num_attention_heads: of the transformer.
      mlp_ratio: hidden width of the MLP over hidden_size.
      image_size, patch_size: in pixels, of the position table; images of other sizes that are
        multiples of the patch get an interpolated table.
      num_register_tokens: with registers, the table is interpolated with antialias; without,
        not. That is how the two kinds were released.
      use_swiglu_ffn: SwiGLU instead of the GELU MLP (giant).
      use_mask_token: whether to have the mask token, which only pretraining uses and every released
        checkpoint holds. It is one of the 304,368,640 parameters of DINOv2-L.
      layer_norm_eps: of all norms.
      layerscale_value: initial value of the layer scales.
      interpolate_offset: 0 interpolates positions as transformers does; 0.1 as torch.hub does
        for networks without registers. See `positions.resize_matrix`.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        image_size: int = 518,
        patch_size: int = 14,
        num_register_tokens: int = 0,
        use_swiglu_ffn: bool = False,
        use_mask_token: bool = True,
        layer_norm_eps: float = 1e-6,
        layerscale_value: float = 1.0,
        interpolate_offset: float = 0.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.antialias = num_register_tokens > 0
        self.interpolate_offset = interpolate_offset
        self.cls_token = position_table(rngs, 1, hidden_size)
        self.mask_token = (
            nnx.Param(jnp.zeros((1, hidden_size), jnp.float32)) if use_mask_token else None
        )
        self.register_tokens = (
            position_table(rngs, num_register_tokens, hidden_size) if num_register_tokens else None
        )
        self.pos_embed = position_table(rngs, 1 + (image_size // patch_size) ** 2, hidden_size)
        self.patch_embed = PatchEmbed(
            3, hidden_size, patch_size, bias=True, init=NORMAL, dtype=dtype, rngs=rngs
        )
        hidden = (
            swiglu_hidden(hidden_size, mlp_ratio)
            if use_swiglu_ffn
            else int(hidden_size * mlp_ratio)
        )
        self.blocks = nnx.List(
            VisionBlock(
                hidden_size,
                num_attention_heads,
                hidden,
                eps=layer_norm_eps,
                layer_scale=layerscale_value,
                swiglu=use_swiglu_ffn,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(num_hidden_layers)
        )
        self.norm = LayerNorm(hidden_size, eps=layer_norm_eps, rngs=rngs)
