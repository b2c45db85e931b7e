"""``likelihood``: log-likelihood of held-out images' latents under the diffusion model."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.generators import flow, samplers
from gae_jax.nn.pixels import to_float
from gae_jax.run.run import StageFolder
from gae_jax.run.sampling import load_networks
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.files import write_figures, write_npz
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import batch_of, put_batch, to_host
from gae_jax.runtime.progress import Progress, Stopwatch, duration


def log_likelihoods(session: Session, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute log p(latents | label) in nats, [n], of uint8 images [n, S, S, 3] and labels [n].

    The density is of the tokenizer's latents: that of the normalised latents, minus the logarithm
    of the scale for every number. Hutchinson's signs are keyed by the image's number, so that
    neither batches nor devices change a figure.
    """
    config, networks = session.config.likelihood, load_networks(session)
    size = batch_of(config.batch_size, len(images), session.mesh)
    key = stage_key("likelihood", session.config.seed)
    arrays = networks.diffusion[1], networks.tokenizer[1]

    @jax.jit
    def score(arrays, images, labels, ids):
        model, tokenizer = networks.diffusion[0](*arrays[0]), networks.tokenizer[0](*arrays[1])
        x = model.normalize(tokenizer.encode(to_float(images)))
        start, end = model.time_range
        normalised, _ = samplers.log_likelihood(
            lambda x, t: model.velocity(x, t, labels),
            x,
            flow.time_grid(config.steps, shift=config.time_shift, start=start, end=end),
            jax.vmap(lambda i: jax.random.rademacher(jax.random.fold_in(key, i), x.shape[1:]))(ids),
        )
        scale = model.latent_std[...] / model.latent_multiplier
        return normalised - jnp.sum(jnp.log(jnp.broadcast_to(scale, x.shape[1:])))

    rows = []
    with Progress("likelihood", len(images), unit="image") as progress:
        for first in range(0, len(images), size):
            ids = np.arange(first, first + size)
            inside = np.minimum(ids, len(images) - 1)
            batch = put_batch((images[inside], labels[inside], ids.astype(np.uint32)), session.mesh)
            rows.append(to_host(score(arrays, *batch))[: len(images) - first])
            progress.update(len(rows[-1]))
    return np.concatenate(rows).astype(np.float64)


def run(session: Session) -> StageFolder:
    """Measure the held-out images, unless that is done.

    Raises:
      ConfigError: for a model of geodesics, whose density is on a sphere.
    """
    stage = session.run.stage("diffusion")
    latent_shape = stage.require_done()["latent_shape"]
    if stage.config.diffusion.flow.geometry != "flat":
        raise ConfigError(
            "likelihood: diffusion.flow.geometry is "
            f"{stage.config.diffusion.flow.geometry!r}; only a model with 'flat' has a density on "
            "all latents"
        )
    folder = session.open(
        "likelihood", sections=("seed", "data", "likelihood"), inputs=("tokenizer", "diffusion")
    )
    if folder.done:
        return folder
    watch, config = Stopwatch(), session.config.likelihood
    images, labels = session.images("holdout", config.images)
    nats = log_likelihoods(session, images, labels)
    numbers = math.prod(latent_shape)
    error, tolerance = {}, ""
    if len(nats) > 1:
        error = {"nats_standard_error": float(nats.std(ddof=1) / math.sqrt(len(nats)))}
        tolerance = f" +- {error['nats_standard_error']:.1f}"
    else:
        logging.info("likelihood: no standard error: there is one held-out image")
    result = {
        "images": len(nats),
        "nats": float(nats.mean()),
        **error,
        "bits_per_dimension": float(-nats.mean() / numbers / math.log(2)),
        "dimensions": numbers,
        "network_calls": 2 * (config.steps - 1),  # each with its vector-Jacobian product
        "of": "log p(latent | class) of the tokenizer's latents, held-out images",
    }
    write_figures(folder.path / "result.json", result)
    write_npz(folder.path / "nats.npz", {"nats": nats, "labels": labels})
    folder.finish(seconds=watch.seconds, **result)
    logging.info(
        "likelihood: %.4f bits per dimension of %d (%.1f%s nats), %d images, %s",
        *(result["bits_per_dimension"], numbers, result["nats"], tolerance),
        *(len(nats), duration(watch.seconds)),
    )
    return folder
