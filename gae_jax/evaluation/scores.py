"""Scores of generated sets from features: Inception Score, precision and recall, KID."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.evaluation.statistics import check_features
from gae_jax.runtime.errors import UserError

DISTANCES = ("f32", "f16_adm")
BLOCK = 10_000  # rows; ADM's, whose float16 mode falls back to float32 block by block
ORDER_LOSS = 0.1  # nats of a split score that the order of classes may cost; ours


class InceptionScore(NamedTuple):
    """Mean and std (with N) over the splits, and the score of each."""

    mean: float
    std: float
    splits: tuple[float, ...]


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class KID(NamedTuple):
    """Mean and std (with N) over the subsets."""

    mean: float
    std: float


def inception_score(
    logits: np.ndarray, form: str = "adm", *, split: int = 5000, splits: int = 10, seed: int = 2020
) -> InceptionScore:
    """Compute exp(mean over images of KL(p(y|x) || p(y))), in float64 (Salimans et al. 2016).

    Args:
      logits: [n, classes] in the order of the files; ADM and torch-fidelity both take those
        without the bias, ``logits_unbiased``, of all 1008 classes.
      form: "adm": consecutive splits of ``split`` rows without a shuffle, so that the order counts
        (see `check_order`); "torch_fidelity": ``splits`` equal parts of the rows permuted by
        RandomState(seed); "one_split": all rows at once, whatever their order.

    Raises:
      UserError: for an unknown form, rows that do not fill the splits, or other than finite values.
    """
    logits = check_features(logits, "logits")
    count = len(logits)
    edges: Sequence[int]
    if form == "adm":
        if split < 1 or count < split or count % split:
            raise UserError(
                f"Inception Score of {count} rows in splits of {split}: give a multiple of it (a "
                "smaller last split would score lower), another `split`, or form 'one_split'"
            )
        edges = range(0, count + 1, split)
    elif form == "torch_fidelity":
        if not 1 <= splits <= count:
            raise UserError(
                f"Inception Score of {count} rows in {splits} splits; give more rows or fewer "
                "`splits`"
            )
        logits = logits[np.random.RandomState(seed).permutation(count)]
        edges = [i * count // splits for i in range(splits + 1)]
    elif form == "one_split":
        if not count:
            raise UserError("Inception Score of 0 rows; give at least one")
        edges = (0, count)
    else:
        raise UserError(
            f"no form {form!r} of the Inception Score; there are 'adm', 'torch_fidelity' and "
            "'one_split'"
        )
    scores = [_split_score(logits[first:last]) for first, last in pairwise(edges)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), tuple(scores))


def _split_score(logits):
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    # a class that no row can have adds 0 x log 0 = 0 to every row
    log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
    return float(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))


def check_order(labels: np.ndarray, split: int = 5000) -> None:
    """Raise for an order of classes that would lower the Inception Score of consecutive splits.

    Such a score falls by up to exp(I), I the mutual information of a row's class and its split: of
    class-sorted sets of 50,000 to a tenth and less of its value. I is compared with that of the
    same labels in a random order.

    Args:
      labels: [n] integers, in the order of the images.
      split: rows of a split.

    Raises:
      UserError: if I is larger by more than `ORDER_LOSS`.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or split < 1:
        raise UserError(
            f"labels {list(labels.shape)} in splits of {split}; give one label for each image and "
            "a split of at least 1"
        )
    classes, of_row = np.unique(labels, return_inverse=True)
    count, part = len(labels), np.arange(len(labels)) // split

    def information(of_row):
        cells = part * len(classes) + of_row
        joint = np.bincount(cells, minlength=(part[-1] + 1) * len(classes)) / count
        joint = joint.reshape(-1, len(classes))
        alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
        seen = joint > 0
        return (joint[seen] * np.log(joint[seen] / alone[seen])).sum()

    loss = information(of_row) - information(np.random.RandomState(0).permutation(of_row))
    if loss > ORDER_LOSS:
        first = len(np.unique(of_row[:split]))
        raise UserError(
            f"the labels are sorted by class: the first {min(split, count)} of {count} images have "
            f"{first} of {len(classes)} classes. An Inception Score in splits of {split} would be "
            f"too low by a factor of up to {np.exp(loss):.1f}. Permute the images together with "
            "their labels (before they are sampled or written), or use the one-split score"
        )


def precision_recall(
    reference: np.ndarray,
    generated: np.ndarray,
    *,
    k: int = 3,
    distance: str = "f32",
    block: int = BLOCK,
) -> PrecisionRecall:
    """Compute improved precision and recall (Kynkaanniemi et al. 2019) as ADM's evaluator.

    The radius of a point is the squared distance to its k-th neighbour in its own set (the
    (k + 1)-th smallest with its own 0). Precision is the share of generated points within the
    radius (<=) of some reference point, recall the reverse. The sizes of the two sets matter: ADM's
    are 10,000 and 50,000.

    On the device, a block of distances at a time: up to three of its size (1.2 GB for 10,000 rows)
    besides the features.

    Args:
      reference, generated: features [n, d] and [m, d].
      distance: "f32", or "f16_adm": features, norms and matmuls rounded to float16 as in ADM's
        evaluator, and a block in float32 where something overflows. Its tables have the latter.
        Sums are float32 in both, rounded once (ours: ADM leaves them to TensorFlow).
      block: rows and columns of a block.

    Raises:
      UserError: for other than finite values, different dimensions, fewer than k + 1 rows.
    """
    reference, generated = _pair(reference, generated)
    least = min(len(reference), len(generated))
    if k < 1 or least < k + 1 or block < 1:
        raise UserError(
            f"precision and recall with k = {k} in blocks of {block}, and {least} rows in the "
            "smaller set; each set needs at least k + 1, k and block at least 1"
        )
    if distance not in DISTANCES:
        raise UserError(f"no distance {distance!r}; there are {', '.join(DISTANCES)}")
    if distance == "f32":  # nearer to 0 less of the norms cancels; distances stay the same
        centre = reference.mean(axis=0, dtype=np.float64)
        reference, generated = reference - centre, generated - centre
    sets = [_blocks(x.astype(np.float32), block) for x in (reference, generated)]
    radii = [_radii(blocks, k, distance) for blocks in sets]
    inside = [[False] * len(blocks) for blocks in sets]
    for i, (row, row_radii) in enumerate(zip(sets[0], radii[0], strict=True)):
        for j, (column, column_radii) in enumerate(zip(sets[1], radii[1], strict=True)):
            rows, columns = _covered(row[0], column[0], row_radii, column_radii, distance)
            inside[0][i] |= rows
            inside[1][j] |= columns
    recall, precision = (
        float(np.concatenate(jax.device_get(covered))[: len(x)].mean())
        for covered, x in zip(inside, (reference, generated), strict=True)
    )
    return PrecisionRecall(precision, recall)


def _blocks(x, size):
    """Split into [(rows [b, d], valid [b])] on the device, all of one shape, padded with zeros."""
    size = min(size, len(x))
    valid = np.arange(-(-len(x) // size) * size) < len(x)
    x = np.pad(x, ((0, len(valid) - len(x)), (0, 0)))
    return [
        (jnp.asarray(x[first : first + size]), jnp.asarray(valid[first : first + size]))
        for first in range(0, len(x), size)
    ]


def _radii(blocks, k, distance):
    radii = []
    for rows, valid in blocks:
        nearest = jnp.full((len(rows), k + 1), jnp.inf)
        for columns, real in blocks:
            nearest = _nearest(nearest, rows, columns, real, distance)
        radii.append(jnp.where(valid, nearest[:, k], -1))  # padding covers nothing
    return radii


# XLA would keep float32 where float16 is rounded to and widened again.
_jit = partial(
    jax.jit,
    static_argnames="distance",
    compiler_options={"xla_allow_excess_precision": False},
)


@_jit
def _nearest(nearest, rows, columns, real, distance):
    """Merge the smallest distances so far with those to more columns, ascending."""
    far = jnp.where(real, _squared(rows, columns, distance), jnp.inf)
    both = jnp.concatenate([nearest, far], axis=1)
    return -jax.lax.top_k(-both, nearest.shape[1])[0]


@_jit
def _covered(rows, columns, row_radii, column_radii, distance):
    """Return which rows lie in some column's ball, and which columns in some row's."""
    far = _squared(rows, columns, distance)
    return jnp.any(far <= column_radii, axis=1), jnp.any(far <= row_radii[:, None], axis=0)


def _squared(u, v, distance):
    """Compute max(|u|^2 - 2 u v + |v|^2, 0), [b, c] float32."""

    def form(u, v, dtype):
        u, v = u.astype(dtype), v.astype(dtype)
        # products of float16 are exact in float32; all sums are float32
        norm_u, norm_v = (
            jnp.sum((x * x).astype(jnp.float32), axis=1).astype(dtype) for x in (u, v)
        )
        product = jnp.matmul(
            u.astype(jnp.float32), v.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
        ).astype(dtype)
        return jnp.maximum(norm_u[:, None] - 2 * product + norm_v, 0).astype(jnp.float32)

    if distance == "f32":
        return form(u, v, jnp.float32)
    half = form(u, v, jnp.float16)
    return jax.lax.cond(jnp.all(jnp.isfinite(half)), lambda: half, lambda: form(u, v, jnp.float32))


def kid(
    reference: np.ndarray,
    generated: np.ndarray,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> KID:
    """Compute KID: unbiased MMD^2 of (x y / d + 1)^3 (Binkowski et al. 2018).

    Over random subsets, drawn as torch-fidelity draws them (the generated first); in float64. It
    may be below zero.

    Raises:
      UserError: for other than finite values, different dimensions, fewer rows than a subset.
    """
    reference, generated = _pair(reference, generated)
    least = min(len(reference), len(generated))
    if subsets < 1 or not 2 <= size <= least:
        raise UserError(
            f"KID in {subsets} subsets of {size}, and {least} rows in the smaller set; give more "
            "rows, or a `size` from 2 to that (stds of different sizes are not comparable)"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            s[rng.choice(len(s), size, replace=False)].astype(np.float64)
            for s in (generated, reference)
        )
        of_x, of_y, of_both = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (of_x, of_y))
        values.append(within / (size * (size - 1)) - 2 * of_both.mean())
    return KID(float(np.mean(values)), float(np.std(values)))


def _pair(reference, generated):
    reference = check_features(reference, "reference")
    generated = check_features(generated, "generated")
    if reference.shape[1] != generated.shape[1]:
        raise UserError(
            f"features of {reference.shape[1]} (reference) and {generated.shape[1]} (generated) "
            "dimensions; take both from the same layer of the same extractor"
        )
    return reference, generated
