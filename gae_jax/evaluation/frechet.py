"""The Frechet distance between two sets of features: FID, rFID, sFID and FD-DINO."""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from gae_jax.evaluation.statistics import Moments, check_features
from gae_jax.runtime.errors import UserError

SYMMETRY = 1e-5  # of a stored covariance, relative to its largest number; ours
NEGATIVE = 1e-5  # eigenvalues below zero by more than this share of the largest; ours


class FrechetDistance(NamedTuple):
    """|mu_a - mu_b|^2, tr(S_a + S_b - 2 (S_a S_b)^(1/2)), and their sum.

    The sum may be below zero by round-off for sets that are equal; it is not clamped.
    """

    total: float
    mean_part: float
    covariance_part: float


class Reference:
    """One set, prepared once for any number of distances to it.

    Args:
      data: features [n, d] or `Moments`. Features of no more rows than dimensions are kept, which
        makes distances between few samples exact.

    Raises:
      UserError: for fewer than two rows, or what is not finite.
    """

    def __init__(self, data: "np.ndarray | Moments"):
        if not isinstance(data, Moments):
            data = check_features(data)
            few = 2 <= len(data) <= data.shape[1]
            if not few:
                data = Moments.of(data)
        if isinstance(data, Moments):
            self._set(data.mean, data.covariance, data.count)
        else:
            self.mean = data.mean(axis=0, dtype=np.float64)
            self._samples = (data - self.mean) / np.sqrt(len(data) - 1)
            self.trace = float(np.square(self._samples).sum())
            self.rank = len(data) - 1

    @classmethod
    def of_statistics(
        cls, mean: np.ndarray, covariance: np.ndarray, *, count: int | None = None
    ) -> "Reference":
        """Make a reference of stored statistics.

        Args:
          mean: [d].
          covariance: [d, d], with N - 1.
          count: N, where it is known: with N <= d, the directions in which N samples cannot vary
            are then left out of the root, where round-off would count as sqrt(round-off).
        """
        if np.size(covariance) and not np.any(covariance):
            raise UserError("statistics: the covariance is all zeros; compute them again")
        self = cls.__new__(cls)
        self._set(np.asarray(mean, np.float64), np.asarray(covariance, np.float64), count)
        return self

    def _set(self, mean, covariance, count):
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise UserError(
                f"statistics: mean {list(mean.shape)} and covariance {list(covariance.shape)}; "
                "they must be [d] and [d, d]"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError("statistics: a NaN or an infinity; compute them again")
        skew = np.abs(covariance - covariance.T).max(initial=0)
        if skew > SYMMETRY * np.abs(covariance).max(initial=0):
            raise UserError(
                f"statistics: the covariance is not symmetric (by {skew:.2g}); the file is damaged "
                "or holds another matrix"
            )
        self._samples = None
        self.mean, self.covariance = mean, (covariance + covariance.T) / 2
        self.trace = float(np.trace(covariance))
        self.rank = mean.size if count is None else min(count - 1, mean.size)

    @cached_property
    def factor(self) -> np.ndarray:
        """F [d, r] with F F^T the covariance; one eigendecomposition unless samples are few."""
        if self._samples is not None:
            return self._samples.T
        values, vectors = np.linalg.eigh(self.covariance)
        if values[0] < -NEGATIVE * max(values[-1], 0):
            raise UserError(
                f"statistics: the covariance has the eigenvalue {values[0]:.3g} (largest "
                f"{values[-1]:.3g}), which no set of samples gives; compute it again, in float64"
            )
        keep = slice(len(values) - self.rank, None)  # ascending
        return vectors[:, keep] * np.sqrt(np.maximum(values[keep], 0))

    def root_trace(self, other: "Reference") -> float:
        """Compute tr (S S_other)^(1/2), with the factor of the other.

        With factors A and B it is the nuclear norm of A^T B; for moments the roots of the
        eigenvalues of B^T S B, which are the squares of its singular values.
        """
        if self._samples is not None:
            return float(np.linalg.norm(self._samples @ other.factor, ord="nuc"))
        inner = other.factor.T @ self.covariance @ other.factor
        values = np.linalg.eigvalsh((inner + inner.T) / 2)
        values = values[len(values) - min(self.rank, other.rank) :]
        return float(np.sqrt(np.maximum(values, 0)).sum())  # below zero: round-off


def frechet(
    a: "np.ndarray | Moments | Reference", b: "np.ndarray | Moments | Reference"
) -> FrechetDistance:
    """Compute |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    Without a square root of a matrix and without a term on the diagonal (Heusel et al. 2017 and
    ADM take scipy's root and add 1e-6 where that fails; they agree at full rank).

    Args:
      a, b: features [n, d], `Moments`, or a `Reference` that keeps its factor. The one that many
        sets are compared with is ``b``.

    Raises:
      UserError: for other than finite values, fewer than two rows, different dimensions.
    """
    a, b = (x if isinstance(x, Reference) else Reference(x) for x in (a, b))
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"Frechet distance of features of {a.mean.size} and {b.mean.size} dimensions; take "
            "both from the same layer of the same extractor"
        )
    mean_part = float(np.square(a.mean - b.mean).sum())
    covariance_part = a.trace + b.trace - 2 * a.root_trace(b)
    return FrechetDistance(mean_part + covariance_part, mean_part, covariance_part)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the total of `frechet` of feature sets [n, d] and [m, d]."""
    return frechet(a, b).total
