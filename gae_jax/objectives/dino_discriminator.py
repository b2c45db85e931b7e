"""RAE's discriminator: small convolutional heads on the features of a frozen DINO.

The released module (bytetriper/RAE, `src/disc/dinodisc.py`, after StyleGAN-T) as two networks:
`DinoFeatures`, which never learns, and `DinoDisc`, which does.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from gae_jax.nn.layers import LayerNorm, Mlp, torch_uniform
from gae_jax.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.nn.vit import PatchEmbed, position_table
from gae_jax.pretrained.vision import NORMAL, VisionBlock, VisionEncoder

# scale x + shift normalises images in [-1, 1] by ImageNet's mean and std.
IMAGENET_SCALE = np.float32(0.5) / IMAGENET_STD
IMAGENET_SHIFT = (np.float32(0.5) - IMAGENET_MEAN) / IMAGENET_STD


class DinoBlock(VisionBlock):
    """A block of DINO as RAE runs it: the GELU of a tanh, no layer scales."""

    def __init__(self, dim: int, num_heads: int, hidden: int, *, eps: float, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        super().__init__(dim, num_heads, hidden, eps=eps, **common)
        self.mlp = Mlp(dim, hidden, init=NORMAL, approximate=True, **common)


class DinoFeatures(VisionEncoder):
    """DINO (arXiv 2104.14294): `maps` of features [B, N, C] of images in [-1, 1].

    Images are resized to ``image_size`` bilinearly without antialias, N = (image_size /
    patch_size)^2. The maps are the patch tokens after the last block, then those after each of
    ``key_depths``; nothing is normalised. The defaults are ViT-S/8.

    Args:
      embed_dim, depth, num_heads, mlp_ratio: of the transformer.
      image_size, patch_size: in pixels.
      key_depths: blocks, counted from 0.
      norm_eps: of all norms.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        image_size: int = 224,
        patch_size: int = 8,
        key_depths: tuple[int, ...] = (2, 5, 8, 11),
        norm_eps: float = 1e-6,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not all(0 <= block < depth for block in key_depths):
            raise ValueError(
                f"key_depths are {list(key_depths)}, but the blocks are 0 to {depth - 1}"
            )
        self.image_size, self.key_depths = image_size, tuple(key_depths)
        common = dict(dtype=dtype, rngs=rngs)
        self.cls_token = position_table(rngs, 1, embed_dim)
        self.register_tokens = None
        self.pos_embed = position_table(rngs, 1 + (image_size // patch_size) ** 2, embed_dim)
        self.patch_embed = PatchEmbed(3, embed_dim, patch_size, bias=True, init=NORMAL, **common)
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nnx.List(
            DinoBlock(embed_dim, num_heads, hidden, eps=norm_eps, **common) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim, eps=norm_eps, rngs=rngs)  # of DINO; no feature map sees it

    def maps(self, images: jax.Array) -> list[jax.Array]:
        """Compute 1 + len(key_depths) feature maps [B, N, C] of images [B, H, W, 3] in [-1, 1]."""
        shape = (len(images), self.image_size, self.image_size, 3)
        images = jax.image.resize(
            images.astype(jnp.float32), shape, "bilinear", antialias=False,
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        _, after = self.patch_tokens(images * IMAGENET_SCALE + IMAGENET_SHIFT, every_block=True)
        return [after[-1], *(after[block] for block in self.key_depths)]


class SpectralConv(nnx.Module):
    """A convolution over tokens, circular, its kernel divided by its largest singular value.

    That value is sigma = u (W v), with the vectors of a power iteration that ``train`` advances by
    one step (PyTorch's `torch.nn.utils.spectral_norm`). W [out, in * k] is the kernel [k, in, out]
    in PyTorch's order.
    """

    def __init__(self, features_in: int, features_out: int, size: int, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        shape = (size, features_in, features_out)
        self.kernel = nnx.Param(torch_uniform()(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32))
        self.u = nnx.BatchStat(_unit(jax.random.normal(rngs.params(), (features_out,))))
        self.v = nnx.BatchStat(_unit(jax.random.normal(rngs.params(), (size * features_in,))))

    def sigma(self, *, train: bool) -> jax.Array:
        """Estimate the singular value; ``train`` updates u and v first."""
        matrix = rearrange(self.kernel[...], "k i o -> o (i k)")
        exact = jax.lax.Precision.HIGHEST
        if train:
            fixed = jax.lax.stop_gradient(matrix)
            v = _unit(jnp.dot(self.u[...], fixed, precision=exact))
            self.u[...] = _unit(jnp.dot(fixed, v, precision=exact))
            self.v[...] = v
        return jnp.dot(self.u[...], jnp.dot(matrix, self.v[...], precision=exact), precision=exact)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, N, in] -> [B, N, out]."""
        kernel = self.kernel[...] / self.sigma(train=train)
        edge = len(kernel) // 2
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (edge, edge), (0, 0)), mode="wrap")
        logits = jax.lax.conv_general_dilated(
            x, kernel.astype(self.dtype), (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return logits + self.bias[...].astype(self.dtype)


def _unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), eps)


class SampleNorm(nnx.Module):
    """Mean 0 and variance 1 over the tokens, per image and channel; then weight and bias.

    The released `BatchNormLocal` with a virtual batch of one: no running statistics.
    """

    def __init__(self, dim: int, *, eps: float, rngs: nnx.Rngs):
        del rngs  # nothing random
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=1, keepdims=True) + self.eps)
        return (wide * scale * self.weight[...] + self.bias[...]).astype(x.dtype)


class Head(nnx.Module):
    """Logits [B, N] of one feature map [B, N, C]."""

    def __init__(self, dim: int, ks: int, *, norm_eps: float, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.embed = SpectralConv(dim, dim, 1, **common)
        self.embed_norm = SampleNorm(dim, eps=norm_eps, rngs=rngs)
        self.mix = SpectralConv(dim, dim, ks, **common)
        self.mix_norm = SampleNorm(dim, eps=norm_eps, rngs=rngs)
        self.out = SpectralConv(dim, 1, 1, **common)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = jax.nn.leaky_relu(self.embed_norm(self.embed(x, train=train)), 0.2)
        mixed = jax.nn.leaky_relu(self.mix_norm(self.mix(x, train=train)), 0.2)
        x = (mixed + x) * np.sqrt(0.5).astype(x.dtype)
        return self.out(x, train=train)[..., 0].astype(jnp.float32)


class DinoDisc(nnx.Module):
    """Feature maps of `DinoFeatures` -> logits [B, maps * N] in fp32, map after map.

    Args:
      embed_dim: channels C of the maps.
      key_depths: as `DinoFeatures`; there is a head for each and one for the last block.
      ks: kernel of the middle convolution, odd.
      norm_eps: of the norms.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 384,
        key_depths: tuple[int, ...] = (2, 5, 8, 11),
        ks: int = 9,
        norm_eps: float = 1e-6,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if ks % 2 == 0:
            raise ValueError(f"ks is {ks}; the kernel must be odd to keep the number of tokens")
        self.heads = nnx.List(
            Head(embed_dim, ks, norm_eps=norm_eps, dtype=dtype, rngs=rngs)
            for _ in range(1 + len(key_depths))
        )

    def __call__(self, maps: list[jax.Array], *, train: bool) -> jax.Array:
        """Compute the logits; ``train``, in the discriminator's steps, updates power iterations."""
        logits = [head(x, train=train) for head, x in zip(self.heads, maps, strict=True)]
        return jnp.concatenate(logits, axis=1)
