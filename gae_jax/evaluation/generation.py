"""Score generated images against a reference: FID and related metrics, from given features."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gae_jax.evaluation.frechet import Reference, frechet
from gae_jax.evaluation.presets import PRESETS, counted
from gae_jax.evaluation.scores import check_order, inception_score, kid, precision_recall
from gae_jax.runtime.errors import ConfigError, DataError

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
    "fd_efficientnet_lite0": ("efficientnet_lite0", "pool"),
    "fd_vgg16": ("vgg16", "pool"),
}
# The front ends of Inception, for messages about references that do not record theirs.
FRONT_ENDS = {
    "tf": "TensorFlow's resize, of ADM's evaluator and of torch-fidelity (MAR's and JiT's files)",
    "pytorch_fid": "torch's bilinear resize, of pytorch-fid",
}
FRECHET = ("fid", "sfid", "fd_dinov2", "fd_efficientnet_lite0", "fd_vgg16")
OF_IMAGES = ("precision", "recall", "kid")  # compare with images, not with statistics
SPLIT = 5_000  # images in a split of ADM's Inception Score
SPLITS = 10  # of torch-fidelity's
SUBSET = 1_000  # images in a subset of KID
NEIGHBOURS = 3  # of precision and recall

# What errors call the settings: flags of evaluate-samples, or fields of a config.
FLAGS = {
    "allow_few": "--allow-few",
    "metrics": "--metrics",
    "preset": "--preset",
    "subset_size": "--kid-subset-size",
    "splits": "--splits",
}
FIELDS = {
    "allow_few": "--config.evaluate.allow_few=True",
    "metrics": "--config.evaluate.metrics",
    "preset": "--config.evaluate.generation",
    "subset_size": "--config.evaluate.kid_subset_size",
    "splits": "--config.evaluate.inception_splits",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the scores besides the preset.

    Attributes:
      allow_few: also covariances of no more images than dimensions.
      subset_size: images in a subset of KID.
      splits: of the Inception Score; 0: the preset's.
      called: what errors call these, `FLAGS` or `FIELDS`.
    """

    allow_few: bool = False
    subset_size: int = SUBSET
    splits: int = 0
    called: Mapping[str, str] = dataclasses.field(default_factory=lambda: FLAGS)


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
    """Raise ConfigError for an unknown front end; "" stands for none."""
    if front_end and front_end not in FRONT_ENDS:
        raise ConfigError(f"there is no front end {front_end!r}; use one of {_front_ends()}")


def _front_ends() -> str:
    return "; ".join(f"{name}: {what}" for name, what in FRONT_ENDS.items())


def check_front_end(reference: ReferenceSet, preset: str) -> None:
    """Raise ConfigError if the reference's statistics are of images resized differently.

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
        usable = [name for name in PRESETS if PRESETS[name].front_end == reference.front_end]
        raise ConfigError(
            f"{reference.path} holds statistics of the front end {reference.front_end!r}, but "
            f"preset {preset!r} resizes images for {wanted!r}: the figure would be of the resize. "
            f"Use one of the presets {', '.join(usable)}, or make a reference for this one from "
            "images: reference"
        )


def generation_scores(
    features: dict[Space, np.ndarray],
    reference: ReferenceSet,
    preset: str,
    metrics: Sequence[str],
    *,
    labels: np.ndarray | None = None,
    settings: Settings = Settings(),
    say: Callable[[str], None] = lambda what: None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute (metrics, details such as parts and stds), named with the number of images.

    Args:
      features: of the generated images [n, d], in the order of their file.
      preset: a name of `PRESETS`.
      metrics: of `SPACES`.
      labels: [n]; a split Inception Score of images that are sorted by class is refused.
      settings: besides the preset.
      say: called with what is computed next.

    Raises:
      ConfigError: for an unknown metric, or one that the reference has nothing for.
      DataError: for images that are too few for a metric.
      UserError: for images in an order that spoils a metric.
    """
    rules = PRESETS[preset]
    scores: dict[str, float] = {}
    details: dict[str, float] = {}
    check_metrics(metrics)
    counts = {len(features[SPACES[metric]]) for metric in metrics}
    for count in counts:  # everything that can be refused is, before what takes long
        check_scores(
            reference,
            preset,
            metrics,
            count=count,
            sizes={at: x.shape[1] for at, x in features.items()},
            images={at: len(x) for at, x in reference.features.items()},
            labels=labels,
            settings=settings,
        )
    for metric in metrics:
        at = SPACES[metric]
        generated = features[at]
        name = counted(metric, len(generated))
        if metric in FRECHET:
            say(name)
            # of few images features are exact, of many statistics are quicker
            distance = frechet(Reference(generated), reference.statistics[at])
            scores[name] = distance.total
            details[f"{name}.mean_part"] = distance.mean_part
            details[f"{name}.covariance_part"] = distance.covariance_part
        elif metric == "inception_score":
            form = {"consecutive": "adm", "shuffled": "torch_fidelity"}[rules.inception_score]
            parts = settings.splits or SPLITS
            split = len(generated) // settings.splits if settings.splits else SPLIT
            score = inception_score(generated, form, split=split, splits=parts)
            scores[name], details[f"{name}.std"] = score.mean, score.std
            details[f"{name}.one_split"] = inception_score(generated, "one_split").mean
        elif metric == "kid":
            say(name)
            value = kid(reference.features[at], generated, size=settings.subset_size)
            scores[name], details[f"{name}.std"] = value.mean, value.std
    if pair := [metric for metric in ("precision", "recall") if metric in metrics]:
        at = SPACES["precision"]
        say("precision and recall")
        values = precision_recall(
            reference.features[at],
            features[at],
            k=NEIGHBOURS,
            distance=rules.precision_recall,
        )
        scores |= {counted(m, len(features[at])): getattr(values, m) for m in pair}
        details["reference_images"] = len(reference.features[at])
    return scores, details


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise ConfigError for an unknown metric."""
    if odd := sorted(set(metrics) - set(SPACES)):
        raise ConfigError(f"there is no metric {', '.join(odd)}; known are {', '.join(SPACES)}")


def check_scores(
    reference: ReferenceSet,
    preset: str,
    metrics: Sequence[str],
    *,
    count: int,
    sizes: Mapping[Space, int],
    images: Mapping[Space, int],
    labels: np.ndarray | None = None,
    settings: Settings = Settings(),
) -> None:
    """Raise for what `generation_scores` could not compute, known from numbers alone.

    Args:
      reference: its features are not read and may be missing.
      count: of generated images.
      sizes: dimensions of every space.
      images: of the reference, by the spaces that they have or will have features of; without
        statistics in ``reference`` these are made of them.
      labels, settings: as of `generation_scores`.

    Raises:
      UserError: as `generation_scores`.
    """
    check_metrics(metrics)
    check_front_end(reference, preset)
    for metric in metrics:
        at = SPACES[metric]
        if metric in FRECHET:
            _check_frechet(metric, count, sizes[at], images.get(at, 0), reference, settings)
        elif metric in OF_IMAGES:
            _check_images(metric, count, images.get(at, 0), reference, settings)
        else:
            _check_splits(count, labels, PRESETS[preset].inception_score, settings)


def _check_frechet(metric, count, size, images, reference, settings) -> None:
    at, called = SPACES[metric], settings.called
    if count < 2 or (count <= size and not settings.allow_few):
        few = "" if count < 2 else (
            f", or pass {called['allow_few']} for the figure of exactly these images"
        )  # fmt: skip
        raise DataError(
            f"{metric}: {count} images are too few for a covariance of {size} dimensions, and the "
            f"distance would be far too large; draw more, use kid ({called['metrics']}){few}"
        )
    stored = reference.statistics.get(at)
    if stored is None and (reference.statistics or images < 2):
        raise ConfigError(
            f"{metric}: {reference.path} has no statistics of {at[0]} {at[1]}; give a reference "
            "that has them, or at least two images"
        )
    if stored is not None and stored.mean.size != size:
        raise DataError(
            f"{metric}: {reference.path} holds statistics of {stored.mean.size} dimensions, and "
            f"{at[0]} {at[1]} has {size} here: they are of another network; give a reference that "
            "was made with this one, or images"
        )


def _check_images(metric, count, images, reference, settings) -> None:
    called = settings.called
    if not images:
        raise ConfigError(
            f"{metric}: {reference.path} holds statistics alone, and {metric} compares images; "
            "give a reference with images (arr_0)"
        )
    least = min(count, images)
    both = f"{count} images and {images} of the reference"
    if metric == "kid" and not 2 <= settings.subset_size <= least:
        remedy = f"leave the metric out ({called['metrics']})"
        if least >= 2:
            remedy = f"pass {called['subset_size']}={least}, or less, or {remedy}"
        raise DataError(
            f"kid: subsets of {settings.subset_size} cannot be drawn of {both}; draw more, or "
            f"{remedy}. Stds over subsets of different sizes are not comparable"
        )
    if metric != "kid" and least < NEIGHBOURS + 1:
        raise DataError(
            f"{metric}: {both} have no {NEIGHBOURS} neighbours each; give at least "
            f"{NEIGHBOURS + 1}, or leave the metric out ({called['metrics']})"
        )


def _check_splits(count: int, labels: np.ndarray | None, form: str, settings: Settings) -> None:
    called, splits = settings.called, settings.splits
    if form == "shuffled":
        if (splits or SPLITS) > count:
            raise DataError(
                f"inception_score: {count} images in {splits or SPLITS} splits; draw more, or pass "
                f"{called['splits']}={count}, or fewer"
            )
        return
    if count % splits if splits else count % SPLIT:
        parts = f"{splits} equal splits" if splits else f"splits of {SPLIT:,}, as ADM scores them"
        raise DataError(
            f"inception_score: {count} images do not divide into {parts}; draw a multiple of that, "
            f"pass {called['splits']}=N with an N that divides {count}, such as 1, leave the "
            f"metric out ({called['metrics']}), or use {called['preset']}=torch_fidelity"
        )
    if labels is not None and splits != 1:
        check_order(labels, count // splits if splits else SPLIT)
