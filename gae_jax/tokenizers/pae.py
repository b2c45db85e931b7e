"""PAE, the Prior-Aligned AutoEncoder (arXiv 2605.07915), as a tokenizer of the pipeline.

The networks are those of `models.pae`; here they get the run's frozen backbone, images in [-1, 1],
and the pass of training: latents are decoded as they are and, where the term "continuity" counts,
turned by two angles as well. There is no other noise.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn.layers import freeze
from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.tokenizers import mae_decoder, pae_losses
from gae_jax.tokenizers.base import Decoded, Encoded, Kind, at_linear
from gae_jax.tokenizers.pae_networks import PAE

# Fields of the section that only training reads; `PAE` does not have them.
TRAINING = ("angles", "noise", "jitter", "detach_z")
TERMS = ("l1", "perceptual", "gan", "align", "structure", "semantics", "continuity")


class PAETokenizer(nnx.Module):
    """A frozen backbone (``encoder``) and all that PAE trains on top of it (``pae``).

    Args:
      backbone: frozen here; its last norm is applied without weights.
      image_size: of the images that come out, in pixels; those that come in may have any size.
      noise, angles, jitter: of the term "continuity", as `pae_losses.perturbed`.
      detach_z: the gradient of that term does not reach the encoder.
      sizes: of `PAE`, less those that the backbone has: num_heads, delta_depth, fusion_mode,
        latent_dim, sphere, decoder_patch_size and the decoder's.

    Raises:
      ValueError: if the decoder's patches on the backbone's grid make another size.
    """

    def __init__(
        self,
        backbone: nnx.Module,
        *,
        image_size: int,
        noise: str = "tangent",
        angles: tuple[float, float] = pae_losses.ANGLES,
        jitter: float = 0.0,
        detach_z: bool = False,
        decoder_patch_size: int = 16,
        rngs: nnx.Rngs,
        **sizes,
    ):
        grid = backbone.grid
        _check_image_size(grid, decoder_patch_size, image_size)
        if noise not in pae_losses.NOISES:
            known = ", ".join(pae_losses.NOISES)
            raise ValueError(f"noise is {noise!r}; use one of {known}")
        if not 0 < angles[0] < angles[1] < 90:
            raise ValueError(f"angles are {tuple(angles)}; give two between 0 and 90, growing")
        self.noise, self.angles, self.jitter = noise, tuple(angles), jitter
        self.detach_z = detach_z
        patch = backbone.encoder.patch_embed.patch_size
        self.encoder = freeze(backbone)
        self.pae = PAE(
            hidden_size=backbone.width,
            encoder_input_size=grid * patch,
            encoder_patch_size=patch,
            decoder_patch_size=decoder_patch_size,
            image_mean=tuple(backbone.image_mean.tolist()),
            image_std=tuple(backbone.image_std.tolist()),
            rngs=rngs,
            **sizes,
        )
        channels = self.pae.latent_compressor[1].out_features
        self.latent_shape = (grid, grid, channels)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> latents [B, h, w, d] in fp32, on the sphere."""
        return self.encode_all(images).latents

    def encode_all(self, images: jax.Array) -> Encoded:
        """`encode`; the features are the modulated tokens that enter the projector."""
        pixels = self.encoder.preprocess(images, antialias=False)
        tokens = self.encoder.features(images, affine=False, antialias=False)
        modulated = self.pae.delta_encoder(pixels, tokens)
        return Encoded(self.pae.compress(modulated), None, modulated.astype(jnp.float32))

    def decode(self, latents: jax.Array, keys=None) -> jax.Array:
        """Latents -> images in fp32, about [-1, 1]. Latents are taken as they are: no norm."""
        del keys  # nothing is drawn
        return self._images(latents)[0]

    def _images(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(images, what enters the decoder's last layer)."""
        decoder = self.pae.decoder
        hidden = decoder.hidden(self.pae.decompress(latents))
        patches = decoder.decoder_pred(hidden).astype(jnp.float32)
        return 2 * self.pae.to_images(patches) - 1, hidden

    def perturb(self, latents: jax.Array, key: jax.Array) -> list[jax.Array]:
        """The latents, turned by the two angles along one random direction, on their sphere."""
        if self.detach_z:
            latents = jax.lax.stop_gradient(latents)
        shape = latents.shape
        if self.pae.sphere == "per-sample":  # all of an image is one point of its sphere
            latents = latents.reshape(len(latents), -1)
        law = dict(angles=self.angles, noise=self.noise, jitter=self.jitter)
        return [x.reshape(shape) for x in pae_losses.perturbed(key, latents, **law)]

    def forward(self, images: jax.Array, key: jax.Array, *, terms, mode: str = ""):
        """(`Encoded`, `Decoded`); with "continuity" the extras "middle" and "far", images too."""
        del mode
        encoded = self.encode_all(images)
        if "continuity" not in terms:
            return encoded, Decoded(*self._images(encoded.latents), {})
        # one batch; the three of an image are neighbours, and so stay on its device
        all_three = jnp.stack([encoded.latents, *self.perturb(encoded.latents, key)], axis=1)
        images, hidden = (
            rearrange(x, "(b k) ... -> k b ...", k=3)
            for x in self._images(rearrange(all_three, "b k ... -> (b k) ..."))
        )
        restored, middle, far = images
        return encoded, Decoded(restored, hidden[0], {"middle": middle, "far": far})

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """As `models.tokenizer.at_linear`; images leave the layer divided by the deviation."""
        gradient = 2 * jnp.array(self.pae.image_std) * gradient
        return at_linear(hidden, gradient, self.pae.decoder.patch_size)


def _check_image_size(grid: int, patch_size: int, image_size: int) -> None:
    if grid * patch_size != image_size:
        raise ValueError(
            f"decoder_patch_size {patch_size} on the backbone's grid of {grid} x {grid} tokens "
            f"makes images of {grid * patch_size} pixels, but data.image_size is {image_size}"
        )


def sizes() -> dict:
    """PAE over DINOv2-L, f16 d32. The paper was read second hand, the released code itself."""
    return dict(
        num_heads=16,  # [code] of modulator and bottleneck: as many as the backbone's
        delta_depth=6,  # [second hand] K, layers of the modulator
        fusion_mode="sft",  # [code] sft | add | concat | none
        latent_dim=32,  # [code]
        sphere="per-token",  # [code] per-token | per-sample
        decoder_patch_size=16,  # [code]
        **mae_decoder.PRESETS["L"],  # [code] all released PAEs have it
        angles=pae_losses.ANGLES,  # [second hand] degrees, of MCR
        noise="tangent",  # [ours] tangent, of just these angles | isotropic, of about these
        jitter=0.0,  # [ours] an image's angles are multiplied by one number in [1 - jitter, 1]
        detach_z=False,  # [ours] MCR teaches the encoder too
    )


def build(section, backbone, *, image_size: int, dtype, remat, attention, rngs) -> PAETokenizer:
    """A `PAETokenizer` on a backbone of its own."""
    compute = dict(dtype=dtype, remat=remat, attention=attention)
    return PAETokenizer(backbone(rngs), image_size=image_size, **section, **compute, rngs=rngs)


def released_sizes(section, backbone) -> dict:
    """Arguments of the released `PAE`, from the sections of tokenizer and backbone."""
    own = {name: section[name] for name in section if name not in TRAINING}
    grid, width = backbone_shape(backbone)
    model = backbone[backbone["name"]]
    return dict(
        hidden_size=width,
        encoder_input_size=grid * model["patch_size"],
        encoder_patch_size=model["patch_size"],
        **own,
    )


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """(h, w, d): the backbone's grid.

    Raises:
      ValueError: if the decoder makes images of another size.
    """
    grid = backbone_shape(backbone)[0]
    _check_image_size(grid, section["decoder_patch_size"], image_size)
    return grid, grid, section["latent_dim"]


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=TERMS,
    backbone="frozen",
)
