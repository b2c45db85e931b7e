"""The networks of PAE, the Prior-Aligned AutoEncoder (arXiv 2605.07915).

A frozen vision encoder gives semantic tokens. A modulator writes details of the image into
them, a bottleneck makes latents on a sphere of them and tokens again, and RAE's decoder makes the
image. Attributes are named as in the released PAE. Images are [B, H, W, 3], tokens [B, N, C] in
row-major order, latents [B, h, w, d].
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn.attention import Attention
from gae_jax.nn.layers import linear, rms_norm
from gae_jax.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.nn.torch_init import start_as_torch
from gae_jax.tokenizers.mae_decoder import GeneralDecoder
from gae_jax.tokenizers.pae_kind import SPHERES
from gae_jax.tokenizers.pae_modulator import DeltaEncoder

_MEAN, _STD = (tuple(x.tolist()) for x in (IMAGENET_MEAN, IMAGENET_STD))


class TokenMixer(Attention):
    """Multi-head self-attention with a bias in its last layer only, timm's default."""

    def __init__(self, dim: int, num_heads: int, *, attention="xla", dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        super().__init__(dim, num_heads, qk_norm=None, attention=attention, **common)
        self.proj = linear(dim, dim, bias=True, **common)


def conv3x3(features_in: int, features_out: int, *, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """Make a 3x3 convolution with bias, edges padded with zeros."""
    common = dict(dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
    return nnx.Conv(features_in, features_out, kernel_size=(3, 3), padding=1, **common)


def onto_sphere(latents: jax.Array, sphere: str = "per-token") -> jax.Array:
    """Normalise [B, h, w, d] to mean square 1 per `SPHERES`; eps 1e-6, in fp32.

    Raises:
      ValueError: for an unknown name.
    """
    if sphere not in SPHERES:
        raise ValueError(f"sphere is {sphere!r}; use one of {', '.join(SPHERES)}")
    if sphere == "per-token":
        return rms_norm(latents)
    return rms_norm(latents.reshape(len(latents), -1)).reshape(latents.shape)


class Projector(nnx.Module):
    """P: tokens [B, N, C] -> latents [B, h, w, latent_dim] on the sphere.

    An attention and a 3x3 convolution. The attention has no residual and no norm before it, so
    fresh weights nearly average the tokens: latents start flat, as released. Initial values are
    set by the modules that contain it.

    Args:
      hidden_size, num_heads: of the tokens and of the attention.
      latent_dim: channels of the latents.
      sphere: a name in `SPHERES`.
      attention: how it is computed, as `attention.ATTENTIONS`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        latent_dim: int,
        sphere: str = "per-token",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if sphere not in SPHERES:
            raise ValueError(f"sphere is {sphere!r}; use one of {', '.join(SPHERES)}")
        self.sphere, self.latent_dim = sphere, latent_dim
        mix = TokenMixer(hidden_size, num_heads, attention=attention, dtype=dtype, rngs=rngs)
        conv = conv3x3(hidden_size, latent_dim, dtype=dtype, rngs=rngs)
        self.latent_compressor = nnx.List([mix, conv])

    def project(self, tokens: jax.Array) -> jax.Array:
        """Project tokens of a square grid -> latents before the norm, in fp32."""
        mix, conv = self.latent_compressor
        side = math.isqrt(tokens.shape[1])
        return conv(rearrange(mix(tokens), "b (h w) c -> b h w c", h=side)).astype(jnp.float32)

    def compress(self, tokens: jax.Array) -> jax.Array:
        """Project tokens -> latents on the sphere, in fp32; deterministic as released."""
        return onto_sphere(self.project(tokens), self.sphere)


class Bottleneck(Projector):
    """Projector P and deprojector Q: tokens [B, N, C] <-> latents [B, h, w, latent_dim].

    Q is a 3x3 convolution and an attention, again without residual and norm. Arguments as
    `Projector`.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 1024,
        num_heads: int = 16,
        latent_dim: int = 32,
        sphere: str = "per-token",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        super().__init__(
            hidden_size=hidden_size,
            num_heads=num_heads,
            latent_dim=latent_dim,
            sphere=sphere,
            attention=attention,
            **common,
        )
        mix = TokenMixer(hidden_size, num_heads, attention=attention, **common)
        self.latent_decompressor = nnx.List([conv3x3(latent_dim, hidden_size, **common), mix])
        start_as_torch(self, rngs)

    def decompress(self, latents: jax.Array) -> jax.Array:
        """Map latents, generated ones too, -> tokens as they are: no norm here."""
        conv, mix = self.latent_decompressor
        return mix(rearrange(conv(latents), "b h w c -> b (h w) c"))


class PAE(Bottleneck):
    """All of PAE that is trained: modulator, bottleneck, decoder.

    Args:
      hidden_size, num_heads: of the frozen encoder, and of all but the decoder.
      encoder_input_size, encoder_patch_size: of the frozen encoder, in pixels.
      delta_depth, fusion_mode: depth and fusion of the modulator, as `DeltaEncoder`.
      latent_dim, sphere: as `Bottleneck`.
      decoder_patch_size: pixels per token edge of the image that comes out.
      image_mean, image_std: per channel, by which the encoder's images are normalised, and the
        decoder's patches: ImageNet's, but 0.5 for SigLIP 2.
      remat, attention: as `DeltaEncoder`; the decoder's attention is always XLA's.
      decoder: sizes of `GeneralDecoder`, a value of `rae_kind.DECODERS`; by default "L".
    """

    def __init__(
        self,
        *,
        hidden_size: int = 1024,
        num_heads: int = 16,
        encoder_input_size: int = 224,
        encoder_patch_size: int = 14,
        delta_depth: int = 6,
        fusion_mode: str = "sft",
        latent_dim: int = 32,
        sphere: str = "per-token",
        decoder_patch_size: int = 16,
        image_mean: tuple[float, ...] = _MEAN,
        image_std: tuple[float, ...] = _STD,
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **decoder,
    ):
        common = dict(attention=attention, dtype=dtype, rngs=rngs)
        super().__init__(
            hidden_size=hidden_size,
            num_heads=num_heads,
            latent_dim=latent_dim,
            sphere=sphere,
            **common,
        )
        if encoder_input_size % encoder_patch_size:
            raise ValueError(
                f"encoder_input_size {encoder_input_size} is not a multiple of "
                f"encoder_patch_size {encoder_patch_size}"
            )
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.delta_encoder = DeltaEncoder(
            dim=hidden_size,
            num_heads=num_heads,
            img_size=encoder_input_size,
            patch_size=encoder_patch_size,
            depth=delta_depth,
            fusion_mode=fusion_mode,
            remat=remat,
            **common,
        )
        self.decoder = GeneralDecoder(
            hidden_size=hidden_size,
            image_size=encoder_input_size // encoder_patch_size * decoder_patch_size,
            patch_size=decoder_patch_size,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
            **decoder,
        )

    def to_images(self, patches: jax.Array) -> jax.Array:
        """Join the decoder's patches [B, N, p*p*3] and undo their normalisation: about [0, 1]."""
        images = self.decoder.unpatchify(patches)
        return images * jnp.array(self.image_std) + jnp.array(self.image_mean)
