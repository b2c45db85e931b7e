"""DiT-DH: a LightningDiT whose velocity comes from a wide and shallow head (arXiv 2510.11690).

RAE's latents have more channels than a backbone of the usual width can denoise, so the backbone
only makes one condition per token, and two wide blocks do the rest. Names, arguments and
initialisation are those of the released code (bytetriper/RAE, `DiTwDDTHead`).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.generators.dit import (
    DiTBlock,
    FinalLayer,
    FourierTimestepEmbedder,
    LabelEmbedder,
    LightningDiT,
)
from gae_jax.nn.layers import (
    Buffer,
    check_remat,
    linear,
    rematerialize,
    rope_table,
    sincos_table,
    unpatchify,
)
from gae_jax.nn.mlp import XAVIER
from gae_jax.nn.vit import PatchEmbed
from gae_jax.runtime.mesh import constrain

# The released models, as arguments of `DiTwDDTHead`: (backbone, head).
SIZES = {
    "DH-S": dict(hidden_size=(384, 2048), depth=(12, 2), num_heads=(6, 16)),
    "DH-XL": dict(hidden_size=(1152, 2048), depth=(28, 2), num_heads=(16, 16)),
}


class DiTwDDTHead(nnx.Module):
    """Velocity of the flow: (x [B, S, S, C], t [B], labels [B]) -> [B, S, S, C]; zero at first.

    In released weights t = 0 is data and t = 1 noise, the opposite of `LightningDiT`, and the
    velocity points to the noise. Label ``num_classes`` means "no class"; there is none if
    ``class_dropout_prob`` is 0.

    Args:
      input_size: S, the edge of the latent grid.
      in_channels: C.
      patch_size: latent pixels per token edge.
      hidden_size, depth, num_heads: of the backbone and of the head.
      mlp_ratio, use_qknorm, use_swiglu, use_rope, use_rmsnorm, wo_shift: of the blocks of both, as
        `dit.LightningDiT`.
      num_classes: classes, without the null class.
      class_dropout_prob: share of training labels replaced by the null class.
      use_pos_embed: adds the fixed position table to the backbone's tokens, never to the head's;
        otherwise there is none.
      remat: of the blocks, as `layers.REMAT`.
      attention: how it is computed, as `attention.ATTENTIONS`.
    """

    def __init__(
        self,
        *,
        input_size: int = 16,
        in_channels: int = 768,
        patch_size: int = 1,
        hidden_size: tuple[int, int] = (1152, 2048),
        depth: tuple[int, int] = (28, 2),
        num_heads: tuple[int, int] = (16, 16),
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_pos_embed: bool = True,
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.num_classes = patch_size, num_classes
        self.class_dropout_prob = class_dropout_prob
        self.backbone_depth, self.use_rope = depth[0], use_rope
        self.remat = check_remat(remat)
        grid = input_size // patch_size
        self.rope_shapes = tuple(
            (grid, width // heads) for width, heads in zip(hidden_size, num_heads, strict=True)
        )
        width, wide = hidden_size
        common = dict(dtype=dtype, rngs=rngs)
        embed: Callable[..., PatchEmbed] = partial(
            PatchEmbed, in_channels, bias=True, init=XAVIER, **common
        )
        self.s_embedder = nnx.Dict(proj=embed(width, patch_size))
        self.x_embedder = nnx.Dict(proj=embed(wide, patch_size))
        self.s_projector = linear(width, wide, bias=True, **common) if width != wide else None
        self.t_embedder = FourierTimestepEmbedder(width, **common)
        self.y_embedder = LabelEmbedder(
            num_classes, width, null_class=class_dropout_prob > 0, **common
        )
        self.pos_embed = (
            Buffer(jnp.asarray(sincos_table(width, grid))[None]) if use_pos_embed else None
        )
        self.blocks = nnx.List(
            DiTBlock(
                hidden_size[part],
                num_heads[part],
                mlp_ratio=mlp_ratio,
                use_qknorm=use_qknorm,
                use_swiglu=use_swiglu,
                use_rmsnorm=use_rmsnorm,
                wo_shift=wo_shift,
                attention=attention,
                init=None,
                **common,
            )
            for part in (0, 1)
            for _ in range(depth[part])
        )
        self.final_layer = FinalLayer(
            wide, in_channels * patch_size**2, use_rmsnorm=use_rmsnorm, **common
        )

    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return self.head(x, self.condition(x, t, labels))

    def condition(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """Compute the backbone's condition for the head, per token [B, N, width of the head]."""
        time = self.t_embedder(t)[:, None]
        c = jax.nn.silu(time + self.y_embedder(labels)[:, None])
        s = self.s_embedder["proj"](x)
        if self.pos_embed is not None:
            s = s + self.pos_embed[...].astype(s.dtype)
        s = self._through(self.blocks[: self.backbone_depth], s, c, self.rope_shapes[0])
        s = jax.nn.silu(time + s)
        return s if self.s_projector is None else self.s_projector(s)

    def head(self, x: jax.Array, s: jax.Array) -> jax.Array:
        """Compute the velocity in fp32 from x [B, S, S, C] and its tokens' conditions."""
        tokens = self.x_embedder["proj"](x)
        tokens = self._through(self.blocks[self.backbone_depth :], tokens, s, self.rope_shapes[1])
        return unpatchify(self.final_layer(tokens, s).astype(jnp.float32), self.patch_size)

    def _through(self, blocks, tokens, c, rope_shape) -> jax.Array:
        rope = rope_table(*rope_shape) if self.use_rope else None
        for block in blocks:
            tokens = rematerialize(block, self.remat)(constrain(tokens), c, rope)
        return tokens

    drop_labels = LightningDiT.drop_labels  # which asks the same attributes
