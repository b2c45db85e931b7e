"""What judges the images of a run: LPIPS, the Inception network, references, a small classifier."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gae_jax.errors import ConfigError
from gae_jax.evaluation.extractors import (
    HOW_TO_GET_INCEPTION,
    Extractor,
    dimensions_of,
    features_of,
    inception_extractor,
)
from gae_jax.evaluation.frechet import Reference, frechet_distance
from gae_jax.evaluation.generation import (
    FIELDS,
    ReferenceSet,
    Settings,
    check_scores,
    generation_scores,
)
from gae_jax.evaluation.judge import Judge
from gae_jax.evaluation.presets import PRESETS
from gae_jax.evaluation.references import (
    IMAGES,
    known_of_reference,
    load_reference,
    moments_of_images,
)
from gae_jax.evaluation.tokenizer import Loaded
from gae_jax.parallel import batch_of
from gae_jax.run import StageFolder
from gae_jax.stages.load import load
from gae_jax.stages.session import Session
from gae_jax.train.log import Progress

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
}


def wanted(session: Session) -> tuple[str, ...]:
    """The networks of metrics that the config asks for."""
    config = session.config.evaluate
    asked = {"lpips": config.lpips, "inception": config.features == "inception"}
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
    if "lpips" not in wanted(session) or not (folder.done or required):
        return None
    if not folder.done:
        raise ConfigError(REMEDIES["lpips"].format(run=session.run.path))
    return load(folder, session.mesh, precision="highest")


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


def generation_reference(session: Session, extractor: Extractor) -> ReferenceSet:
    """What the config names, or the training images of the run."""
    config, extractors = session.config.evaluate, {"inception": extractor}
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
    moments, features, _ = moments_of_images(
        images_of(session, "train"),
        len(source),
        extractors,
        session.mesh,
        size=config.batch_size,
        progress=say_progress("training images", len(source)),
    )
    statistics = {at: Reference(own) for at, own in moments.items()}
    where = f"the training images of {session.run.path}"
    return ReferenceSet(where, repr(source), statistics, features, extractor.front_end)


def without_judge(session: Session) -> str:
    """Why the small classifier cannot judge, where the config asks for it; "" if it can."""
    names = session.source("train").class_names
    if session.config.evaluate.features != "judge" or len(names) > 1:
        return ""
    return f"all training images are of the class {names[0]!r}, and it tells classes apart"


def settings_of(config, *, allow_few: bool | None = None) -> Settings:
    """How the section ``evaluate`` scores sets; ``allow_few`` in the place of its own."""
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
        config = session.config.evaluate
        if self.kind == "judge":
            self._real, labels = session.images("train", config.probe_images)
            self._judge = Judge(self._real, labels)
            test, test_labels = session.images("holdout", config.probe_images)
            self.own = {"accuracy_real": float((self._judge.predict(test) == test_labels).mean())}
            if len(test) > 1:
                self.own["fd_train_holdout"] = frechet_distance(
                    self._judge.features(self._real), self._judge.features(test)
                )
        elif self.kind == "inception":
            self._extractor = inception_of(session, PRESETS[config.generation].front_end)
            self._reference = generation_reference(session, self._extractor)
            self.facts |= self._extractor.facts() | {
                "preset": config.generation,
                "reference": self._reference.path,
                "reference_digest": self._reference.digest,
            }

    @property
    def extractor(self) -> Extractor:
        """Of the features that it compares images by, where it is the small classifier."""
        return self._judge.extractor()

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
        size = batch_of(config.batch_size, len(images), self._session.mesh)
        rows = features_of(
            (images[first : first + size] for first in range(0, len(images), size)),
            {"inception": self._extractor},
            self._session.mesh,
            size=size,
            progress=say_progress("features of samples", len(images)),
        )
        features = {("inception", space): x for space, x in rows["inception"].items()}
        figures, more = generation_scores(
            features,
            self._reference,
            config.generation,
            config.metrics if metrics is None else metrics,
            labels=labels,
            settings=settings_of(config, allow_few=allow_few),
            say=lambda what: logging.info("evaluate: %s", what),
        )
        return {**figures, "parts": more, "count": len(images)}


def judge_samples(judge: Judge, images, labels, reference) -> dict:
    """Accuracy of the judge on a set, per class and in all, and the Frechet distance."""
    right = judge.predict(images) == labels
    per_class = {str(c): float(right[labels == c].mean()) for c in np.unique(labels)}
    return {
        "accuracy": float(right.mean()),
        "accuracy_worst_class": min(per_class.values()),
        "per_class": per_class,
        "fd": frechet_distance(judge.features(images), judge.features(reference)),
        "count": len(images),
    }
