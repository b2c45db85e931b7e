"""The ViT of GAE: blocks, encoder and decoder, computed by XLA or by kernels."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.kernels.norm import check_kernels, use_kernels
from gae_jax.kernels.stream import Stream
from gae_jax.nn.attention import Attention
from gae_jax.nn.layers import (
    check_remat,
    linear,
    patchify,
    rematerialize,
    rms_norm,
    torch_uniform,
    unpatchify,
)
from gae_jax.nn.mlp import SwiGLU, mlp_hidden
from gae_jax.nn.quantized import normed_for
from gae_jax.runtime.mesh import constrain


class Block(nnx.Module):
    """x += attn(rms(x)); x += mlp(rms(x)). The norms have no weights."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = dict(attention=attention, dtype=dtype, rngs=rngs)
        self.attn = Attention(dim, num_heads, num_kv_heads=num_kv_heads, **options)
        self.mlp = SwiGLU(dim, mlp_hidden(dim, mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(rms_norm(x))
        return x + self.mlp(rms_norm(x))

    def streamed(self, stream: Stream, kernels: str) -> Stream:
        """Compute the same by kernels, from and to a residual stream."""
        x, h = normed_for(self.attn.qkv, stream.normed, kernels)
        x, h = normed_for(self.mlp.fc1, Stream(x + self.attn(h)).normed, kernels)
        return self.mlp.streamed(x, h, kernels)


def through_blocks(blocks, x: jax.Array, *, remat: str, kernels: str) -> jax.Array:
    """Run tokens [B, N, C] through `Block`s and the norm after them."""
    obstacles = [block.mlp.obstacle for block in blocks]
    if use_kernels(kernels, x.dtype, x.shape, next(filter(None, obstacles), None)):
        stream = Stream(x)
        for block in blocks:
            call = rematerialize(block, remat, lambda block, s: block.streamed(s, kernels))
            stream = call(stream.constrained())
        return stream.normed(kernels)[1]
    for block in blocks:
        x = rematerialize(block, remat)(constrain(x))
    return rms_norm(x)


# Initialisation of the patch embedding: (patch size, width) -> initializer of [p^2 C, D].
PATCH_INITS = {
    # as released: torch's kaiming_normal_ by fan out, which counts the kernel's area
    "fan_out": lambda p, dim: nnx.initializers.normal(math.sqrt(2 / (dim * p**2))),
    # torch's default, several times larger: small networks learn faster
    "fan_in": lambda p, dim: torch_uniform(),
}


class PatchEmbed(nnx.Module):
    """A convolution with stride = kernel size = patch size, computed as one matmul.

    The kernel is stored as [p, p, C, D], the layout of a convolution.
    """

    def __init__(self, channels: int, dim: int, patch_size: int, *, bias, init, dtype, rngs):
        self.patch_size, self.dtype = patch_size, dtype
        shape = (patch_size, patch_size, channels, dim)
        flat = init(rngs.params(), (patch_size**2 * channels, dim), jnp.float32)
        self.kernel = nnx.Param(flat.reshape(shape))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if bias else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, N, D]."""
        patches = patchify(images.astype(self.dtype), self.patch_size)
        kernel = rearrange(self.kernel[...], "p q c d -> (p q c) d").astype(self.dtype)
        tokens = patches @ kernel
        return tokens if self.bias is None else tokens + self.bias[...].astype(self.dtype)


def position_table(rngs: nnx.Rngs, tokens: int, dim: int) -> nnx.Param:
    """Make a learned position table [1, tokens, dim], truncated normal with std 0.02."""
    init = nnx.initializers.truncated_normal(0.02)
    return nnx.Param(init(rngs.params(), (1, tokens, dim), jnp.float32))


class Encoder(nnx.Module):
    """ViT encoder E_p: images [B, S, S, 3] in [-1, 1] -> features [B, N, embed_dim].

    Args:
      image_size: S, in pixels.
      patch_size: pixels per token edge; N = (S / patch_size)^2.
      embed_dim, num_layers, num_heads: of the transformer.
      patch_init: initialisation of the patch embedding, a name in `PATCH_INITS`.
      remat: of the blocks, a name in `layers.REMAT`.
      kernels: of norms and SwiGLU, a name in `kernels.norm.KERNELS`.
      options: num_kv_heads, mlp_ratio and attention, as `Block`.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        *,
        patch_init: str = "fan_out",
        remat: str = "none",
        kernels: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        self.kernels = check_kernels(kernels)
        if patch_init not in PATCH_INITS:
            known = ", ".join(PATCH_INITS)
            raise ValueError(f"patch_init is {patch_init!r}; use one of {known}")
        self.image_size, self.remat = image_size, check_remat(remat)
        self.patch_embed = PatchEmbed(
            3,
            embed_dim,
            patch_size,
            bias=False,
            init=PATCH_INITS[patch_init](patch_size, embed_dim),
            dtype=dtype,
            rngs=rngs,
        )
        self.pos_embed = position_table(rngs, (image_size // patch_size) ** 2, embed_dim)
        self.blocks = nnx.List(
            Block(embed_dim, num_heads, dtype=dtype, rngs=rngs, **options)
            for _ in range(num_layers)
        )
        self.proj_out = linear(embed_dim, embed_dim, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, every_block: bool = False):
        """Return the features; with ``every_block`` also the list of tokens after each block."""
        check_image_size(images, self.image_size)
        x = self.patch_embed(images)
        x = x + self.pos_embed[...].astype(x.dtype)
        if not every_block:
            return self.proj_out(
                through_blocks(self.blocks, x, remat=self.remat, kernels=self.kernels)
            )
        after = []
        for block in self.blocks:
            x = rematerialize(block, self.remat)(constrain(x))
            after.append(x)
        return self.proj_out(rms_norm(x)), after


def check_image_size(images: jax.Array, size: int) -> None:
    """Raise ValueError unless images are [B, size, size, 3]: nothing is resized silently."""
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"the model takes images [B, {size}, {size}, 3], got {list(images.shape)}; crop the "
            "images to that size or build the model with image_size to match"
        )


class Decoder(nnx.Module):
    """ViT decoder D_p: latent tokens [B, N, latent_dim] -> images [B, S, S, 3], unbounded."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        *,
        latent_dim: int,
        remat: str = "none",
        kernels: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        self.kernels = check_kernels(kernels)
        self.patch_size, self.remat = patch_size, check_remat(remat)
        self.z_proj = linear(latent_dim, embed_dim, dtype=dtype, rngs=rngs)
        self.pos_embed = position_table(rngs, (image_size // patch_size) ** 2, embed_dim)
        self.blocks = nnx.List(
            Block(embed_dim, num_heads, dtype=dtype, rngs=rngs, **options)
            for _ in range(num_layers)
        )
        self.linear_out = linear(embed_dim, 3 * patch_size**2, dtype=dtype, rngs=rngs)

    def hidden(self, z: jax.Array) -> jax.Array:
        """Return the normalised tokens [B, N, embed_dim] that enter the last layer."""
        x = self.z_proj(z)
        x = x + self.pos_embed[...].astype(x.dtype)
        return through_blocks(self.blocks, x, remat=self.remat, kernels=self.kernels)

    def images(self, hidden: jax.Array) -> jax.Array:
        """Apply the last layer to what `hidden` returned: images [B, S, S, 3] in fp32."""
        return unpatchify(self.linear_out(hidden).astype(jnp.float32), self.patch_size)

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.images(self.hidden(z))
