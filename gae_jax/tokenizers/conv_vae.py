"""The convolutional autoencoder of SD-VAE, VA-VAE and related ones (arXiv 2112.10752, 2501.01423).

The same function as LightningDiT's tokenizer/autoencoder.py, whose argument and module names are
kept; there is no dropout, which all released configs set to 0. Images are [B, H, W, 3], about
[-1, 1], of any size that the downsampling divides. AlignTok's decoder is `ConvDecoder` without
``post_quant``; DGAE's encoder is `ConvEncoder`.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from gae_jax.nn.conv_layers import GroupNorm, Upsample, attend, conv
from gae_jax.nn.gaussian import DiagonalGaussian
from gae_jax.nn.layers import check_remat, rematerialize
from gae_jax.runtime.mesh import constrain
from gae_jax.tokenizers.conv_kind import PRESETS

EPS = 1e-6  # of all norms


class ResnetBlock(nnx.Module):
    """x + conv2(swish(norm2(conv1(swish(norm1 x))))); x by a 1x1 convolution if it gets wider."""

    def __init__(self, features_in: int, features_out: int, *, dtype, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(features_in, eps=EPS, rngs=rngs)
        self.conv1 = conv(features_in, features_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(features_out, eps=EPS, rngs=rngs)
        self.conv2 = conv(features_out, features_out, dtype=dtype, rngs=rngs)
        self.nin_shortcut = (
            conv(features_in, features_out, 1, dtype=dtype, rngs=rngs)
            if features_in != features_out
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nnx.Module):
    """x + proj_out(attention(norm x)) over all positions of the map, with one head."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, eps=EPS, rngs=rngs)
        make = partial(conv, channels, channels, 1, dtype=dtype, rngs=rngs)
        self.q, self.k, self.v, self.proj_out = make(), make(), make(), make()

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(x)
        q, k, v = (layer(h)[..., None, :] for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v)[..., 0, :])


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2 on a map that is padded below and on the right only."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        one_side = ((0, 1), (0, 1))
        self.conv = conv(channels, channels, strides=2, padding=one_side, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Level(nnx.Module):
    """Blocks of one resolution, each followed by attention if there is any.

    Args:
      widths: channels before the first block, and after each.
      resample: "downsample", "upsample" or None: what comes last.
    """

    def __init__(self, widths, *, attention: bool, resample=None, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.block = nnx.List(ResnetBlock(a, b, **common) for a, b in pairwise(widths))
        self.attn = nnx.List(AttnBlock(b, **common) for b in widths[1:] if attention)
        self.downsample = Downsample(widths[-1], **common) if resample == "downsample" else None
        self.upsample = Upsample(widths[-1], **common) if resample == "upsample" else None

    def __call__(self, x: jax.Array, remat: str) -> jax.Array:
        for index, block in enumerate(self.block):
            x = rematerialize(block, remat)(constrain(x))
            if self.attn:
                x = rematerialize(self.attn[index], remat)(x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class Middle(nnx.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.block_1 = ResnetBlock(channels, channels, **common)
        self.attn_1 = AttnBlock(channels, **common)
        self.block_2 = ResnetBlock(channels, channels, **common)

    def __call__(self, x: jax.Array, remat: str) -> jax.Array:
        for layer in (self.block_1, self.attn_1, self.block_2):
            x = rematerialize(layer, remat)(constrain(x))
        return x


class Encoder(nnx.Module):
    """Images [B, H, W, in_channels] -> [B, H/f, W/f, outputs]; arguments as `ConvEncoder`."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult,
        num_res_blocks: int,
        attn_resolutions,
        in_channels: int,
        resolution: int,
        outputs: int,
        remat: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        self.remat = check_remat(remat)
        self.conv_in = conv(in_channels, ch, **common)
        levels, width = [], ch
        for index, mult in enumerate(ch_mult):
            levels.append(
                Level(
                    (width, *num_res_blocks * [ch * mult]),
                    attention=resolution // 2**index in attn_resolutions,
                    resample="downsample" if index < len(ch_mult) - 1 else None,
                    **common,
                )
            )
            width = ch * mult
        self.down = nnx.List(levels)
        self.mid = Middle(width, **common)
        self.norm_out = GroupNorm(width, eps=EPS, rngs=rngs)
        self.conv_out = conv(width, outputs, **common)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encode images; raises ValueError if H or W is not a multiple of f."""
        factor = 2 ** (len(self.down) - 1)
        if images.ndim != 4 or images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"the encoder takes images [B, H, W, C] with H and W multiples of {factor}, got "
                f"{list(images.shape)}; resize or crop them first"
            )
        x = self.conv_in(images)
        for level in self.down:
            x = level(x, self.remat)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x, self.remat))))


class Decoder(nnx.Module):
    """Latents [B, h, w, z_channels] -> images [B, f h, f w, out_ch]; arguments as `ConvDecoder`."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult,
        num_res_blocks: int,
        attn_resolutions,
        out_ch: int,
        resolution: int,
        z_channels: int,
        remat: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        self.remat = check_remat(remat)
        width = ch * ch_mult[-1]
        self.conv_in = conv(z_channels, width, **common)
        self.mid = Middle(width, **common)
        levels = []
        for index, mult in reversed(list(enumerate(ch_mult))):
            levels.append(
                Level(
                    (width, *(num_res_blocks + 1) * [ch * mult]),
                    attention=resolution // 2**index in attn_resolutions,
                    resample="upsample" if index > 0 else None,
                    **common,
                )
            )
            width = ch * mult
        self.up = nnx.List(reversed(levels))  # as released, 0 is the highest resolution
        self.norm_out = GroupNorm(width, eps=EPS, rngs=rngs)
        self.conv_out = conv(width, out_ch, **common)

    def hidden(self, z: jax.Array) -> jax.Array:
        """Compute the map [B, f h, f w, ch * ch_mult[0]] that enters the last layer, `conv_out`."""
        x = self.mid(self.conv_in(z), self.remat)
        for level in reversed(list(self.up)):
            x = level(x, self.remat)
        return jax.nn.silu(self.norm_out(x))

    def images(self, hidden: jax.Array) -> jax.Array:
        """Apply the last layer to `hidden`."""
        return self.conv_out(hidden)

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.images(self.hidden(z))

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute a loss's gradient at the kernel of `conv_out`, [3, 3, channels, out_ch], fp32.

        Args:
          hidden: as `hidden` gives it.
          gradient: of the loss at the images [B, H, W, out_ch].
        """
        hidden = hidden.astype(jnp.float32)

        def of_kernel(kernel):
            return jax.lax.conv_general_dilated(
                hidden, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        _, back = jax.vjp(of_kernel, self.conv_out.kernel[...])
        return back(gradient.astype(jnp.float32))[0]


class ConvEncoder(nnx.Module):
    """Encoder and ``quant_conv``: images [B, H, W, in_channels] -> a Gaussian of the latents.

    Args:
      ch: channels at the highest resolution, a multiple of 32.
      ch_mult: factors of ``ch`` from the highest resolution to the lowest; f = 2^(levels - 1).
      num_res_blocks: of each level.
      attn_resolutions: edges of the maps that get attention after every block, for images of
        ``resolution`` pixels; images of other sizes get it at the same levels.
      in_channels: of the images.
      resolution: pixels; see ``attn_resolutions``.
      z_channels: half the channels between the encoder and ``quant_conv``.
      embed_dim: channels of the latent.
      remat: of the blocks, as `layers.REMAT`.
      dtype: of the activations.
    """

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult=PRESETS["vavae"]["ch_mult"],
        num_res_blocks: int = 2,
        attn_resolutions=PRESETS["vavae"]["attn_resolutions"],
        in_channels: int = 3,
        resolution: int = 256,
        z_channels: int = 32,
        embed_dim: int = 32,
        remat: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(
            ch=ch,
            ch_mult=tuple(ch_mult),
            num_res_blocks=num_res_blocks,
            attn_resolutions=tuple(attn_resolutions),
            in_channels=in_channels,
            resolution=resolution,
            outputs=2 * z_channels,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.quant_conv = conv(2 * z_channels, 2 * embed_dim, 1, dtype=dtype, rngs=rngs)

    def moments(self, images: jax.Array) -> jax.Array:
        """Compute [B, H/f, W/f, 2 embed_dim] in fp32: means, then log-variances, not clamped.

        Raises:
          ValueError: if H or W is not a multiple of f.
        """
        return self.quant_conv(self.encoder(images)).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> DiagonalGaussian:
        """Return the Gaussian of the latents [B, H/f, W/f, embed_dim]; raises as `moments`."""
        return DiagonalGaussian.from_moments(self.moments(images))


class ConvDecoder(nnx.Module):
    """``post_quant_conv`` and decoder: latents [B, h, w, embed_dim] -> images, unbounded.

    Args:
      ch, ch_mult, attn_resolutions, resolution, remat, dtype: as `ConvEncoder`.
      num_res_blocks: of each level, which has one more, as released.
      out_ch: channels of the images.
      z_channels: between ``post_quant_conv`` and the decoder.
      embed_dim: channels of the latent.
      post_quant: False leaves ``post_quant_conv`` out; the latent then has ``z_channels``.
    """

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult=PRESETS["vavae"]["ch_mult"],
        num_res_blocks: int = 2,
        attn_resolutions=PRESETS["vavae"]["attn_resolutions"],
        out_ch: int = 3,
        resolution: int = 256,
        z_channels: int = 32,
        embed_dim: int = 32,
        post_quant: bool = True,
        remat: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.post_quant_conv = (
            conv(embed_dim, z_channels, 1, dtype=dtype, rngs=rngs) if post_quant else None
        )
        self.decoder = Decoder(
            ch=ch,
            ch_mult=tuple(ch_mult),
            num_res_blocks=num_res_blocks,
            attn_resolutions=tuple(attn_resolutions),
            out_ch=out_ch,
            resolution=resolution,
            z_channels=z_channels,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Decode latents -> images [B, f h, f w, out_ch] in fp32."""
        return self.images(self.hidden(latents))

    def hidden(self, latents: jax.Array) -> jax.Array:
        """Compute the input of the last layer: [B, f h, f w, ch * ch_mult[0]], in ``dtype``."""
        z = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        return self.decoder.hidden(z)

    def images(self, hidden: jax.Array) -> jax.Array:
        """Apply the last layer to its input; images are fp32."""
        return self.decoder.images(hidden).astype(jnp.float32)

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute the gradient as `Decoder.at_last_layer`."""
        return self.decoder.at_last_layer(hidden, gradient)
