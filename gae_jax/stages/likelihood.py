"""``likelihood``: log-likelihood of held-out images' latents under the diffusion model."""

import logging
import math

import jax
import numpy as np

from gae_jax.generators.likelihood import check_geometry, make_score
from gae_jax.run.batches import in_batches
from gae_jax.run.run import StageFolder
from gae_jax.run.sampling import load_networks
from gae_jax.run.session import Session
from gae_jax.runtime.files import write_figures, write_npz
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.progress import Progress, Stopwatch, duration


def log_likelihoods(session: Session, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute log p(latents | label) in nats, [n], of uint8 images [n, S, S, 3] and labels [n].

    Image i is number i of `generators.likelihood.make_score`.
    """
    config, networks = session.config.likelihood, load_networks(session)
    arrays = networks.diffusion[1], networks.tokenizer[1]
    score = jax.jit(make_score(networks, steps=config.steps, time_shift=config.time_shift))
    with Progress("likelihood", len(images), unit="image") as progress:
        return in_batches(
            score,
            (arrays, stage_key("likelihood", session.config.seed)),
            (images, labels, np.arange(len(images), dtype=np.uint32)),
            mesh=session.mesh,
            batch_size=min(config.batch_size, len(images)),
            callback=lambda done, _: progress.update(done - progress.done),
        ).astype(np.float64)


def run(session: Session) -> StageFolder:
    """Measure the held-out images, unless that is done.

    Raises:
      ConfigError: for a model of geodesics, whose density is on a sphere.
    """
    stage = session.run.stage("diffusion")
    latent_shape = stage.require_done()["latent_shape"]
    check_geometry(stage.config.diffusion.flow.geometry)
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
