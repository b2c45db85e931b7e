"""Do clusters of latents follow an image's segments? SSC of a run, where there are label maps."""

import itertools
import logging
from pathlib import Path

import numpy as np

from gae_jax.errors import ConfigError
from gae_jax.evaluation import latent, segments
from gae_jax.stages.session import Session
from gae_jax.train.log import Progress


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


def segment_coherence(session: Session, latents: np.ndarray) -> dict[str, float]:
    """Mean SSC of the first held-out images, and of how many: those with two segments or more.

    Args:
      latents: [n, h, w, d] of the readable held-out images, in order.
    """
    check(session)
    config, source = session.config.evaluate, session.source("holdout")
    readable = (index for index in range(len(source)) if source.readable(index))
    chosen = list(itertools.islice(readable, min(config.segment_images, len(latents))))
    maps = []
    with Progress("segments", len(chosen), unit="image") as progress:
        for index in chosen:
            path = Path(config.segments) / source.place(index).with_suffix(".png")
            labels = segments.crop(segments.read(path), session.config.data.image_size, config.crop)
            maps.append(segments.to_grid(labels, latents.shape[1:3]))
            progress.update()
    logging.info("evaluate: SSC of %d images", len(maps))
    found = latent.ssc(latents[: len(maps)], np.stack(maps))
    return {"ssc": float(np.nanmean(found)), "ssc_images": int(np.sum(~np.isnan(found)))}
