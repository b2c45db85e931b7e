"""``make-reference``: statistics of a data source, for generated images to be compared with."""

import logging

from gae_jax import distributed
from gae_jax.config import plain
from gae_jax.errors import ConfigError, DataError
from gae_jax.evaluation.archives import write_statistics
from gae_jax.evaluation.extractors import check_fd_dinov2, dinov2_extractor
from gae_jax.evaluation.presets import PRESETS
from gae_jax.evaluation.references import moments_of_images
from gae_jax.files import check_writable
from gae_jax.parallel import batch_of
from gae_jax.run import StageFolder, Stopwatch
from gae_jax.stages.judges import images_of, inception_of, say_progress
from gae_jax.stages.load import load
from gae_jax.stages.session import Session
from gae_jax.train.log import duration


def run(session: Session) -> StageFolder:
    """Writes ``reference/reference.npz``, which `evaluate` and ``evaluate-samples`` read.

    Raises:
      ConfigError: if the run has not the network whose features are asked for, or a reference that
        was made in another way.
    """
    config = session.config.make_reference
    front_end = PRESETS[session.config.evaluate.generation].front_end
    extractor = inception_of(session, front_end)
    if extractor is None:
        raise ConfigError(
            "make-reference takes the features of the Inception network: set "
            "evaluate.features to 'inception'"
        )
    extractors, inputs = {"inception": extractor}, ["inception"]
    if config.dinov2:
        folder = session.run.stage("backbone")
        if not (folder.done and folder.config.backbone.name == "dinov2"):
            raise ConfigError(
                f"make_reference.dinov2 is set, but {session.run.path} has no DINOv2; bring it in "
                "with: import-torch --config.import_torch.backbone=FILE"
            )
        check_fd_dinov2(folder.config.backbone.dinov2, session.run.path)
        loaded = load(folder, session.mesh)
        extractors["dinov2"] = dinov2_extractor(*loaded, digest=folder.done["fingerprint"])
        inputs.append("backbone")
    folder = session.open("reference", sections=("data", "make_reference"), inputs=tuple(inputs))
    # of the section `evaluate`, whose other fields are not the reference's business
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
            f"make-reference: the {config.split} split has {len(source)} image; a covariance needs "
            "at least two"
        )
    if distributed.is_first():
        check_writable(folder.path)
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
    facts = {
        "source": repr(source),
        "crop": made["crop"],
        "data": plain(session.config.data),
        "extractors": {name: own.facts() for name, own in extractors.items()},
    }
    path = folder.path / "reference.npz"
    spaces = {space: (own.mean, own.covariance) for (_, space), own in moments.items()}
    if distributed.is_first():
        write_statistics(path, spaces, count=count, front_end=front_end, facts=facts, images=images)
    folder.finish(seconds=watch.seconds, count=count, images=len(images), **made)
    logging.info("make-reference: %d images, %s, %s", count, path, duration(watch.seconds))
    return folder
