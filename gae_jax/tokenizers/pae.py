"""PAE, the Prior-Aligned AutoEncoder (arXiv 2605.07915), as a tokenizer of the pipeline.

The networks are those of `pae_networks`; here they get the run's frozen backbone, images in [-1,
1], and the pass of training: latents are decoded as they are and, where the term "continuity"
counts, turned by two angles as well. There is no other noise.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.nn.layers import freeze
from gae_jax.pretrained.base import Backbone
from gae_jax.tokenizers import pae_losses
from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer, at_linear
from gae_jax.tokenizers.pae_kind import ANGLES, NOISES, check_image_size
from gae_jax.tokenizers.pae_networks import PAE


class PAETokenizer(Tokenizer):
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
        backbone: Backbone,
        *,
        image_size: int,
        noise: str = "tangent",
        angles: tuple[float, float] = ANGLES,
        jitter: float = 0.0,
        detach_z: bool = False,
        decoder_patch_size: int = 16,
        rngs: nnx.Rngs,
        **sizes,
    ):
        grid = backbone.grid
        check_image_size(grid, decoder_patch_size, image_size)
        if noise not in NOISES:
            known = ", ".join(NOISES)
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
        self.latent_shape = (grid, grid, self.pae.latent_dim)

    def encode_all(self, images: jax.Array) -> Encoded:
        """Encode images; features are the modulated tokens that enter the projector."""
        pixels = self.encoder.preprocess(images, antialias=False)
        tokens = self.encoder.features(images, affine=False, antialias=False)
        modulated = self.pae.delta_encoder(pixels, tokens)
        return Encoded(self.pae.compress(modulated), None, modulated.astype(jnp.float32))

    def decode(self, latents: jax.Array, keys=None) -> jax.Array:
        """Decode latents, as they are, without a norm -> images in fp32, about [-1, 1]."""
        del keys  # nothing is drawn
        return self._images(latents)[0]

    def _images(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (images, input of the decoder's last layer)."""
        decoder = self.pae.decoder
        hidden = decoder.hidden(self.pae.decompress(latents))
        patches = decoder.decoder_pred(hidden).astype(jnp.float32)
        return 2 * self.pae.to_images(patches) - 1, hidden

    def perturbed(self, latents: jax.Array, key: jax.Array) -> list[jax.Array]:
        """Rotate latents on their sphere by the two angles, along one random direction."""
        if self.detach_z:
            latents = jax.lax.stop_gradient(latents)
        shape = latents.shape
        if self.pae.sphere == "per-sample":  # all of an image is one point of its sphere
            latents = latents.reshape(len(latents), -1)
        turned = pae_losses.perturbed(
            key, latents, angles=self.angles, noise=self.noise, jitter=self.jitter
        )
        return [x.reshape(shape) for x in turned]

    def forward(self, images: jax.Array, key: jax.Array, *, terms, mode: str = ""):
        """Run the training pass; with "continuity" the extras "middle" and "far" are images too."""
        del mode
        encoded = self.encode_all(images)
        if "continuity" not in terms:
            return encoded, Decoded(*self._images(encoded.latents), {})
        # one batch; the three of an image are neighbours, and so stay on its device
        all_three = jnp.stack([encoded.latents, *self.perturbed(encoded.latents, key)], axis=1)
        images, hidden = (
            rearrange(x, "(b k) ... -> k b ...", k=3)
            for x in self._images(rearrange(all_three, "b k ... -> (b k) ..."))
        )
        restored, middle, far = images
        return encoded, Decoded(restored, hidden[0], {"middle": middle, "far": far})

    def at_last_layer(self, hidden: jax.Array, gradient: jax.Array) -> jax.Array:
        """Compute `base.at_linear`; images leave the layer divided by their std."""
        gradient = 2 * jnp.array(self.pae.image_std) * gradient
        return at_linear(hidden, gradient, self.pae.decoder.patch_size)
