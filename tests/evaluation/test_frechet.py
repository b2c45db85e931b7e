"""The Frechet distance against closed forms, scipy's root of a matrix, and torch-fidelity."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.linalg import sqrtm

from gae_jax.evaluation.frechet import Reference, frechet, frechet_distance
from gae_jax.evaluation.statistics import Moments
from gae_jax.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "scores.safetensors"


def features(count, dimensions, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    return rng.normal(size=(count, dimensions)) @ mix + shift


def by_root(a, b, form="sqrtm"):
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    if form == "sqrtm":
        root = np.trace(sqrtm(cov_a @ cov_b)).real
    else:
        root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return mean, np.trace(cov_a) + np.trace(cov_b) - 2 * root


@pytest.mark.parametrize("form", ["sqrtm", "eigvals"])
def test_full_rank_is_scipys(form):
    a, b = features(400, 96, 0), features(300, 96, 1, 0.3)
    got = frechet(Moments.of(a), Moments.of(b))
    mean, covariance = by_root(a, b, form)
    assert abs(got.mean_part - mean) < 1e-9
    assert abs(got.covariance_part - covariance) < 1e-6
    assert got.total == got.mean_part + got.covariance_part
    np.testing.assert_allclose(frechet_distance(a, b), got.total, rtol=1e-12)


def test_full_rank_is_torch_fidelitys():
    golden = load_file(GOLDEN)
    a, b = (golden[name].astype(np.float64) / 256 for name in ("generated", "reference"))
    assert abs(frechet(a, Reference(b)).total - golden["fid"].item()) < 1e-6


def test_few_samples_are_exact():
    """In every form that a set may have; scipy's root carries sqrt(round-off) per direction."""
    a, b = features(60, 200, 2), features(80, 200, 3, 0.1)
    mean, covariance = by_root(a, b)
    exact = frechet(a, b)
    assert abs(exact.mean_part - mean) < 1e-9
    assert abs(exact.covariance_part - covariance) < 1e-4
    stored = Reference.of_statistics(b.mean(0), np.cov(b.T), count=len(b))
    for left in (a, Moments.of(a)):
        for right in (b, Moments.of(b), stored):
            assert abs(frechet(left, right).total - exact.total) < 1e-9
    assert abs(frechet(a, Reference.of_statistics(b.mean(0), np.cov(b.T))).total - exact.total) < (
        1e-4
    )


def test_few_samples_at_the_size_of_features():
    """300 samples of 1024 dimensions, against the nuclear norm of the samples' product."""
    a, b = features(300, 1024, 4), features(300, 1024, 5)
    parts = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    root = np.linalg.svd(parts[0] @ parts[1].T, compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + sum((p**2).sum() for p in parts) - 2 * root
    assert abs(frechet(a, b).total - expected) < 1e-9
    assert abs(frechet(Moments.of(a), Moments.of(b)).total - expected) < 1e-4


def test_few_against_many():
    a, b = features(30, 50, 6), features(500, 50, 7)
    expected = sum(by_root(a, b))
    for got in (frechet(a, b), frechet(b, a), frechet(Moments.of(b), a), frechet(Moments.of(a), b)):
        assert abs(got.total - expected) < 1e-4
        assert abs(got.total - frechet(a, b).total) < 1e-8


def test_known_gaussians():
    rng = np.random.default_rng(8)
    mean_a, mean_b = rng.normal(size=(2, 40))
    std_a, std_b = rng.uniform(0.5, 2, (2, 40))
    got = frechet(
        Reference.of_statistics(mean_a, np.diag(std_a**2)),
        Reference.of_statistics(mean_b, np.diag(std_b**2)),
    )
    assert abs(got.mean_part - np.square(mean_a - mean_b).sum()) < 1e-8
    assert abs(got.covariance_part - np.square(std_a - std_b).sum()) < 1e-8
    # the same in a rotated frame
    turn = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    turned = frechet(
        Reference.of_statistics(turn @ mean_a, turn * std_a**2 @ turn.T),
        Reference.of_statistics(turn @ mean_b, turn * std_b**2 @ turn.T),
    )
    assert abs(turned.total - got.total) < 1e-8


def test_equal_sets_symmetry_and_shift():
    a, b = Moments.of(features(500, 64, 9)), Moments.of(features(500, 64, 10))
    assert abs(frechet(a, a).total) < 1e-8
    assert abs(frechet(a, b).total - frechet(b, a).total) < 1e-8
    moved = Moments(a.count, a.mean + 0.5, a.m2)
    assert abs(frechet(moved, a).mean_part - 64 * 0.25) < 1e-8
    # the total is the sum of the parts, below zero or not
    for x in (a, b):
        assert frechet(x, x).total == sum(frechet(x, x)[1:])


def test_the_factor_is_computed_once(monkeypatch):
    calls = []
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda x: calls.append(1) or eigh(x))
    reference = Reference(features(100, 20, 11))
    for seed in range(3):
        frechet(features(50, 20, seed), reference)
    assert len(calls) == 1


def test_wrong_sets_are_refused():
    good = features(30, 8, 12)
    bad = good.copy()
    bad[17, 3] = np.nan
    with pytest.raises(UserError, match="row 17 has a NaN"):
        frechet(bad, good)
    with pytest.raises(UserError, match="of 8 and 7 dimensions; take both from the same layer"):
        frechet(good, good[:, :7])
    with pytest.raises(UserError, match="a covariance of 1 rows; it needs at least 2"):
        frechet(good, good[:1])
    with pytest.raises(UserError, match=r"flatten each row to \[n, d\]"):
        frechet(good[:, :, None], good)
    mean, covariance = good.mean(0), np.cov(good.T)
    with pytest.raises(UserError, match=r"must be \[d\] and \[d, d\]"):
        Reference.of_statistics(mean, covariance[:7])
    with pytest.raises(UserError, match="the covariance is all zeros"):
        Reference.of_statistics(np.zeros(2), np.zeros((2, 2)))
    with pytest.raises(UserError, match="statistics: a NaN"):
        Reference.of_statistics(mean * np.inf, covariance)
    with pytest.raises(UserError, match="is not symmetric"):
        Reference.of_statistics(mean, np.triu(covariance))
    with pytest.raises(UserError, match="which no set of samples gives"):
        frechet(good, Reference.of_statistics(mean, -covariance))
