"""Counts, means and sums of squares of sets of rows; sets add up without losing digits."""

import numpy as np


def merge_moments(count, mean, m2, other_count, other_mean, other_m2) -> tuple:
    """Return (count, mean, m2) of two sets together (Chan, Golub and LeVeque 1979), in float64.

    Args:
      count, other_count: numbers of rows, not both 0.
      mean, other_mean: of the rows, in any shape.
      m2, other_m2: sums of (x - mean)^2 in the shape of the mean, or of (x - mean)(x - mean)^T,
        [d, d], for means [d].
    """
    total = count + other_count
    delta = np.asarray(other_mean) - mean
    square = np.square(delta) if np.shape(m2) == np.shape(mean) else np.outer(delta, delta)
    return (
        total,
        mean + delta * other_count / total,
        m2 + other_m2 + square * count * other_count / total,
    )
