"""Do clusters of latents follow an image's segments? SSC of a run, where there are label maps."""

import logging
from pathlib import Path

import numpy as np

from gae_jax.data.drawing import drawn
from gae_jax.evaluation import latent, segments
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, DataError
from gae_jax.runtime.progress import Progress


def check(session: Session) -> None:
    """Raises ConfigError if ``evaluate.segments`` is set and cannot be served."""
    config = session.config
    if not config.evaluate.segments:
        return
    if config.data.name != "folder":
        raise ConfigError(
            f"evaluate.segments finds label maps by the names of images, which data.name "
            f"{config.data.name!r} does not keep; set data.name to 'folder', or evaluate.segments "
            "to ''"
        )
    if not Path(config.evaluate.segments).is_dir():
        raise ConfigError(f"evaluate.segments is {config.evaluate.segments!r}, which is no folder")


def segment_coherence(
    session: Session, latents: np.ndarray, indices: np.ndarray
) -> dict[str, float]:
    """Mean SSC of held-out images, and of how many: those with two segments or more.

    Args:
      latents: [n, h, w, d] of readable held-out images.
      indices: [n], of these images in their source.
    """
    check(session)
    config, source = session.config.evaluate, session.source("holdout")
    chosen = drawn(source.labels[indices], len(source.class_names), config.segment_images)
    maps = []
    with Progress("segments", len(chosen), unit="image") as progress:
        for index in indices[chosen]:
            path = Path(config.segments) / source.place(index).with_suffix(".png")
            labels = segments.crop(segments.read(path), session.config.data.image_size, config.crop)
            maps.append(segments.to_grid(labels, latents.shape[1:3]))
            progress.update()
    logging.info("evaluate: SSC of %d images", len(maps))
    try:
        found = latent.ssc(latents[chosen], np.stack(maps))
    except DataError as error:
        logging.info("evaluate: no SSC: %s", error)
        return {}
    return {"ssc": float(np.nanmean(found)), "ssc_images": int(np.sum(~np.isnan(found)))}
