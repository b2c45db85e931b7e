"""Diagnostics of a latent space: metrics of cached latents [n, h, w, d], without Inception.

They are the measures of two papers on what makes latents easy to diffuse: PAE (arXiv 2605.07915:
SSC, LPC, GSQ, eRank) and "Diffusing in the Right Space" (arXiv 2606.03578: LNC, SEC, VIV). Neither
paper's text was at hand: all definitions were READ SECOND HAND, and each docstring says which
choices are ours. Compare figures with each other, not with the papers' tables, until checked.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from gae_jax.evaluation.neighbours import BLOCK, TINY, pooled
from gae_jax.evaluation.noise import standard_noise
from gae_jax.runtime.errors import DataError

RHOS = (0.1, 0.5, 1.0, 2.0)  # of LPC


def spectral_rank(values: np.ndarray) -> float:
    """Return exp of the entropy of a spectrum normalised to sum 1 (Roy and Vetterli 2007).

    Between 1 (one value) and len(values) (all equal): how many directions count. Values below 0,
    which rounding leaves of zeros, count as 0.
    """
    share = np.maximum(np.asarray(values, np.float64), 0)
    share = share[share != 0] / max(share.sum(), TINY)  # a NaN stays
    return float(np.exp(-np.sum(share * np.log(share))))


def effective_rank(latents: np.ndarray) -> float:
    """Compute PAE's eRank in (0, 1]: `spectral_rank` of singular values of features [N, C], over C.

    Read second hand; that features are means over positions, and not centred, is ours where the
    source leaves it open. Not `health.effective_rank`, whose spectrum is that of the covariance
    (the squares of centred tokens' singular values) and which is not divided by C.

    Args:
      latents: [n, h, w, d].
    """
    features = pooled(latents)
    # singular values of R are those of the features, at the cost of d x d
    values = np.linalg.svd(np.linalg.qr(features, mode="r"), compute_uv=False)
    return spectral_rank(values) / features.shape[1]


def ssc(
    latents: np.ndarray, segments: np.ndarray, *, sigma: float = 0.1, seed: int = 0
) -> np.ndarray:
    """Compute PAE's SSC of each image, in [0, 1]: do clusters of its tokens follow its segments?

    Spectral clustering (normalised Laplacian, k-means) of the tokens with affinity
    exp(cosine / sigma) and a zero diagonal, into as many clusters as the image has segments;
    normalised mutual information with the segments, by geometric mean. Read second hand; sigma,
    the number of clusters and the 10 starts of k-means are ours.

    Args:
      latents: [n, h, w, d].
      segments: integers [n, h, w], a segment's number at each position; positions below 0 belong
        to none and are not compared.

    Returns:
      [n], NaN for images with fewer than two segments, which are to be left out of the mean.

    Raises:
      DataError: if the grids differ, or no image has two segments.
    """
    from sklearn.cluster import SpectralClustering  # takes a second
    from sklearn.metrics import normalized_mutual_info_score

    if segments.shape != latents.shape[:3]:
        raise DataError(
            f"segments {list(segments.shape)} are not on the grid of latents "
            f"{list(latents.shape)}; bring them to [n, h, w]"
        )
    scores = np.full(len(latents), np.nan)
    # the matrices are small: threads would only wait for each other
    with threadpool_limits(1):
        for index, (z, truth) in enumerate(zip(latents, segments, strict=True)):
            truth = truth.ravel()
            known = truth >= 0
            count = len(np.unique(truth[known]))
            if count < 2:
                continue
            tokens = _unit(z.reshape(-1, z.shape[-1]).astype(np.float64))
            affinity = np.exp(tokens @ tokens.T / sigma)
            np.fill_diagonal(affinity, 0)
            clusters = SpectralClustering(
                count, affinity="precomputed", n_init=10, random_state=seed
            ).fit_predict((affinity + affinity.T) / 2)
            scores[index] = normalized_mutual_info_score(
                truth[known], clusters[known], average_method="geometric"
            )
    if np.all(np.isnan(scores)):
        raise DataError(
            f"none of {len(latents)} images has two segments at its latents' grid; give images of "
            "scenes, or segments of a finer annotation"
        )
    return scores


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), TINY)


def perceptual_changes(
    latents: jax.Array,
    ids: jax.Array,
    *,
    decode: Callable[[jax.Array], jax.Array],
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    rhos: Sequence[float] = RHOS,
) -> jax.Array:
    """Compute the mean distance of decode(z +- eps u) to decode(z), [B, rhos].

    u is uniform on the unit sphere of all h * w * d numbers and the same for every radius
    eps = rho * |z|; it depends on ``key`` and the image's id alone. May be called under jit.
    z +- eps u is not brought back to the latents' norm. (One u per image, and both of these, are
    ours where the source is silent.)

    Args:
      latents: [B, h, w, d]; ids: uint32 [B].
      decode: latents -> images.
      distance: (images, images) -> [B], such as LPIPS; it clips images itself if it should.
    """
    noise = standard_noise(ids, key, latents.shape[1:])

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3), keepdims=True))

    step = noise / norm(noise) * norm(latents)
    clean = decode(latents)
    signed = jnp.asarray([sign * rho for rho in rhos for sign in (1, -1)], latents.dtype)
    distances = jax.lax.map(lambda by: distance(decode(latents + by * step), clean), signed)
    return distances.reshape(len(rhos), 2, -1).mean(axis=1).T


def lpc(changes: np.ndarray, rhos: Sequence[float] = RHOS) -> float:
    """Compute PAE's LPC, lower is better: `perceptual_changes` of a set [n, rhos] as one number.

    The mean over images of each radius, weighted by 1 / rho (weights sum to 1: 0.741, 0.148,
    0.074 and 0.037). Read second hand.
    """
    weights = 1 / np.asarray(rhos, np.float64)
    return float(np.asarray(changes, np.float64).mean(axis=0) @ (weights / weights.sum()))


def spectral_energy(latents: np.ndarray, *, rho: float = 0.5) -> float:
    """Compute SEC_rho of 2606.03578, in [0, 1]: share of high frequencies in the energy.

    Of the orthonormal 2-D DCT-II of every channel, the energy at frequencies (u, v) with
    u + v > rho * (h + w - 2), over all energy, the constant part with it. Read second hand; rho's
    default and the average (of images' shares, channels summed) are ours.

    Args:
      latents: [n, h, w, d].
    """
    _, h, w, _ = latents.shape
    high = np.add.outer(np.arange(h), np.arange(w)) > rho * (h + w - 2)
    parts = [
        jax.device_get(_high_share(latents[first : first + BLOCK], _dct(h), _dct(w), high))
        for first in range(0, len(latents), BLOCK)
    ]
    return float(np.concatenate(parts).mean(dtype=np.float64))


@jax.jit
def _high_share(latents, rows, columns, high):
    x = jnp.einsum(
        "uh,nhwd,vw->nuvd", rows, latents.astype(jnp.float32), columns, precision="highest"
    )
    energy = jnp.sum(jnp.square(x), axis=3)
    total = jnp.sum(energy, axis=(1, 2))
    return jnp.sum(energy * high, axis=(1, 2)) / jnp.maximum(total, TINY)


def _dct(size: int) -> np.ndarray:
    """Return the orthonormal DCT-II as a matrix [frequency, position], float32."""
    matrix = np.cos(np.pi * np.outer(np.arange(size), np.arange(size) + 0.5) / size)
    matrix *= np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def viv(latents: np.ndarray, labels: np.ndarray) -> float:
    """Compute VIV of 2606.03578: variance of the velocity that no model of a class can predict.

    On the path x_t = t z + (1 - t) eps with target z - eps, a direction in which a class is
    Gaussian with variance lambda leaves Var(z - eps | x_t) = lambda / (t^2 lambda + (1 - t)^2);
    its integral over t is (pi / 2) sqrt(lambda). VIV is the mean of that over directions, then
    over classes. Read second hand: (pi / 2) sqrt(lambda) and the Kronecker factors; how these are
    estimated is ours: A = E[Z Z^T] [h w, h w] over positions and B = E[Z^T Z] [d, d] over
    channels, centred per class, covariance A x B / tr(A), which is exact if a factorisation is.

    It grows with the latents' scale: give them normalised as the diffusion model sees them.

    Args:
      latents: [n, h, w, d]; labels: [n]. Classes with one image are left out.

    Raises:
      DataError: if no class has two images.
    """
    labels = np.asarray(labels)
    names, counts = np.unique(labels, return_counts=True)
    if not np.any(counts > 1):
        raise DataError(f"no class has two of the {len(labels)} images; VIV needs its covariance")
    values = []
    for name in names[counts > 1]:
        z = latents[labels == name].astype(np.float64)
        z = (z - z.mean(axis=0)) / np.sqrt(len(z) - 1)
        z = z.reshape(len(z), -1, z.shape[-1])
        wide = np.moveaxis(z, 1, 0).reshape(z.shape[1], -1)
        tall = z.reshape(-1, z.shape[-1])
        roots = [
            np.sqrt(np.maximum(np.linalg.eigvalsh(m), 0)).mean()
            for m in (wide @ wide.T, tall.T @ tall)
        ]
        scale = max(np.sqrt(np.square(z).sum()), TINY)
        values.append(np.pi / 2 * roots[0] * roots[1] / scale)
    return float(np.mean(values))


class Coherence(NamedTuple):
    """Mean cosines of an image's tokens."""

    near: float
    far: float

    @property
    def difference(self) -> float:
        return self.near - self.far


def spatial_coherence(latents: np.ndarray, *, near: int = 1, far: int | None = None) -> Coherence:
    """Compute mean cosines, in [-1, 1], of a token with near and with distant tokens.

    Ours, after LDS of iREPA (arXiv 2512.10794, read second hand), whose distances were not at
    hand; unlike `ssc` it needs no segments. Pairs of positions of one image count as near up to
    ``near`` steps along rows and columns (1: the four neighbours), as far from
    ``far`` steps on (default: half of h + w - 2, half of the longest way).

    Args:
      latents: [n, h, w, d].

    Raises:
      DataError: if the grid has no pairs of one of the two kinds.
    """
    _, h, w, _ = latents.shape
    at = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 2)
    steps = np.abs(at[:, None] - at).sum(-1)
    far = -(-(h + w - 2) // 2) if far is None else far
    masks = np.stack([(steps > 0) & (steps <= near), (steps > 0) & (steps >= far)])
    if not masks.any(axis=(1, 2)).all():
        raise DataError(
            f"latents of {h} x {w} positions have no pairs within {near} or beyond {far} steps; "
            "choose other distances"
        )
    masks = masks / masks.sum(axis=(1, 2), keepdims=True)
    parts = [
        jax.device_get(_mean_cosines(latents[first : first + BLOCK], masks.astype(np.float32)))
        for first in range(0, len(latents), BLOCK)
    ]
    return Coherence(*map(float, np.concatenate(parts).mean(axis=0, dtype=np.float64)))


@jax.jit
def _mean_cosines(latents, masks):
    tokens = latents.astype(jnp.float32).reshape(len(latents), -1, latents.shape[-1])
    norm = jnp.sqrt(jnp.sum(jnp.square(tokens), axis=-1, keepdims=True))
    tokens = tokens / jnp.maximum(norm, TINY)
    # sum over pairs of m_ts z_t . z_s, without the cosines of all pairs
    mixed = jnp.einsum("kts,nsd->nktd", masks, tokens, precision="highest")
    return jnp.einsum("nktd,ntd->nk", mixed, tokens, precision="highest")
