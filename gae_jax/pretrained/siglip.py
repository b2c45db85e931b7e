"""The vision tower of SigLIP 2 (arXiv 2502.14786) at one resolution, as released.

Arguments are named as in the config of Hugging Face transformers (SiglipVisionModel, the class of
the checkpoints of SigLIP and of SigLIP 2 with a fixed resolution). The pooling head, which makes
one vector of the tokens, is left out: no tokenizer needs it.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.layers import LayerNorm
from gae_jax.nn.vit import PatchEmbed, position_table
from gae_jax.pretrained.vision import NORMAL, VisionBlock, VisionEncoder

# The released networks with patches of 16 pixels (transformers, `convert_siglip_to_hf.py`).
PRESETS = {
    name: dict(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=hidden,
    )
    for name, width, depth, heads, hidden in (
        ("base", 768, 12, 12, 3072),
        ("large", 1024, 24, 16, 4096),
        ("so400m", 1152, 27, 16, 4304),
        ("giant_opt", 1536, 40, 16, 6144),
    )
}


class SiglipVision(VisionEncoder):
    """SigLIP 2: images in [-1, 1], which is mean and std .5 -> tokens of the patches.

    There are no CLS token and no registers. The GELU is the one with tanh.

    Args:
      hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the transformer.
      image_size, patch_size: in pixels, of the position table; images of other sizes that are
        multiples of the patch get an interpolated table (``interpolate_pos_encoding=True``).
      layer_norm_eps: of all norms.
    """

    image_mean = np.full(3, 0.5, np.float32)
    image_std = np.full(3, 0.5, np.float32)

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        image_size: int = 256,
        patch_size: int = 16,
        layer_norm_eps: float = 1e-6,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.cls_token = self.register_tokens = None
        self.pos_embed = position_table(rngs, (image_size // patch_size) ** 2, hidden_size)
        self.patch_embed = PatchEmbed(
            3, hidden_size, patch_size, bias=True, init=NORMAL, dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List(
            VisionBlock(
                hidden_size,
                num_attention_heads,
                intermediate_size,
                eps=layer_norm_eps,
                approximate=True,
                dtype=dtype,
                rngs=rngs,
            )
            for _ in range(num_hidden_layers)
        )
        self.norm = LayerNorm(hidden_size, eps=layer_norm_eps, rngs=rngs)
