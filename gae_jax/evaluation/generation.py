"""Generated images against a reference: FID and its kin, from features that are already there."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gae_jax.errors import ConfigError, DataError
from gae_jax.evaluation.frechet import Reference, frechet
from gae_jax.evaluation.presets import PRESETS, counted
from gae_jax.evaluation.scores import check_order, inception_score, kid, precision_recall

Space = tuple[str, str]  # (name of an extractor, one of its outputs)

# Metric -> the space that it compares.
SPACES: dict[str, Space] = {
    "fid": ("inception", "pool"),
    "sfid": ("inception", "spatial"),
    "inception_score": ("inception", "logits_unbiased"),
    "precision": ("inception", "pool"),
    "recall": ("inception", "pool"),
    "kid": ("inception", "pool"),
    "fd_dinov2": ("dinov2", "cls"),
}
# What the front ends of Inception are, for those whose reference does not say.
FRONT_ENDS = {
    "tf": "TensorFlow's resize, of ADM's evaluator and of torch-fidelity (MAR's and JiT's files)",
    "pytorch_fid": "torch's bilinear resize, of pytorch-fid",
}
FRECHET = ("fid", "sfid", "fd_dinov2")
OF_IMAGES = ("precision", "recall", "kid")  # compare with images, not with statistics
SPLIT = 5_000  # images in a split of ADM's Inception Score


@dataclasses.dataclass(frozen=True)
class ReferenceSet:
    """What generated images are compared with.

    Attributes:
      path: where it came from, for messages.
      digest: SHA-256 of the file, or of the images.
      statistics: mean and covariance of every space that it has.
      features: [n, d] of its images; a file of statistics may hold fewer images than it has
        statistics of, or none.
      front_end: that the statistics were made with; "" if nothing tells, and then none of
        Inception is compared with.
    """

    path: str
    digest: str
    statistics: dict[Space, Reference]
    features: dict[Space, np.ndarray]
    front_end: str = ""


def check_name(front_end: str) -> None:
    """Raises ConfigError if there is no such front end; "" stands for none."""
    if front_end and front_end not in FRONT_ENDS:
        raise ConfigError(f"there is no front end {front_end!r}; use one of {_front_ends()}")


def _front_ends() -> str:
    return "; ".join(f"{name}: {what}" for name, what in FRONT_ENDS.items())


def check_front_end(reference: ReferenceSet, preset: str) -> None:
    """Raises ConfigError if the reference's statistics are of images resized in another way.

    Also if nothing says in which way.
    """
    wanted = PRESETS[preset].front_end
    if not reference.front_end and any(name == "inception" for name, _ in reference.statistics):
        raise ConfigError(
            f"{reference.path} does not say its front end, which is how images were resized and "
            "scaled for the Inception network; FIDs of different ones are not comparable. Find out "
            "which code made it, and pass --ref-front-end=NAME (of a run "
            f"--config.evaluate.reference_front_end=NAME): {_front_ends()}"
        )
    if reference.front_end and reference.front_end != wanted:
        others = [name for name in PRESETS if PRESETS[name].front_end == reference.front_end]
        raise ConfigError(
            f"{reference.path} holds statistics of the front end {reference.front_end!r}, but "
            f"preset {preset!r} resizes images for {wanted!r}: the figure would be of the resize. "
            f"Use one of the presets {', '.join(others)}, or make a reference for this one from "
            "images: make-reference"
        )


def generation_scores(
    features: dict[Space, np.ndarray],
    reference: ReferenceSet,
    preset: str,
    metrics: Sequence[str],
    *,
    labels: np.ndarray | None = None,
    allow_few: bool = False,
    say: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, float], dict[str, float]]:
    """(figures, parts and deviations of them), named with the number of images.

    Args:
      features: of the generated images [n, d], in the order of their file.
      preset: a name of `PRESETS`.
      metrics: of `SPACES`.
      labels: [n]; a split Inception Score of images that are sorted by class is refused.
      allow_few: also covariances of no more images than dimensions.
      say: told what is computed next.

    Raises:
      ConfigError: for an unknown metric, or one that the reference has nothing for.
      DataError: for images that are too few for a metric.
      UserError: for images in an order that spoils a metric.
    """
    if odd := sorted(set(metrics) - set(SPACES)):
        raise ConfigError(f"there is no metric {', '.join(odd)}; known are {', '.join(SPACES)}")
    rules, found, more = PRESETS[preset], {}, {}
    check_front_end(reference, preset)
    for metric in metrics:  # everything that can be refused is, before what takes long
        _check(metric, len(features[SPACES[metric]]), features, reference, allow_few=allow_few)
    if "inception_score" in metrics and rules.inception_score == "consecutive":
        _check_splits(len(features[SPACES["inception_score"]]), labels)
    for metric in metrics:
        at = SPACES[metric]
        own = features[at]
        name = counted(metric, len(own))
        if metric in FRECHET:
            say(name)
            # of few images features are exact, of many statistics are quicker
            distance = frechet(Reference(own), reference.statistics[at])
            found[name] = distance.total
            more[f"{name}.mean_part"] = distance.mean_part
            more[f"{name}.covariance_part"] = distance.covariance_part
        elif metric == "inception_score":
            form = {"consecutive": "adm", "shuffled": "torch_fidelity"}[rules.inception_score]
            score = inception_score(own, form, split=SPLIT)
            found[name], more[f"{name}.std"] = score.mean, score.std
            more[f"{name}.one_split"] = inception_score(own, "one_split").mean
        elif metric == "kid":
            say(name)
            value = kid(reference.features[at], own)
            found[name], more[f"{name}.std"] = value.mean, value.std
    if pair := [metric for metric in ("precision", "recall") if metric in metrics]:
        at = SPACES["precision"]
        say("precision and recall")
        values = precision_recall(
            reference.features[at], features[at], distance=rules.precision_recall
        )
        found |= {counted(m, len(features[at])): getattr(values, m) for m in pair}
        more["reference_images"] = len(reference.features[at])
    return found, more


def _check(metric: str, count: int, features, reference: ReferenceSet, *, allow_few: bool) -> None:
    at = SPACES[metric]
    if metric in FRECHET:
        dimensions = features[at].shape[1]
        if count <= dimensions and not allow_few:
            raise DataError(
                f"{metric}: {count} images are too few for a covariance of {dimensions} "
                "dimensions, and the distance would be far too large; draw more, use kid, or pass "
                "--allow-few for the figure of exactly these images"
            )
        if at not in reference.statistics:
            raise ConfigError(
                f"{metric}: {reference.path} has no statistics of {at[0]} {at[1]}; give a "
                "reference that has them, or images"
            )
    elif metric in OF_IMAGES and at not in reference.features:
        raise ConfigError(
            f"{metric}: {reference.path} holds statistics alone, and {metric} compares images; "
            "give a reference with images (arr_0)"
        )


def _check_splits(count: int, labels: np.ndarray | None) -> None:
    if count % SPLIT:
        raise DataError(
            f"inception_score: {count} images do not divide into splits of {SPLIT:,}, as ADM "
            "scores them; draw a multiple of that, leave the metric out (--metrics), or use "
            "--preset=torch_fidelity"
        )
    if labels is not None:
        check_order(labels, SPLIT)
