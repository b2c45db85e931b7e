"""DGAE: a convolutional KL encoder whose decoder is a diffusion model (arXiv 2506.09644).

p(image | z) is a flow that leads from noise to the image; its velocity comes from a U-Net on pixels
which sees the latent, every pixel of it repeated, as more channels of its input. Trained by the
velocity's error, a perceptual distance of the image that is predicted on the way, and a KL term; no
discriminator. Of the paper's own text only the abstract and the beginning were at hand: what it
leaves open follows epsilon-VAE (arXiv 2410.04081), its nearest relative.

Papers on the subject let t run from data (0) to noise (1). Here as everywhere in this package t = 0
is noise and t = 1 is data, so that with u their time, v their velocity and s the score

    t = 1 - u,  x_t = t image + (1 - t) noise,  velocity = image - noise = -v,
    image = x_t + (1 - t) velocity,  noise = x_t - t velocity,  s = -noise / (1 - t),

and the weight of denoising score matching is |(1 - t) s + noise|^2 = t^2 |velocity's error|^2. The
U-Net gets 1000 u, in the range of the time steps that ADM was trained with.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.generators import flow, samplers
from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer
from gae_jax.tokenizers.conv_vae import ConvEncoder
from gae_jax.tokenizers.dgae_kind import DECODE_SAMPLERS, shape_of
from gae_jax.tokenizers.dgae_unet import UNetModel

TIME_SCALE = 1000.0  # factor of the U-Net's input time
FIXED_NOISE = 0  # seed of the noise of `DGAE.decode` without keys


def linear_path(sigma_min: float) -> flow.Path:
    """Return the path x_t = t data + (1 - (1 - sigma_min) t) noise."""
    slope = 1 - sigma_min
    return flow.Path(
        alpha=lambda t: t,
        d_alpha=jnp.ones_like,
        sigma=lambda t: 1 - slope * t,
        d_sigma=lambda t: -slope * jnp.ones_like(t),
        log_slope=lambda t: 1 / t,
        drift=lambda t: (1 - slope * t) / t,  # log_slope sigma^2 - sigma d_sigma
    )


class DGAE(Tokenizer):
    """Diffusion-guided autoencoder: images [B, S, S, 3] in [-1, 1] <-> latents [B, h, w, d].

    All of it is convolutional but for attention: images of other sizes than ``image_size`` work.

    Args:
      image_size: S, for which ``latent_shape`` is given.
      latent_dim: d.
      encoder: arguments of `ConvEncoder`; h = w = S / 2^(levels - 1).
      decoder: arguments of `UNetModel`.
      time, time_mean, time_std: times of training, as `flow.sample_time` takes them.
      sigma_min: as `linear_path`; of DiTo (arXiv 2501.18593), 0 is none.
      gamma: the images are multiplied by it, which makes x_t noisier, and the U-Net sees
        x_t / sqrt((gamma t)^2 + sigma(t)^2), of variance 1 if that of the images is; of
        epsilon-VAE, 1 is none.
      decode_steps: calls of the U-Net in `decode`.
      decode_sampler: "euler", along the flow, or "euler_maruyama", which adds noise on the way
        (`samplers.sde` with g = sigma); both in steps of the same size.
      remat, dtype: as `ConvEncoder` and `UNetModel`.
      attention: as `UNetModel`.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        latent_dim: int = 16,
        encoder: Mapping,
        decoder: Mapping,
        time: str = "logit_normal",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        sigma_min: float = 0.0,
        gamma: float = 1.0,
        decode_steps: int = 10,
        decode_sampler: str = "euler",
        remat: str = "none",
        attention: str = "xla",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if time not in flow.TIMES:
            raise ValueError(f"time is {time!r}; use one of {', '.join(flow.TIMES)}")
        if decode_sampler not in DECODE_SAMPLERS:
            known = ", ".join(DECODE_SAMPLERS)
            raise ValueError(f"decode_sampler is {decode_sampler!r}; use one of {known}")
        if decode_steps < 1:
            raise ValueError(f"decode_steps is {decode_steps}; use 1 or more")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}; use a number above 0, up to 1, which is none")
        if not 0 <= sigma_min < 1:
            raise ValueError(f"sigma_min is {sigma_min}; use a number from 0 on, below 1")
        self.latent_shape = shape_of(image_size, latent_dim, encoder, decoder)
        self.factor = image_size // self.latent_shape[0]
        self.sigma_min, self.gamma = sigma_min, gamma
        self.time, self.time_mean, self.time_std = time, time_mean, time_std
        self.decode_steps, self.decode_sampler = decode_steps, decode_sampler
        common = dict(remat=remat, dtype=dtype, rngs=rngs)
        self.encoder = ConvEncoder(
            **encoder,
            resolution=image_size,
            z_channels=latent_dim,
            embed_dim=latent_dim,
            **common,
        )
        self.decoder = UNetModel(
            **decoder,
            in_channels=3 + latent_dim,
            out_channels=3,
            attention=attention,
            **common,
        )

    @property
    def path(self) -> flow.Path:
        return linear_path(self.sigma_min)

    def times(self, key: jax.Array, batch: int) -> jax.Array:
        """Sample training times [batch], between noise (0) and data (1)."""
        return flow.sample_time(
            key, batch, kind=self.time, mean=self.time_mean, std=self.time_std, shift=1.0
        )

    def encode_all(self, images: jax.Array) -> Encoded:
        """Encode images: latents [B, h, w, d] and the logarithms of their variances."""
        return Encoded(*self.encoder(images), features=None)

    def velocity(self, x: jax.Array, t: jax.Array, latents: jax.Array) -> jax.Array:
        """Compute the velocity [B, S, S, 3] at x for times t, [B] or one for all."""
        t = jnp.broadcast_to(t, x.shape[:1])
        if self.gamma != 1:
            wide = flow.expand(t, x)
            x = x * jax.lax.rsqrt(
                jnp.square(self.gamma * self.path.alpha(wide)) + jnp.square(self.path.sigma(wide))
            )
        return self.decoder(x, TIME_SCALE * (1 - t), latents)

    def image_of(self, velocity: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Compute the image that a velocity at x predicts: (sigma velocity - d_sigma x) / gamma.

        That is `flow.data_of_velocity`, finite at t = 0 too; x + (1 - t) velocity with
        ``sigma_min`` = 0 and ``gamma`` = 1.
        """
        t = flow.expand(t, x)
        return (self.path.sigma(t) * velocity - self.path.d_sigma(t) * x) / self.gamma

    def decode(self, latents: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Decode latents -> images [B, S, S, 3] in fp32; about [-1, 1], not clamped.

        Args:
          keys: of the noise, one for each image [B]; None: the same noise for all of them.
        """
        if keys is None:
            keys = jnp.broadcast_to(jax.random.key(FIXED_NOISE), latents.shape[:1])
        shape = (self.factor * latents.shape[1], self.factor * latents.shape[2], 3)
        grid = np.linspace(0, 1, self.decode_steps + 1, dtype=np.float32)

        def velocity(x, t):
            return self.velocity(x, t, latents)

        x = samplers.noise_for(keys, shape)
        if self.decode_sampler == "euler":
            return samplers.euler(velocity, x, grid) / self.gamma
        images = samplers.sde(
            velocity,
            x,
            grid[:-1],
            noise=lambda index: samplers.noise_for(keys, shape, index + 1),
            form="sigma",  # finite at t = 0
            last_step="euler",
            path=self.path,
        )
        return images / self.gamma

    def forward(
        self, images: jax.Array, key: jax.Array, *, terms: tuple[str, ...], mode: str = ""
    ) -> tuple[Encoded, Decoded]:
        """Run the training pass, at one time and one noise for each image.

        The latents are a sample of the posterior. ``Decoded.images`` is the image that the velocity
        stands for, and extras["velocity_error"] [B, S, S, 3] what the velocity lacks.
        """
        del terms, mode  # one pass of the U-Net serves all terms
        latent_key, time_key, noise_key = jax.random.split(key, 3)
        posterior = self.encoder(images)
        latents = posterior.sample(latent_key)
        t = self.times(time_key, len(images))
        data, noise = self.gamma * images, jax.random.normal(noise_key, images.shape)
        x = flow.interpolate(noise, data, t, self.path)
        velocity = self.velocity(x, t, latents)
        error = velocity - flow.target_velocity(noise, data, t, self.path)
        decoded = Decoded(self.image_of(velocity, x, t), None, {"velocity_error": error})
        return Encoded(*posterior, features=None), decoded
