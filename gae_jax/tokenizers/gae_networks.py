"""The Geometric Autoencoder and the ViT that it is made of (arXiv 2603.10365, Table 13)."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.kernels.norm import check_kernels
from gae_jax.nn.layers import (
    check_remat,
    linear,
    patchify,
    rematerialize,
    rms_norm,
    torch_uniform,
    unpatchify,
)
from gae_jax.nn.losses import LOGVAR_RANGE
from gae_jax.nn.tokenizer import Decoded, Encoded, at_linear
from gae_jax.nn.vit import Block, through_blocks
from gae_jax.runtime.mesh import constrain

# Backbones of the paper's Table 8, as arguments of `GAE`.
SIZES = {
    "S": dict(embed_dim=384, num_layers=12, num_heads=6),
    "B": dict(embed_dim=768, num_layers=12, num_heads=12),
    "L": dict(embed_dim=1024, num_layers=24, num_heads=16),
}
BOTTLENECKS = ("norm", "kl")
# How the patch embedding starts; (patch size, width) -> initializer of its matrix [p^2 C, D].
PATCH_INITS = {
    # as released: torch's kaiming_normal_ by fan out, which counts the kernel's area
    "fan_out": lambda p, dim: nnx.initializers.normal(math.sqrt(2 / (dim * p**2))),
    # the default of torch, and several times larger: small networks learn sooner
    "fan_in": lambda p, dim: torch_uniform(),
}


class PatchEmbed(nnx.Module):
    """A convolution with stride = kernel = patch size, written as one matrix product.

    The kernel is kept as [p, p, C, D], the layout of a convolution.
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
    """A learned position table [1, tokens, dim], truncated normal with deviation 0.02."""
    init = nnx.initializers.truncated_normal(0.02)
    return nnx.Param(init(rngs.params(), (1, tokens, dim), jnp.float32))


class Encoder(nnx.Module):
    """ViT encoder E_p: images [B, S, S, 3] in [-1, 1] -> features [B, N, embed_dim].

    Args:
      image_size: S, in pixels.
      patch_size: pixels per token edge; N = (S / patch_size)^2.
      embed_dim, num_layers, num_heads: of the transformer.
      patch_init: how the patch embedding starts, a name in `PATCH_INITS`.
      remat: of the blocks, as `layers.REMAT`.
      kernels: how norms are computed, as `kernels.KERNELS`.
      more: num_kv_heads, mlp_ratio and attention, as `Block`.
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
        **more,
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
            Block(embed_dim, num_heads, dtype=dtype, rngs=rngs, **more) for _ in range(num_layers)
        )
        self.proj_out = linear(embed_dim, embed_dim, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, every_block: bool = False):
        """The features; with ``every_block`` also the list of tokens after each block."""
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
    """Raises ValueError unless images are [B, size, size, 3]: nothing is resized silently."""
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"the model takes images [B, {size}, {size}, 3], got {list(images.shape)}; crop the "
            "images to that size or build the model with image_size to match"
        )


class Adapter(nnx.Module):
    """Projector A_p: one Linear from features to the latent width."""

    def __init__(self, dim: int, latent_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.model = linear(dim, latent_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.model(x)


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
        **more,
    ):
        self.kernels = check_kernels(kernels)
        self.patch_size, self.remat = patch_size, check_remat(remat)
        self.z_proj = linear(latent_dim, embed_dim, dtype=dtype, rngs=rngs)
        self.pos_embed = position_table(rngs, (image_size // patch_size) ** 2, embed_dim)
        self.blocks = nnx.List(
            Block(embed_dim, num_heads, dtype=dtype, rngs=rngs, **more) for _ in range(num_layers)
        )
        self.linear_out = linear(embed_dim, 3 * patch_size**2, dtype=dtype, rngs=rngs)

    def hidden(self, z: jax.Array) -> jax.Array:
        """The normalised tokens [B, N, embed_dim] that enter the last layer, `linear_out`."""
        x = self.z_proj(z)
        x = x + self.pos_embed[...].astype(x.dtype)
        return through_blocks(self.blocks, x, remat=self.remat, kernels=self.kernels)

    def images(self, hidden: jax.Array) -> jax.Array:
        """What the last layer makes of `hidden`, in fp32."""
        return unpatchify(self.linear_out(hidden).astype(jnp.float32), self.patch_size)

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.images(self.hidden(z))


class GAE(nnx.Module):
    """Geometric Autoencoder: images [B, S, S, 3] in [-1, 1] <-> latents [B, h, w, latent_dim].

    The latent is RMSNorm(A_p(E_p(x))): every token has mean square 1, which takes the place of a
    KL term. Training decodes z = mu + |s| eps with one s ~ N(0, (noise_std * noise_factor)^2) per
    image ("dynamic noise").

    The paper's baseline (Table 7) is the bottleneck "kl": A_p gives means and log-variances of a
    diagonal Gaussian, nothing is normalised, and training decodes a sample.

    Args:
      image_size, patch_size: S and pixels per token edge.
      embed_dim, num_layers, num_heads, num_kv_heads, mlp_ratio: of encoder and decoder alike.
      latent_dim: channels of the latent.
      bottleneck: "norm" or "kl".
      noise_std: C_sigma of the paper; of "norm" only.
      noise_factor: 1/0.8 as in the released code, or 1 as the paper reads.
      patch_init: as `Encoder`.
      remat: of the blocks, as `layers.REMAT`.
      attention: how it is computed, as `attention.ATTENTIONS`.
      kernels: how norms are computed, as `kernels.KERNELS`.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        patch_size: int = 16,
        embed_dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        latent_dim: int = 32,
        bottleneck: str = "norm",
        noise_std: float = 0.2,
        noise_factor: float = 1 / 0.8,
        patch_init: str = "fan_out",
        remat: str = "none",
        attention: str = "xla",
        kernels: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if bottleneck not in BOTTLENECKS:
            raise ValueError(f"bottleneck is {bottleneck!r}; use one of {', '.join(BOTTLENECKS)}")
        grid = image_size // patch_size
        self.latent_shape = (grid, grid, latent_dim)
        self.bottleneck = bottleneck
        self.noise_std = noise_std * noise_factor
        sizes = (image_size, patch_size, embed_dim, num_layers, num_heads)
        more = dict(
            num_kv_heads=num_kv_heads,
            mlp_ratio=mlp_ratio,
            remat=remat,
            attention=attention,
            kernels=kernels,
            dtype=dtype,
            rngs=rngs,
        )
        width = 2 * latent_dim if bottleneck == "kl" else latent_dim
        self.foundation_encoder = Encoder(*sizes, patch_init=patch_init, **more)
        self.adapter = Adapter(embed_dim, width, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(*sizes, latent_dim=latent_dim, **more)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images -> latents [B, h, w, latent_dim] in fp32, without noise."""
        return self.encode_all(images).latents

    def encode_all(self, images: jax.Array) -> Encoded:
        """`encode`, and what the training objective asks for besides."""
        features = self.foundation_encoder(images)
        tokens = self.adapter(features).astype(jnp.float32)
        grid = rearrange(tokens, "b (h w) d -> b h w d", h=self.latent_shape[0])
        logvar = None
        if self.bottleneck == "kl":
            latents, logvar = jnp.split(grid, 2, axis=-1)
            logvar = jnp.clip(logvar, *LOGVAR_RANGE)
        else:
            latents = rms_norm(grid)
        return Encoded(latents, logvar, features.astype(jnp.float32))

    def perturb(
        self, latents: jax.Array, key: jax.Array, logvar: jax.Array | None = None
    ) -> jax.Array:
        """The latents as the decoder sees them in training.

        Raises:
          ValueError: unless there is a ``logvar`` with the "kl" bottleneck, and none without.
        """
        if (logvar is not None) != (self.bottleneck == "kl"):
            raise ValueError(
                f"perturb: bottleneck {self.bottleneck!r} takes "
                + ("the logvar of encode_all" if logvar is None else "no logvar")
            )
        if logvar is not None:
            return latents + jnp.exp(logvar / 2) * jax.random.normal(key, latents.shape)
        scale_key, noise_key = jax.random.split(key)
        batch = latents.shape[0]
        scale = self.noise_std * jax.random.normal(scale_key, (batch, 1, 1, 1))
        return latents + jnp.abs(scale) * jax.random.normal(noise_key, latents.shape)

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Latents -> images [B, S, S, 3] in fp32; about [-1, 1], not clamped. Nothing is drawn."""
        del keys
        return self.decode_all(latents)[0]

    def decode_all(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`decode`, and the tokens [B, N, embed_dim] that enter its last layer, in ``dtype``."""
        hidden = self.decoder.hidden(rearrange(latents, "b h w d -> b (h w) d"))
        return self.decoder.images(hidden), hidden

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...] = (), mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """Images through encoder, `perturb` and decoder, as `models.tokenizer` has it."""
        del terms, mode
        encoded = self.encode_all(images)
        found, hidden = self.decode_all(self.perturb(encoded.latents, key, encoded.logvar))
        return encoded, Decoded(found, hidden, {})

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """As `models.tokenizer` has it; the last layer has no bias."""
        return at_linear(hidden, gradient, self.decoder.patch_size)
