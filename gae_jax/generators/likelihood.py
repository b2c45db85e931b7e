"""Log-likelihood of images' latents under a diffusion model, by the ODE of its flow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gae_jax.generators import flow, samplers
from gae_jax.generators.sampling import Networks
from gae_jax.nn.pixels import as_float
from gae_jax.runtime.errors import ConfigError


def check_geometry(geometry: str) -> None:
    """Raise ConfigError for a model of geodesics, whose density is on a sphere."""
    if geometry != "flat":
        raise ConfigError(
            f"likelihood: diffusion.flow.geometry is {geometry!r}; only a model with 'flat' has a "
            "density on all latents"
        )


def make_score(networks: Networks, *, steps: int, time_shift: float) -> Callable:
    """Return (arrays, key, images, labels, ids) -> log p(latents | label) [B], to be jitted.

    In nats, of the tokenizer's latents: the density of the normalised latents, minus the logarithm
    of the scale for every number. Hutchinson's signs are keyed by ``ids``, the images' numbers, so
    that neither batches nor devices change a figure.

    Args:
      networks: ``arrays`` are those of the diffusion model and of the tokenizer. Images are uint8,
        or fp32 in [-1, 1].
      steps, time_shift: of the grid of times, as `flow.time_grid` has them.
    """

    def score(arrays, key, images, labels, ids):
        model, tokenizer = networks.diffusion[0](*arrays[0]), networks.tokenizer[0](*arrays[1])
        x = model.normalize(tokenizer.encode(as_float(images)))
        start, end = model.time_range
        normalised, _ = samplers.log_likelihood(
            lambda x, t: model.velocity(x, t, labels),
            x,
            flow.time_grid(steps, shift=time_shift, start=start, end=end),
            jax.vmap(lambda i: jax.random.rademacher(jax.random.fold_in(key, i), x.shape[1:]))(ids),
        )
        scale = model.latent_std[...] / model.latent_multiplier
        return normalised - jnp.sum(jnp.log(jnp.broadcast_to(scale, x.shape[1:])))

    return score
