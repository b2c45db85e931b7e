"""What the frozen vision encoders share: pre-norm blocks, tokens, position tables.

Images are [B, H, W, 3], already normalised as the encoder was trained; tokens are [B, N, C] in
row-major order.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from flax import nnx

from gae_jax.nn.attention import Attention
from gae_jax.nn.layers import LayerNorm, Mlp
from gae_jax.nn.mlp import FusedSwiGLU
from gae_jax.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.nn.positions import resize_positions
from gae_jax.nn.vit import PatchEmbed
from gae_jax.runtime.mesh import constrain

NORMAL = nnx.initializers.truncated_normal(0.02)


class LayerScale(nnx.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int, value: float, *, rngs: nnx.Rngs):
        del rngs  # nothing random
        self.gamma = nnx.Param(jnp.full((dim,), value, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...].astype(x.dtype)


class VisionBlock(nnx.Module):
    """x += ls1(attn(norm1 x)); x += ls2(mlp(norm2 x)).

    Args:
      dim, num_heads: width of the tokens, heads of the attention.
      hidden: width inside the MLP.
      eps: of both norms.
      layer_scale: initial value of ls1 and ls2; None leaves both out.
      swiglu: a SwiGLU instead of the GELU MLP.
      approximate: the GELU with tanh.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        eps: float,
        layer_scale: float | None = None,
        swiglu: bool = False,
        approximate: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm1 = LayerNorm(dim, eps=eps, rngs=rngs)
        self.attn = Attention(
            dim, num_heads, qk_norm=None, bias=True, init=NORMAL, dtype=dtype, rngs=rngs
        )
        self.norm2 = LayerNorm(dim, eps=eps, rngs=rngs)
        make_mlp = FusedSwiGLU if swiglu else partial(Mlp, init=NORMAL, approximate=approximate)
        self.mlp = make_mlp(dim, hidden, dtype=dtype, rngs=rngs)

        def scale() -> LayerScale | None:
            return None if layer_scale is None else LayerScale(dim, layer_scale, rngs=rngs)

        self.ls1, self.ls2 = scale(), scale()

    def __call__(self, x: jax.Array, rope=None) -> jax.Array:
        """[B, N, C] -> [B, N, C]; ``rope`` as `Attention`."""
        branch = self.attn(self.norm1(x), rope)
        x = x + (branch if self.ls1 is None else self.ls1(branch))
        branch = self.mlp(self.norm2(x))
        return x + (branch if self.ls2 is None else self.ls2(branch))


class VisionEncoder(nnx.Module):
    """A ViT: tokens of the image, and before them a CLS token and registers where it has them.

    Subclasses set ``patch_embed``, ``blocks`` and ``norm``, and of each of these what they have,
    else None: ``cls_token`` [1, 1, C], ``register_tokens`` [1, R, C], and a table of positions
    ``pos_embed`` [1, G*G, C], with one more position at its beginning for CLS. The table is
    interpolated to the grid of the input, as ``antialias`` and ``interpolate_offset`` say; see
    `resize_matrix`. `rotation` is for those that rotate queries and keys instead.

    Attributes:
      image_mean, image_std: of images in [0, 1], per channel, as the encoder was trained.
    """

    image_mean: np.ndarray = IMAGENET_MEAN
    image_std: np.ndarray = IMAGENET_STD
    cls_token: nnx.Param | None
    register_tokens: nnx.Param | None
    pos_embed: nnx.Variable | None
    patch_embed: PatchEmbed
    blocks: nnx.List
    norm: LayerNorm
    antialias: bool = False
    interpolate_offset: float = 0.0

    @property
    def leading_tokens(self) -> int:
        """Number of tokens before those of the patches: CLS and registers."""
        parts = (self.cls_token, self.register_tokens)
        return sum(part.shape[1] for part in parts if part is not None)

    def rotation(self, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the `rope` of `Attention` for all tokens of a grid (h, w); None: no rotation."""
        del grid
        return None

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Compute the last hidden state [B, leading + N, C] of images: CLS, registers, patches.

        Raises:
          ValueError: if H or W is not a multiple of the patch size.
        """
        return self.norm(self._tokens(pixel_values)[-1])

    def patch_tokens(self, images: jax.Array, *, affine: bool = True, every_block: bool = False):
        """Compute the last hidden state [B, N, C] of images, without CLS and registers.

        ``affine=False`` leaves out weight and bias of the final LayerNorm, as the encoders of
        RAE and PAE do. With ``every_block`` also the list of patch tokens after each block, not
        normalised. Raises as `__call__`.
        """
        after = [x[:, self.leading_tokens :] for x in self._tokens(images)]
        last = self.norm(after[-1], affine=affine)
        return (last, after) if every_block else last

    def _tokens(self, images: jax.Array) -> list[jax.Array]:
        """Return all tokens after each block, before the final LayerNorm."""
        patch = self.patch_embed.patch_size
        if (
            images.ndim != 4
            or images.shape[3] != 3
            or images.shape[1] % patch
            or (images.shape[2] % patch)
        ):
            raise ValueError(
                f"the encoder takes images [B, H, W, 3] with H and W multiples of {patch}, got "
                f"{list(images.shape)}; resize or crop them first"
            )
        grid = (images.shape[1] // patch, images.shape[2] // patch)
        x = self._with_leading(self.patch_embed(images), grid)
        rope, after = self.rotation(grid), []
        for block in self.blocks:
            x = block(constrain(x), rope)
            after.append(x)
        return after

    def _with_leading(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Add positions and leading tokens: patches [B, N, C] -> [B, leading + N, C]."""
        leading = [] if self.cls_token is None else [self.cls_token[...].astype(x.dtype)]
        if self.pos_embed is not None:
            positions = resize_positions(
                self.pos_embed[...],
                grid,
                leading=len(leading),
                antialias=self.antialias,
                offset=self.interpolate_offset,
            ).astype(x.dtype)
            x = x + positions[:, len(leading) :]
            leading = [token + positions[:, :1] for token in leading]
        if self.register_tokens is not None:  # they have no position
            leading.append(self.register_tokens[...].astype(x.dtype))
        per_image = [repeat(token, "1 n c -> b n c", b=len(x)) for token in leading]
        return jnp.concatenate([*per_image, x], axis=1)
