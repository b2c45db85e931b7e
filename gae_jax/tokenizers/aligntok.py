"""AlignTok (arXiv 2509.25162): a foundation encoder that becomes a tokenizer.

Three phases, which the config holds: adapter and decoder on the frozen encoder; everything, held
near the latents that the tokenizer had when that began (align.target="snapshot"); the decoder
alone. No code is released: what the paper leaves open is tagged in `sizes`.

With ``lora.rank`` the encoder stays, and low-rank updates of its layers learn in its place: the
paper's LoRA arm.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn import vit
from gae_jax.nn.layers import freeze, linear
from gae_jax.nn.lora import LAYERS, check_lora, with_lora
from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.tokenizers.base import Decoded, Encoded, Kind, at_linear
from gae_jax.tokenizers.conv import factor
from gae_jax.tokenizers.conv_vae import ConvDecoder

DECODERS = ("conv", "vit")


class Adapter(nnx.Module):
    """fc2(gelu(fc1 x)) from the encoder's width to that of the latents, token by token."""

    def __init__(self, dim: int, hidden: int, latent_dim: int, *, dtype, rngs: nnx.Rngs):
        self.fc1 = linear(dim, hidden, bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, latent_dim, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, dim] -> [B, N, latent_dim]."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class ViTDecoder(vit.Decoder):
    """The decoder of GAE on maps of latents [B, h, w, d], in the paper's decoder's place."""

    def hidden(self, latents: jax.Array) -> jax.Array:
        """The tokens [B, N, embed_dim] that enter the last layer."""
        return super().hidden(rearrange(latents, "b h w d -> b (h w) d"))

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """The gradient at the kernel of `linear_out`, from that at the images."""
        return at_linear(hidden, gradient, self.patch_size)


class AlignTok(nnx.Module):
    """Images [B, S, S, 3] in [-1, 1] <-> latents [B, h, w, latent_dim], without noise.

    The latent is the adapter's output on the encoder's normalised patch tokens.

    Args:
      encoder: a backbone, as `models.backbone`; it learns, or with ``lora`` its updates do.
      image_size: S, in pixels.
      latent_dim: channels of the latent.
      hidden: of the adapter.
      decoder: "conv", VA-VAE's, or "vit", GAE's.
      conv: sizes of the former: ch, ch_mult, num_res_blocks, attn_resolutions and resolution, as
        `ConvDecoder`.
      vit: sizes of the latter: embed_dim, num_layers, num_heads and mlp_ratio, as `vit.Decoder`.
      lora: rank, alpha and layers of the updates, as `with_lora`; None or a rank of 0: none.
      remat: of the decoder's blocks, as `layers.REMAT`.
      attention: of the "vit" decoder, as `attention.ATTENTIONS`.
      dtype: of the activations of adapter and decoder.

    Raises:
      ValueError: for a decoder of another name, if its images are not of ``image_size``, or for
        LoRA that the encoder cannot have.
    """

    def __init__(
        self,
        encoder: nnx.Module,
        *,
        image_size: int,
        latent_dim: int = 32,
        hidden: int = 1024,
        decoder: str = "conv",
        conv=None,
        vit=None,
        lora=None,
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        grid = encoder.grid
        patch = pixels_per_token(grid, image_size, decoder, conv or {})
        self.latent_shape = (grid, grid, latent_dim)
        self.encoder = encoder
        more = dict(dtype=dtype, rngs=rngs)
        self.adapter = Adapter(encoder.width, hidden, latent_dim, **more)
        more |= dict(remat=remat)
        if decoder == "conv":
            self.decoder = ConvDecoder(
                **(conv or {}),
                z_channels=latent_dim,
                embed_dim=latent_dim,
                post_quant=False,
                **more,
            )
        else:
            sizes = dict(image_size=image_size, patch_size=patch, latent_dim=latent_dim)
            self.decoder = ViTDecoder(**sizes, **(vit or {}), attention=attention, **more)
        if lora and lora["rank"]:
            check_lora(**lora, width=encoder.width)
            # last, so that all the rest starts as it does without
            self.encoder = with_lora(freeze(encoder), **lora, rngs=rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images -> latents [B, h, w, latent_dim] in fp32."""
        return self.encode_all(images).latents

    def encode_all(self, images: jax.Array) -> Encoded:
        """`encode`, and the tokens before the adapter [B, N, width]."""
        features = self.encoder.features(images)
        tokens = self.adapter(features).astype(jnp.float32)
        latents = rearrange(tokens, "b (h w) d -> b h w d", h=self.latent_shape[0])
        return Encoded(latents, None, features.astype(jnp.float32))

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Latents -> images in fp32, about [-1, 1]; nothing random, ``keys`` are not read."""
        del keys
        return self.decoder(latents)

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...], mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """The training pass, which is that of `encode_all` and `decode`: nothing is perturbed."""
        del key, terms, mode
        encoded = self.encode_all(images)
        hidden = self.decoder.hidden(encoded.latents)
        return encoded, Decoded(self.decoder.images(hidden), hidden, {})

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """The gradient at the kernel of the decoder's last layer, from that at the images."""
        return self.decoder.at_last_layer(hidden, gradient)


def pixels_per_token(grid: int, image_size: int, decoder: str, conv) -> int:
    """Edge of the square of pixels that the decoder makes of each token.

    Raises:
      ValueError: if there is no decoder of that name, or its images are not of ``image_size``.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}; use one of {', '.join(DECODERS)}")
    if decoder == "conv":
        f = factor(conv["ch_mult"], image_size)
        remedy = f"take a backbone.*.input_size that gives {image_size // f} tokens per edge"
    else:
        f, remedy = image_size // grid, "take images whose edge is a multiple of the grid's"
    if f * grid != image_size:
        raise ValueError(
            f"the backbone makes {grid} x {grid} tokens of which the decoder makes "
            f"{f * grid} x {f * grid} pixels, but data.image_size is {image_size}; {remedy}"
        )
    return f


def sizes() -> dict:
    """The section ``tokenizer.aligntok``."""
    return dict(
        latent_dim=32,  # [second hand] 32 | 64
        hidden=1024,  # [ours] of the adapter, whose width and activation (here GELU) are unstated
        decoder="conv",  # [second hand] conv: VA-VAE's | vit: GAE's, a variant of ours
        conv=dict(  # [code] of VA-VAE
            ch=128,
            ch_mult=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            attn_resolutions=(16,),
            resolution=256,
        ),
        vit=dict(embed_dim=1024, num_layers=24, num_heads=16, mlp_ratio=4.0),  # GAE-L's
        # [ours] all of it, for the paper says no more than "LoRA": the encoder stays, and products
        # of two matrices learn, of this rank and times alpha / rank. 0: the encoder itself learns
        lora=dict(rank=0, alpha=16.0, layers=LAYERS),
    )


def build(section, backbone, *, image_size, dtype, remat, attention, rngs) -> AlignTok:
    """The tokenizer of a section, around the backbone that ``backbone(rngs)`` makes."""
    more = dict(dtype=dtype, remat=remat, attention=attention, rngs=rngs)
    return AlignTok(backbone(rngs), **section, image_size=image_size, **more)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """(h, w, d) of the latents; raises as `AlignTok`."""
    grid, width = backbone_shape(backbone)
    pixels_per_token(grid, image_size, section["decoder"], section["conv"])
    if "lora" in section:  # absent in runs of older versions
        check_lora(**section["lora"], width=width)
    return grid, grid, section["latent_dim"]


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=("l1", "perceptual", "gan", "align"),
    backbone="trained",
)
