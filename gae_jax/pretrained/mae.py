"""The encoder of MAE (arXiv 2111.06377), without masking.

Arguments are named as in the config of Hugging Face transformers (ViTMAEModel).
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.layers import Buffer, LayerNorm, sincos_table
from gae_jax.nn.vit import PatchEmbed, position_table
from gae_jax.pretrained.vision import NORMAL, VisionBlock, VisionEncoder

# The released networks.
PRESETS = {
    "base": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "large": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}


class MAEEncoder(VisionEncoder):
    """ViT encoder of MAE: images, normalised by ImageNet's mean and std -> tokens.

    It equals ViTMAEModel with mask ratio 0, the tokens in their order, and positions interpolated
    where the input has another size (``interpolate_pos_encoding=True``).

    Args:
      hidden_size, num_hidden_layers, num_attention_heads: of the transformer.
      intermediate_size: hidden width of the MLP.
      image_size, patch_size: in pixels, of the position table, which is fixed; images of other
        sizes that are multiples of the patch get an interpolated table.
      layer_norm_eps: of all norms.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        image_size: int = 224,
        patch_size: int = 16,
        layer_norm_eps: float = 1e-12,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.register_tokens = None
        self.cls_token = position_table(rngs, 1, hidden_size)
        patches = sincos_table(hidden_size, image_size // patch_size)
        table = np.concatenate([np.zeros_like(patches[:1]), patches])  # CLS has position 0
        self.pos_embed = Buffer(jnp.asarray(table)[None])
        self.patch_embed = PatchEmbed(
            3, hidden_size, patch_size, bias=True, init=NORMAL, dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List(
            VisionBlock(
                hidden_size,
                num_attention_heads,
                intermediate_size,
                eps=layer_norm_eps,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(num_hidden_layers)
        )
        self.norm = LayerNorm(hidden_size, eps=layer_norm_eps, rngs=rngs)
