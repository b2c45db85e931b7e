"""The U-Net of ADM (guided_diffusion's UNetModel, arXiv 2105.05233) for images [B, H, W, C].

The same function as the released module, with its argument and module names. Left out are
class labels, dropout, resampling without convolutions and the later order of q, k and v.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.attention import check_attention
from gae_jax.nn.conv_layers import GroupNorm, Upsample, attend, conv, upsample
from gae_jax.nn.layers import check_remat, linear, rematerialize, torch_uniform
from gae_jax.runtime.mesh import constrain

EPS = 1e-5  # of all norms


def timestep_embedding(t: jax.Array, dim: int, max_period: float = 10_000.0) -> jax.Array:
    """Embed times [B] -> [B, dim] in fp32: cosines, then sines, of t * max_period^(-2 j / dim).

    ``t`` is taken as it is; ADM was trained with steps in [0, 1000). An odd ``dim`` ends with 0.
    """
    half = dim // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half, dtype=np.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(waves, ((0, 0), (0, dim % 2)))


class ResBlock(nnx.Module):
    """A residual block on maps [B, H, W, C] that the embedding of the time modulates.

    Args:
      features_in, features_out: channels.
      emb_channels: width of the embedding.
      scale_shift: the embedding scales and shifts the second norm, else it is added before it.
      resample: "down" halves the map (2 x 2 means), "up" doubles it (pixels repeated), both after
        the first norm and on the skip; None keeps it.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        emb_channels: int,
        *,
        scale_shift: bool,
        resample: str | None = None,
        dtype,
        rngs: nnx.Rngs,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nnx.Dict(
            {
                "0": GroupNorm(features_in, eps=EPS, rngs=rngs),
                "2": conv(features_in, features_out, **common),
            }
        )
        width = 2 * features_out if scale_shift else features_out
        self.emb_layers = nnx.Dict({"1": linear(emb_channels, width, bias=True, **common)})
        self.out_layers = nnx.Dict(
            {
                "0": GroupNorm(features_out, eps=EPS, rngs=rngs),
                "3": conv(features_out, features_out, zero=True, **common),
            }
        )
        self.skip_connection = (
            conv(features_in, features_out, 1, **common) if features_in != features_out else None
        )

    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        """[B, H, W, C], embedded times [B, E] -> [B, H', W', features_out]; see ``resample``."""
        h = jax.nn.silu(self.in_layers["0"](x))
        if self.resample == "up":
            h, x = upsample(h), upsample(x)
        elif self.resample == "down":
            h, x = halve(h), halve(x)
        h = self.in_layers["2"](h)
        emb = self.emb_layers["1"](jax.nn.silu(emb))[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = self.out_layers["0"](h) * (1 + scale) + shift
        else:
            h = self.out_layers["0"](h + emb)
        h = self.out_layers["3"](jax.nn.silu(h))
        return h + (x if self.skip_connection is None else self.skip_connection(x))


def halve(x: jax.Array) -> jax.Array:
    """Average 2 x 2 pixels: [B, H, W, C] -> [B, H/2, W/2, C]."""
    return nnx.avg_pool(x, (2, 2), strides=(2, 2))


class AttentionBlock(nnx.Module):
    """x + proj_out(attention(norm x)) over all positions of the map; heads hold q, k, v each."""

    def __init__(self, channels: int, num_heads: int, *, attention: str, dtype, rngs: nnx.Rngs):
        if channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} heads")
        self.num_heads, self.attention = num_heads, attention
        self.norm = GroupNorm(channels, eps=EPS, rngs=rngs)
        # convolutions over the row of all places, as released
        make = partial(nnx.Conv, kernel_size=(1,), dtype=dtype, rngs=rngs)
        self.qkv = make(channels, 3 * channels, kernel_init=torch_uniform())
        self.proj_out = make(channels, channels, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        qkv = self.qkv(self.norm(x).reshape(batch, height * width, channels))
        qkv = qkv.reshape(batch, height, width, self.num_heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        out = attend(q, k, v, self.attention)
        return x + self.proj_out(out.reshape(batch, -1, channels)).reshape(x.shape)


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2, padded on all sides."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.op = conv(channels, channels, strides=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.op(x)


class UNetModel(nnx.Module):
    """Images [B, H, W, in_channels] and times [B] -> [B, H, W, out_channels].

    The last convolution starts at zero, and so does every branch of a residual block.

    Args:
      in_channels: of x and, if one is given, the latent together.
      model_channels: base width; times each factor below it is a multiple of 32.
      out_channels: of the output.
      num_res_blocks: of each level on the way down; one more on the way up.
      attention_resolutions: factors of downsampling at which every block is followed by
        attention; the middle always has it.
      channel_mult: factors of the width from the highest resolution to the lowest.
      num_heads: of the attention, where ``num_head_channels`` is -1.
      num_head_channels: channels of a head.
      use_scale_shift_norm: as `ResBlock`.
      resblock_updown: residual blocks resample, else convolutions do.
      attention: how it is computed, as `attention.ATTENTIONS`.
      remat: of the blocks, as `layers.REMAT`.
      dtype: of the activations.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions,
        channel_mult=(1, 2, 4, 8),
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        attention: str = "xla",
        remat: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_channels, self.model_channels = in_channels, model_channels
        self.factor = 2 ** (len(channel_mult) - 1)
        self.remat = check_remat(remat)
        common = dict(dtype=dtype, rngs=rngs)
        emb_channels = 4 * model_channels
        self.time_embed = nnx.Dict(
            {
                "0": linear(model_channels, emb_channels, bias=True, **common),
                "2": linear(emb_channels, emb_channels, bias=True, **common),
            }
        )
        check_attention(attention)

        def block(features_in, features_out, resample=None):
            return ResBlock(
                *(features_in, features_out, emb_channels),
                scale_shift=use_scale_shift_norm,
                resample=resample,
                **common,
            )

        def attend_with(channels):
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            if num_head_channels != -1 and channels % num_head_channels:
                raise ValueError(
                    f"{channels} channels do not divide into heads of {num_head_channels}"
                )
            return AttentionBlock(channels, heads, attention=attention, **common)

        level_widths = [int(mult * model_channels) for mult in channel_mult]  # ADM at 512 has 0.5
        width = level_widths[0]
        blocks: list[list[nnx.Module]] = [[conv(in_channels, width, **common)]]
        widths = [width]
        for level, level_width in enumerate(level_widths):
            for _ in range(num_res_blocks):
                layers: list[nnx.Module] = [block(width, level_width)]
                width = level_width
                if 2**level in attention_resolutions:
                    layers.append(attend_with(width))
                blocks.append(layers)
                widths.append(width)
            if level < len(channel_mult) - 1:
                down = block(width, width, "down") if resblock_updown else None
                blocks.append([down or Downsample(width, **common)])
                widths.append(width)
        self.input_blocks = nnx.List(map(nnx.List, blocks))
        self.middle_block = nnx.List([block(width, width), attend_with(width), block(width, width)])
        blocks = []
        for level, level_width in reversed(list(enumerate(level_widths))):
            for index in range(num_res_blocks + 1):
                layers = [block(width + widths.pop(), level_width)]
                width = level_width
                if 2**level in attention_resolutions:
                    layers.append(attend_with(width))
                if level and index == num_res_blocks:
                    up = block(width, width, "up") if resblock_updown else None
                    layers.append(up or Upsample(width, **common))
                blocks.append(layers)
        self.output_blocks = nnx.List(map(nnx.List, blocks))
        self.out = nnx.Dict(
            {
                "0": GroupNorm(width, eps=EPS, rngs=rngs),
                "2": conv(width, out_channels, zero=True, **common),
            }
        )

    def __call__(self, x: jax.Array, t: jax.Array, z: jax.Array | None = None) -> jax.Array:
        """Compute the output in fp32.

        Args:
          x: [B, H, W, C].
          t: [B], as `timestep_embedding` takes it.
          z: a latent [B, h, w, c] to condition on, C + c = in_channels. Its pixels are repeated
            to H x W and its channels come after those of x, as the decoder of epsilon-VAE does
            (arXiv 2410.04081).

        Raises:
          ValueError: if the channels are not ``in_channels``, H or W does not divide by what the
            levels halve it, or H x W is no multiple of h x w.
        """
        if z is not None:
            factor = x.shape[1] // z.shape[1]
            if x.shape[1:3] != (z.shape[1] * factor, z.shape[2] * factor):
                raise ValueError(
                    f"a latent of {z.shape[1]} x {z.shape[2]} does not fit an image of "
                    f"{x.shape[1]} x {x.shape[2]}; the image must be a multiple of it"
                )
            x = jnp.concatenate([x, upsample(z, factor).astype(x.dtype)], axis=-1)
        if x.shape[3] != self.in_channels or x.shape[1] % self.factor or x.shape[2] % self.factor:
            raise ValueError(
                f"the U-Net takes [B, H, W, {self.in_channels}] with H and W multiples of "
                f"{self.factor}, latent included, got {list(x.shape)}"
            )
        emb = self.time_embed["0"](timestep_embedding(t, self.model_channels))
        emb = self.time_embed["2"](jax.nn.silu(emb))
        skips = []
        for layers in self.input_blocks:
            x = self._run(layers, x, emb)
            skips.append(x)
        x = self._run(self.middle_block, x, emb)
        for layers in self.output_blocks:
            x = self._run(layers, jnp.concatenate([x, skips.pop()], axis=-1), emb)
        return self.out["2"](jax.nn.silu(self.out["0"](x))).astype(jnp.float32)

    def _run(self, layers, x: jax.Array, emb: jax.Array) -> jax.Array:
        for layer in layers:
            inputs = (emb,) if isinstance(layer, ResBlock) else ()
            x = rematerialize(layer, self.remat)(constrain(x), *inputs)
        return x
