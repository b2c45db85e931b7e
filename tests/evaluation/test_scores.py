"""Scores of generated sets against torch-fidelity, numpy rewrites and closed forms."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gae_jax.evaluation import scores
from gae_jax.evaluation.scores import check_order, inception_score, kid, precision_recall
from gae_jax.runtime.errors import UserError

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "scores.safetensors")
REFERENCE, GENERATED, LOGITS = (
    GOLDEN[name].astype(np.float32) / 256 for name in ("reference", "generated", "logits")
)


def sorted_logits(count=1000, classes=50, margin=6.0, seed=0):
    """(logits, labels) of a classifier that is right, of images in the order of their classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), count // classes)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += margin
    return logits.astype(np.float32), labels


def adm_score(logits, split):
    """ADM's evaluator in numpy: a softmax, then logarithms of probabilities."""
    e = np.exp(logits.astype(np.float64))
    p = e / e.sum(axis=1, keepdims=True)
    found = []
    for first in range(0, len(p), split):
        part = p[first : first + split]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        found.append(np.exp(kl.sum(axis=1).mean()))
    return np.mean(found)


def test_shuffled_inception_score_is_torch_fidelitys():
    got = inception_score(LOGITS, "torch_fidelity")
    np.testing.assert_allclose(got[:2], GOLDEN["isc"], rtol=1e-10)
    assert len(got.splits) == 10
    assert got.mean != inception_score(LOGITS, "torch_fidelity", seed=1).mean


def test_adms_inception_score_goes_by_the_order():
    logits, labels = sorted_logits()
    shuffle = np.random.default_rng(1).permutation(len(logits))
    ordered = inception_score(logits, split=100)
    shuffled = inception_score(logits[shuffle], split=100)
    for got, x in ((ordered, logits), (shuffled, logits[shuffle])):
        np.testing.assert_allclose(got.mean, adm_score(x, 100), rtol=1e-5)
        assert len(got.splits) == 10
    assert ordered.mean < 0.4 * shuffled.mean
    whole = inception_score(logits, "one_split")
    np.testing.assert_allclose(whole.mean, adm_score(logits, len(logits)), rtol=1e-5)
    np.testing.assert_allclose(whole.mean, inception_score(logits[shuffle], "one_split").mean)
    with pytest.raises(UserError, match="sorted by class: the first 100 of 1000 images have 5 of"):
        check_order(labels, 100)
    check_order(labels[shuffle], 100)


def test_inception_score_of_the_sure_and_the_unsure():
    """Probabilities that underflow count as 0 log 0 = 0, where ADM's own formula has a NaN."""
    certain = 1e4 * np.eye(8, dtype=np.float32).repeat(5, axis=0)
    np.testing.assert_allclose(inception_score(certain, "one_split").mean, 8, rtol=1e-12)
    np.testing.assert_allclose(inception_score(certain[:, ::-1], split=40).mean, 8, rtol=1e-12)
    one = np.concatenate([certain, np.full((40, 1), -1e4, np.float32)], axis=1)
    np.testing.assert_allclose(inception_score(one, "one_split").mean, 8, rtol=1e-12)
    assert inception_score(np.ones((40, 8)), "one_split").mean == pytest.approx(1, abs=1e-12)


def test_inception_score_refuses_splits_that_are_not_full():
    for arguments, message in (
        (dict(), "503 rows in splits of 5000: give a multiple"),
        (dict(split=100), "503 rows in splits of 100: give a multiple"),
        (dict(form="torch_fidelity", splits=504), "503 rows in 504 splits"),
        (dict(form="torch"), "no form 'torch' of the Inception Score"),
    ):
        with pytest.raises(UserError, match=message):
            inception_score(LOGITS, **arguments)
    with pytest.raises(UserError, match="logits: row 2 has a NaN"):
        inception_score(np.where(np.arange(503)[:, None] == 2, np.nan, LOGITS), "one_split")
    with pytest.raises(UserError, match="of 0 rows"):
        inception_score(LOGITS[:0], "one_split")


def test_order_of_labels():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(1000), 50)
    with pytest.raises(UserError, match=r"5000 of 50000 images have 100 of 1000.*factor of up to"):
        check_order(classes)
    check_order(classes, 50_000)  # one split has no order
    check_order(np.tile(np.arange(1000), 50))
    check_order(rng.permutation(classes))
    check_order(rng.integers(0, 1000, 50_000))
    check_order(rng.permutation(classes)[:12_345])
    check_order(rng.integers(0, 1000, 2000), 1000)  # fewer images than pairs of class and split
    # each of eight processes sorted its own part, of random classes
    check_order(np.sort(rng.permutation(classes).reshape(8, -1), axis=1).ravel(), 6250)
    with pytest.raises(UserError, match="Permute the images together with their labels"):
        check_order(np.sort(rng.permutation(classes).reshape(2, -1), axis=1).ravel())
    with pytest.raises(UserError, match="one label for each image"):
        check_order(classes[:, None])


def rewrite(reference, generated, dtype, k=3):
    """ADM's evaluator in numpy, in one block; (precision, recall) as counts."""

    def distances(u, v):
        u, v = u.astype(dtype), v.astype(dtype)
        wide = np.float32 if dtype == np.float16 else dtype
        norm_u, norm_v = (np.square(x).astype(wide).sum(1).astype(dtype) for x in (u, v))
        product = (u.astype(wide) @ v.astype(wide).T).astype(dtype)
        return np.maximum(norm_u[:, None] - dtype(2) * product + norm_v, dtype(0))

    radius = [np.sort(distances(x, x), axis=1)[:, k] for x in (reference, generated)]
    between = distances(reference, generated)
    precision = (between <= radius[0][:, None]).any(axis=0)
    recall = (between <= radius[1]).any(axis=1)
    return int(precision.sum()), int(recall.sum())


def counts(got):
    return round(got.precision * len(GENERATED)), round(got.recall * len(REFERENCE))


@pytest.mark.parametrize("block", [7, 100, scores.BLOCK])
def test_precision_and_recall_are_torch_fidelitys(block):
    got = precision_recall(REFERENCE, GENERATED, block=block)
    np.testing.assert_allclose(got, GOLDEN["precision_recall"], atol=1e-6)
    assert counts(got) == rewrite(REFERENCE, GENERATED, np.float64)


@pytest.mark.parametrize("k", [1, 5])
def test_precision_and_recall_of_other_neighbourhoods(k):
    got = precision_recall(REFERENCE, GENERATED, k=k)
    assert counts(got) == rewrite(REFERENCE, GENERATED, np.float64, k)


@pytest.mark.parametrize("block", [100, scores.BLOCK])
@pytest.mark.parametrize("scale", [1, 0.02])
def test_adms_float16_precision_and_recall(block, scale):
    """The smaller features have squares that are subnormal in float16."""
    reference, generated = scale * REFERENCE, scale * GENERATED
    got = counts(precision_recall(reference, generated, distance="f16_adm", block=block))
    want = rewrite(reference, generated, np.float16)
    assert np.abs(np.subtract(got, want)).max() <= 2
    # the rounding is there: it moves points in or out of balls
    far = reference + 4 * scale, generated + 4 * scale
    got = counts(precision_recall(*far, distance="f16_adm", block=block))
    assert np.abs(np.subtract(got, rewrite(*far, np.float16))).max() <= 2
    assert got != counts(precision_recall(*far))


def test_float16_falls_back_where_it_overflows():
    large = 100 * REFERENCE, 100 * GENERATED
    half = precision_recall(*large, distance="f16_adm")
    assert counts(half) == rewrite(*large, np.float32)


def test_precision_and_recall_far_from_zero():
    """Distances do not change with a shift, where norms would cancel in float32."""
    shifted = precision_recall(REFERENCE + 1000, GENERATED + 1000)
    assert counts(shifted) == rewrite(REFERENCE, GENERATED, np.float64)


def test_precision_and_recall_tell_sides_apart():
    rng = np.random.default_rng(2)
    wide, narrow = rng.normal(size=(300, 4)), 0.05 * rng.normal(size=(200, 4))
    got = precision_recall(wide, narrow)
    assert got.precision == 1
    assert got.recall < 0.1
    assert precision_recall(narrow, wide) == (got.recall, got.precision)
    assert precision_recall(wide, wide) == (1, 1)
    assert precision_recall(wide, wide + 100) == (0, 0)


def test_a_point_on_the_edge_of_a_ball_is_inside():
    """The fourth smallest distance with the point's own: to 3, thus a radius of 9 around 0."""
    line = np.arange(4.0)[:, None]
    assert precision_recall(line, np.array([[-3.0], [-3.5], [6.5], [6.0]])).precision == 0.5


def test_kid_is_torch_fidelitys():
    got = kid(REFERENCE, GENERATED, subsets=20, size=100)
    np.testing.assert_allclose(got, GOLDEN["kid"], rtol=1e-5)


def test_kid_is_unbiased():
    """Of all rows, against the sums written out; of one distribution, around zero."""
    x, y = np.random.default_rng(3).normal(size=(2, 30, 5))
    want = 0.0
    for i in range(30):
        for j in range(30):
            if i != j:
                want += ((x[i] @ x[j] / 5 + 1) ** 3 + (y[i] @ y[j] / 5 + 1) ** 3) / (30 * 29)
            want -= 2 * (x[i] @ y[j] / 5 + 1) ** 3 / 900
    np.testing.assert_allclose(kid(x, y, subsets=1, size=30).mean, want, rtol=1e-12)
    x, y = np.random.default_rng(4).normal(size=(2, 4000, 5))
    found = kid(x, y, size=100)
    assert abs(found.mean) < 0.3 * found.std


def unit(count, seed, shift=0.0, dimensions=48):
    x = np.random.default_rng(seed).normal(size=(count, dimensions)) + shift
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_wrong_sets_are_refused():
    bad = REFERENCE.copy()
    bad[4, 1] = np.inf
    for score in (precision_recall, kid):
        with pytest.raises(UserError, match="reference: row 4 has a NaN or an infinity"):
            score(bad, GENERATED)
        with pytest.raises(UserError, match=r"64 \(reference\) and 63 \(generated\) dimensions"):
            score(REFERENCE, GENERATED[:, 1:])
    with pytest.raises(UserError, match="k = 3 in blocks of 10000, and 3 rows in the smaller set"):
        precision_recall(REFERENCE[:3], GENERATED)
    with pytest.raises(UserError, match="no distance 'f16'; there are f32, f16_adm"):
        precision_recall(REFERENCE, GENERATED, distance="f16")
    with pytest.raises(UserError, match="100 subsets of 1000, and 400 rows in the smaller set"):
        kid(REFERENCE, GENERATED)
