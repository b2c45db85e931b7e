"""``reference``: statistics of a data source, to compare generated images with."""

import json
import logging
import shlex
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from gae_jax.config import plain
from gae_jax.evaluation.extractors import check_fd_dinov2, dinov2_extractor
from gae_jax.evaluation.presets import PRESETS
from gae_jax.evaluation.references import moments_of_images
from gae_jax.evaluation.stored_statistics import load_statistics, write_statistics
from gae_jax.run.judges import images_of, inception_of, say_progress
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import ConfigError, DataError, WriteError
from gae_jax.runtime.files import check_writable, writing
from gae_jax.runtime.mesh import batch_of
from gae_jax.runtime.progress import Stopwatch, duration

CHANNELS = 2048  # of Inception's pool, the most of all features


def _check_room(path: Path, size: int) -> None:
    """Raise WriteError if so many bytes do not fit on the disk, before they are computed."""
    with writing(path):
        free = shutil.disk_usage(path.parent).free
    if size > free:
        raise WriteError(
            f"{path} may take {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; make room "
            "there, or give another --workdir"
        )


def _write(write: Callable, path: Path, images) -> None:
    """Write the statistics; if that fails, write them elsewhere and say how to move them.

    Raises:
      WriteError: if the file system refuses.
    """
    try:
        write(path, images=images)
    except (OSError, WriteError) as error:
        other = Path(tempfile.mkdtemp(prefix="gae_jax-reference-")) / path.name
        write(other, images=images)
        raise WriteError(
            f"{error}\nthe statistics are kept in {other}; once {path.parent} can be written: "
            f"mv {shlex.quote(str(other))} {shlex.quote(str(path))} and the same command takes "
            "them from there"
        ) from error


def _kept(path: Path, front_end: str, facts: dict) -> dict | None:
    """Counts of statistics that were written before, if they were made in the same way."""
    if not path.exists():
        return None
    written = load_statistics(path)
    if written.front_end != front_end or written.facts != json.loads(json.dumps(facts)):
        return None
    with np.load(path) as file:
        return {"count": written.count, "images": len(file["arr_0"]) if written.has_images else 0}


def run(session: Session) -> StageFolder:
    """Write ``reference/reference.npz``, which ``evaluate`` and ``evaluate-samples`` read.

    Raises:
      ConfigError: if the run lacks a network that is asked for, or has a reference that was made
        in another way.
    """
    config = session.config.reference
    front_end = PRESETS[session.config.evaluate.generation].front_end
    extractor = inception_of(session, front_end)
    if extractor is None:
        raise ConfigError(
            "reference takes the features of the Inception network; pass "
            "--config.evaluate.features=inception"
        )
    extractors, inputs = {"inception": extractor}, ["inception"]
    if config.dinov2:
        folder = session.run.stage("backbone")
        if not (folder.done and folder.config.backbone.name == "dinov2"):
            raise ConfigError(
                f"reference.dinov2 is set, but {session.run.path} has no DINOv2; import it with: "
                + session.run.command("import-torch", "--config.import_torch.backbone=FILE")
            )
        check_fd_dinov2(folder.config.backbone.dinov2, session.run.path)
        loaded = load(folder, session.mesh)
        extractors["dinov2"] = dinov2_extractor(*loaded, digest=folder.done["fingerprint"])
        inputs.append("backbone")
    folder = session.open("reference", sections=("data", "reference"), inputs=tuple(inputs))
    # of the section `evaluate`, whose other fields do not affect a reference
    made = {"front_end": front_end, "crop": session.config.evaluate.crop}
    if folder.done:
        for name, value in made.items():
            if folder.done[name] != value:
                raise ConfigError(
                    f"{folder.path} was made with {name} {folder.done[name]!r}, this config asks "
                    f"for {value!r}; give another --workdir, or --fresh to make it again"
                )
        return folder
    watch, source = Stopwatch(), session.source(config.split)
    if len(source) < 2:
        raise DataError(
            f"reference: the {config.split} split has {len(source)} image; a covariance needs "
            "at least two"
        )
    path = folder.path / "reference.npz"
    facts = {
        "source": repr(source),
        "crop": made["crop"],
        "data": plain(session.config.data),
        "extractors": {name: extractor.facts() for name, extractor in extractors.items()},
    }
    if kept := distributed.agree(lambda: _kept(path, front_end, facts)):
        folder.finish(seconds=watch.seconds, **kept, **made)
        logging.info("reference: %s was written before", path)
        return folder
    if distributed.is_first():
        check_writable(folder.path)
        kept_images = min(config.images, len(source)) * 3 * session.config.data.image_size**2
        _check_room(path, 8 * (len(extractors) + 1) * CHANNELS**2 + kept_images)
    moments, _, images = moments_of_images(
        images_of(session, config.split),
        len(source),
        extractors,
        session.mesh,
        size=batch_of(session.config.evaluate.batch_size, len(source), session.mesh),
        keep=config.images,
        progress=say_progress(f"{config.split} images", len(source)),
    )
    count = next(iter(moments.values())).count
    spaces = {space: (x.mean, x.covariance) for (_, space), x in moments.items()}
    if distributed.is_first():
        write = partial(
            write_statistics, spaces=spaces, count=count, front_end=front_end, facts=facts
        )
        _write(write, path, images)
    folder.finish(seconds=watch.seconds, count=count, images=len(images), **made)
    logging.info("reference: %d images, %s, %s", count, path, duration(watch.seconds))
    return folder
