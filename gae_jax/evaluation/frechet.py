"""The Frechet distance between two sets of features."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of feature sets [n, d] and [m, d].

    In float64. The trace of the root is the nuclear norm of A B^T for centred features
    A / sqrt(n - 1) and B / sqrt(m - 1): no square root of a matrix, and exact for few samples.
    When that product is larger than d x d, the equal form with eigenvalues is used.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a = (a - mean_a) / np.sqrt(len(a) - 1)
    b = (b - mean_b) / np.sqrt(len(b) - 1)
    if min(len(a), len(b)) <= a.shape[1]:
        root = np.linalg.norm(a @ b.T, ord="nuc")
    else:
        values, vectors = np.linalg.eigh(a.T @ a)
        half = vectors * np.sqrt(np.maximum(values, 0))
        inner = half.T @ (b.T @ b) @ half
        root = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    return float(np.square(mean_a - mean_b).sum() + (a**2).sum() + (b**2).sum() - 2 * root)
