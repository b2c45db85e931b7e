"""Scores of generated sets: by the small classifier, Inception, or networks of ImageNet."""

import logging
from collections.abc import Iterator

import numpy as np

from gae_jax.evaluation.extractors import Extractor, each_batch, features_of
from gae_jax.evaluation.frechet import frechet_distance
from gae_jax.evaluation.generation import generation_scores
from gae_jax.evaluation.imagenet import judged_right, labels_in_imagenet
from gae_jax.evaluation.judge import Judge
from gae_jax.evaluation.nearest import nearest_images
from gae_jax.evaluation.presets import PRESETS
from gae_jax.run.judges import (
    generation_reference,
    imagenet_extractors,
    images_of,
    load_inception,
    say_progress,
    settings_of,
    taught,
)
from gae_jax.run.session import Session
from gae_jax.runtime.errors import number_of
from gae_jax.runtime.mesh import batch_of, to_host

# Extractor -> the space in which images are compared.
IMAGE_SPACES = {"efficientnet_lite0": "pool", "vgg16": "pool", "inception": "pool"}
IMAGENET_METRICS = ("fd_efficientnet_lite0", "fd_vgg16")


class GenerationJudge:
    """Scores generated sets of a run as ``evaluate.features`` says, in training and after it.

    Args:
      session: with the data that "judge" is fitted on.

    Attributes:
      facts: of the protocol.
      of_real: figures of real images, for comparison.
    """

    def __init__(self, session: Session):
        self._session, self.kind = session, session.config.evaluate.features
        self.facts: dict = {"features": self.kind}
        self.of_real: dict[str, float] = {}
        config = session.config.evaluate
        if self.kind == "judge":
            self._real, labels = session.images("train", config.probe_images)
            self._judge = Judge(self._real, labels)
            test, test_labels = session.images("holdout", config.probe_images)
            accuracy = float((self._judge.predict(test) == test_labels).mean())
            self.of_real = {"accuracy_real": accuracy}
            if min(len(self._real), len(test)) > 1:
                features = (self._judge.features(images) for images in (self._real, test))
                self.of_real["fd_train_holdout"] = frechet_distance(*features)
        elif self.kind == "inception":
            inception = load_inception(session, PRESETS[config.generation].front_end)
            self._compare_by({"inception": inception}, config.metrics)
            self.facts |= inception.facts() | {"preset": config.generation}
        elif self.kind == "imagenet":
            self._compare_by(imagenet_extractors(session), IMAGENET_METRICS)
            self.facts["extractors"] = {
                name: extractor.facts() for name, extractor in self._extractors.items()
            }
            self.facts["taught"] = taught(session)
            in_imagenet = labels_in_imagenet(session.source("train").class_names)
            self._in_imagenet = in_imagenet
            if in_imagenet is None:
                logging.info(
                    "evaluate: no share judged right: classes are not named by ImageNet's synsets "
                    "(n01440764, ...)"
                )
            elif len(session.source("holdout")):
                self.of_real = {"judged_right_real": self._judged_right_real(in_imagenet)}

    def _compare_by(self, extractors: dict[str, Extractor], metrics: tuple[str, ...]) -> None:
        self._extractors, self._metrics = extractors, metrics
        self._reference = generation_reference(self._session, extractors)
        self.facts["reference"] = self._reference.path
        self.facts["reference_digest"] = self._reference.digest

    def _judged_right_real(self, in_imagenet: np.ndarray) -> float:
        """Share of held-out images that the classifier takes for their class."""
        images, labels = self._session.images("holdout", self._session.config.evaluate.probe_images)
        name = "efficientnet_lite0"
        features = self._features(images, {name: self._extractors[name]}, "held-out images")
        logits = features[name, "logits"]
        return float(judged_right(logits, labels, in_imagenet).mean())

    def _features(self, images: np.ndarray, extractors: dict[str, Extractor], what: str) -> dict:
        """Compute (extractor, space) -> features [n, f] of uint8 images [n, S, S, 3]."""
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
        """The extractor of the small classifier's features, if that judges."""
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
            for real, valid, features in each_batch(
                images_of(session, "train"), {name: extractor}, session.mesh, size=size
            ):
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
        """Score uint8 images [n, S, S, 3] with labels [n].

        ``metrics`` and ``allow_few`` are the config's where they are None.
        """
        config = self._session.config.evaluate
        if self.kind == "judge":
            return judge_samples(self._judge, images, labels, self._real)
        features = self._features(images, self._extractors, "samples")
        figures, parts = generation_scores(
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
        return {**figures, "parts": parts, "count": len(images)}


def judge_samples(judge: Judge, images, labels, reference) -> dict:
    """Measure the judge's accuracy on a set, per class and in all, and the Frechet distance.

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
