"""Do nearest neighbours in the latents share a class? GSQ and class neighbourhood."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.runtime.errors import DataError

BLOCK = 1024  # rows compared with all others, or images transformed, at once
TINY = np.finfo(np.float32).tiny


def pooled(latents: np.ndarray) -> np.ndarray:
    """Average latents over positions: [n, d], in float64."""
    return np.asarray(latents).mean(axis=(1, 2), dtype=np.float64)


def nearest(features: np.ndarray, k: int) -> np.ndarray:
    """Return indices [n, k] of each row's ``k`` most similar others by cosine, nearest first.

    Args:
      features: [n, d]; rows are compared in float32 with matmuls of highest precision.

    Raises:
      DataError: if there are not more than ``k`` rows.
    """
    if len(features) <= k:
        raise DataError(
            f"{len(features)} images have no {k} others each to be compared with; give more images"
        )
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit = (features / np.maximum(norm, TINY)).astype(np.float32)
    all_rows = jnp.asarray(unit)
    return np.concatenate(
        [
            jax.device_get(_nearest(all_rows, unit[first : first + BLOCK], first, k))
            for first in range(0, len(unit), BLOCK)
        ]
    )


@functools.partial(jax.jit, static_argnums=3)
def _nearest(unit, rows, first, k):
    cosine = jnp.matmul(rows, unit.T, precision="highest")
    same = jnp.arange(len(unit)) == first + jnp.arange(len(rows))[:, None]
    return jax.lax.top_k(jnp.where(same, -jnp.inf, cosine), k)[1]


def class_neighbourhood(latents: np.ndarray, labels: np.ndarray, *, k: int = 10) -> float:
    """Compute LNC of 2606.03578, in [0, 1]: share of k nearest neighbours of the same class.

    Read second hand; k, the cosine and the features (means over positions minus the set's mean,
    as in `gsq`) are ours.

    Args:
      latents: [n, h, w, d]; labels: [n].

    Raises:
      DataError: if there are not more than ``k`` images.
    """
    labels = np.asarray(labels)
    features = pooled(latents)
    features = features - features.mean(axis=0)
    return float(np.mean(labels[nearest(features, k)] == labels[:, None]))


class Repeats(NamedTuple):
    """A figure over random repeats."""

    mean: float
    std: float  # over repeats, 0 with one
    repeats: int


def gsq(
    latents: np.ndarray, labels: np.ndarray, *, classes: int = 100, repeats: int = 5, seed: int = 0
) -> Repeats:
    """Compute PAE's GSQ, in [0, 1]: how often an image's nearest neighbour is of its class.

    Latents are averaged over positions, the complete set's mean is subtracted, and neighbours are
    found by cosine among the images of up to 100 random classes, 5 times. Read second hand; that
    all images given of a class take part, and that the mean is that of all classes, is ours.

    Args:
      latents: [n, h, w, d]; labels: [n].
      classes: drawn per repeat. If there are no more, all of them are used, once.

    Raises:
      DataError: if only one image is drawn.
    """
    labels = np.asarray(labels)
    features = pooled(latents)
    features = features - features.mean(axis=0)
    present = np.unique(labels)
    if len(present) <= classes:
        draws = [present]
    else:
        rngs = [np.random.default_rng((seed, repeat)) for repeat in range(repeats)]
        draws = [rng.choice(present, classes, replace=False) for rng in rngs]
    shares = []
    for drawn in draws:
        kept = np.isin(labels, drawn)
        labels_drawn = labels[kept]
        shares.append(np.mean(labels_drawn[nearest(features[kept], 1)[:, 0]] == labels_drawn))
    return Repeats(float(np.mean(shares)), float(np.std(shares)), len(shares))
