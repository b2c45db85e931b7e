"""References of generated images, from a file of statistics or from images."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from gae_jax.evaluation.archives import open_samples, samples_digest
from gae_jax.evaluation.extractors import Extractor, each_batch, features_of
from gae_jax.evaluation.frechet import Reference
from gae_jax.evaluation.generation import FRECHET, SPACES, ReferenceSet, Space, check_name
from gae_jax.evaluation.statistics import Accumulator, Moments
from gae_jax.evaluation.stored_statistics import Statistics, is_statistics, load_statistics
from gae_jax.runtime.errors import ConfigError, DataError
from gae_jax.runtime.files import explained, read_npz, write_npz
from gae_jax.runtime.mesh import batch_of, to_host

IMAGES = 10_000  # whose features are stored with the statistics, as ADM's files have images
# Of the spaces of stored statistics, whose names say no network.
EXTRACTOR_OF = {SPACES[metric][1]: SPACES[metric][0] for metric in ("fid", "sfid", "fd_dinov2")}
SEPARATOR = "|"  # of keys in a file; in no name of an extractor or a space
# (what, number of images) -> function that is called with the number of images that are done.
Say = Callable[[str, int], Callable[[int], None]]


def load_reference(
    path: Path,
    extractors: Mapping[str, Extractor],
    mesh: Mesh,
    *,
    size: int,
    say: Say,
    check: Callable[[ReferenceSet, int], None] = lambda reference, images: None,
    front_end: str = "",
) -> ReferenceSet:
    """Load the reference of a file: statistics, with or without images, or samples.

    Args:
      extractors: by name; they compute the features of the file's images, if it has any.
      size: most images that are computed at once.
      say: shows progress.
      check: called before any feature is computed, to refuse a reference: with the reference
        without features, and its number of images.
      front_end: that statistics were made with, for files that do not say.

    Raises:
      DataError: if the file cannot be used, or was made with other weights than the extractors'.
      ConfigError: for an unknown front end, or a different one from the file's.
    """
    known, count = known_of_reference(path, extractors, front_end=front_end)
    check(known, count)
    statistics, front_end = known.statistics, known.front_end
    features: dict[Space, np.ndarray] = {}
    if count and extractors:
        samples, size = open_samples(path), batch_of(size, count, mesh)
        progress = say(f"reference {path.name}", count)
        batches = samples.batches(size)
        features = _by_space(features_of(batches, extractors, mesh, size=size, progress=progress))
        if not statistics:
            statistics = {at: Reference(features[at]) for at in _spaces(extractors)}
            front_end = getattr(extractors.get("inception"), "front_end", "")
    return ReferenceSet(known.path, samples_digest(path), statistics, features, front_end)


def known_of_reference(
    path: Path, extractors: Mapping[str, Extractor] | None = None, *, front_end: str = ""
) -> tuple[ReferenceSet, int]:
    """Return (a reference without features and digest, number of images of the file).

    Args:
      extractors: whose statistics are wanted; None: all.
      front_end: that statistics were made with, for files that do not say.

    Raises:
      DataError: if the file cannot be used, or was made with other weights than the extractors'.
      ConfigError: for an unknown front end, or a different one from the file's.
    """
    extractors = extractors or {}
    check_name(front_end)
    statistics, has_images = {}, True
    if is_statistics(path):
        stored = load_statistics(path)
        check_weights(stored, extractors)
        if front_end and stored.front_end not in ("", front_end):
            raise ConfigError(
                f"{path} says itself that its front end is {stored.front_end!r}, not "
                f"{front_end!r}; leave --ref-front-end (evaluate.reference_front_end) out"
            )
        front_end, has_images = stored.front_end or front_end, stored.has_images
        for space, (mean, covariance) in stored.spaces.items():
            if extractors and EXTRACTOR_OF[space] not in extractors:
                continue  # and then its front end does not matter
            reference = Reference.of_statistics(mean, covariance, count=stored.count or None)
            statistics[EXTRACTOR_OF[space], space] = reference
    count = open_samples(path).count if has_images else 0
    return ReferenceSet(str(path), "", statistics, {}, front_end), count


def check_weights(stored: Statistics, extractors: Mapping[str, Extractor]) -> None:
    """Raise DataError if a file records other weights of a network than those in use."""
    recorded = stored.facts.get("extractors", {})
    for name, extractor in extractors.items():
        digest = recorded.get(name, {}).get("extractor_weights", "")
        if digest and extractor.digest and digest != extractor.digest:
            raise DataError(
                f"{stored.path} was made with other weights of {name} ({digest}) than are used now "
                f"({extractor.digest}): the distance would be of the weights. Use those, or make "
                "the reference again with these: reference"
            )


def _by_space(rows: Mapping[str, Mapping[str, np.ndarray]]) -> dict[Space, np.ndarray]:
    """Return {(extractor, output): rows} of {extractor: {output: rows}}."""
    return {(name, output): x for name, outputs in rows.items() for output, x in outputs.items()}


def _spaces(extractors: Mapping[str, Extractor]) -> list[Space]:
    """Return the spaces of Frechet distances that an extractor gives."""
    return [SPACES[metric] for metric in FRECHET if SPACES[metric][0] in extractors]


def moments_of_images(
    batches: Iterable[np.ndarray],
    count: int,
    extractors: Mapping[str, Extractor],
    mesh: Mesh,
    *,
    size: int,
    keep: int = IMAGES,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[dict[Space, Moments], dict[Space, np.ndarray], np.ndarray]:
    """Compute statistics of any number of images without holding all in memory.

    Args:
      batches: uint8 [n, H, W, 3], n <= size, about ``count`` images in all.
      keep: images whose features and pixels are kept, evenly spaced: data sets lie class by class.

    Returns:
      (moments of every space of a Frechet distance, features [k, d] of all spaces of the kept
      images, these images uint8 [k, H, W, 3]).
    """
    spaces = _spaces(extractors)
    sums = {at: Accumulator(mesh) for at in spaces}
    chosen = np.unique(np.linspace(0, count - 1, min(keep, count)).round().astype(int))
    rows: list[dict] = []
    pixels, seen = [], 0
    for images, valid, activations in each_batch(batches, extractors, mesh, size=size):
        for at in spaces:
            sums[at].add(activations[at[0]][at[1]], valid)
        here = chosen[(chosen >= seen) & (chosen < seen + len(images))] - seen
        if len(here):
            rows.append(to_host(jax.tree.map(lambda x, here=here: x[here], activations)))
            pixels.append(images[here])
        seen += len(images)
        progress(len(images))
    moments = {at: sums[at].moments(expected=seen) for at in spaces}
    features = _by_space(jax.tree.map(lambda *parts: np.concatenate(parts), *rows))
    return moments, features, np.concatenate(pixels)


def save_moments(
    path: Path, moments: Mapping[Space, Moments], features: Mapping[Space, np.ndarray]
) -> None:
    """Save the results of `moments_of_images`, except images."""
    arrays = {_key("features", at): rows for at, rows in features.items()}
    for at, x in moments.items():
        arrays |= {_key(name, at): np.asarray(getattr(x, name)) for name in ("count", "mean", "m2")}
    write_npz(path, arrays)


def load_moments(path: Path) -> tuple[dict[Space, Moments], dict[Space, np.ndarray]]:
    """Load what `save_moments` saved: (moments, features [k, d]) by space.

    Raises:
      DataError: if the file is damaged.
    """
    remedy = "remove it"
    arrays = read_npz(path, remedy=remedy)
    by_kind: dict[str, dict[Space, np.ndarray]] = {}
    with explained(path, remedy):
        for key, array in arrays.items():
            kind, name, space = key.split(SEPARATOR)
            by_kind.setdefault(kind, {})[name, space] = array
        moments = {
            at: Moments(int(by_kind["count"][at]), mean, by_kind["m2"][at])
            for at, mean in by_kind["mean"].items()
        }
        return moments, by_kind["features"]


def _key(kind: str, at: Space) -> str:
    return SEPARATOR.join((kind, *at))
