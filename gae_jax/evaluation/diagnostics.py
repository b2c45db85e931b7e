"""Figures and pictures of a tokenizer's held-out latents."""

import logging

import numpy as np
from einops import rearrange

from gae_jax.data.latent_shards import varying
from gae_jax.evaluation import latent, neighbours
from gae_jax.runtime.errors import DataError


def diagnostics(latents: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measure held-out latents [n, h, w, d] with labels [n]; definitions are in `latent`."""
    figures = {
        "std": latents.std(dtype=np.float64),
        "effective_rank": latent.effective_rank(latents),
        "spectral_energy": latent.spectral_energy(latents),
    }
    try:
        coherence = latent.spatial_coherence(latents)
        figures |= {"coherence_near": coherence.near, "coherence_far": coherence.far}
    except DataError as error:
        logging.info("evaluate: no coherence: %s", error)
    several, fellows = len(np.unique(labels)) > 1, np.bincount(labels).max() > 1
    if several and fellows:
        gsq = neighbours.gsq(latents, labels)
        figures["gsq"] = gsq.mean
        if gsq.repeats > 1:
            figures["gsq_std"] = gsq.std
    else:
        lacks = "no class has two of the images" if several else "the images are of one class"
        logging.info("evaluate: no GSQ and no class neighbourhood: %s", lacks)
    if several and fellows and len(labels) > 10:
        figures["class_neighbourhood"] = neighbours.class_neighbourhood(latents, labels)
    if fellows:
        mean, std = latents.mean(axis=(0, 1, 2)), latents.std(axis=(0, 1, 2))
        std = np.where(varying(mean, std), std, 1)  # constant channels stay 0
        figures["viv"] = latent.viv((latents - mean) / std, labels)
    return {name: float(value) for name, value in figures.items()}


def latent_colours(latents: np.ndarray) -> np.ndarray:
    """Show latents [n, h, w, d] as colours [n, h, w, 3], uint8: three principal components.

    One channel gives grey, two give red and green.
    """
    from sklearn.decomposition import PCA  # takes a second

    tokens = rearrange(latents, "n h w d -> (n h w) d")
    n, h, w, channels = latents.shape
    with np.errstate(invalid="ignore"):  # shares of a variance of 0
        parts = PCA(min(*tokens.shape, 3), random_state=0).fit_transform(tokens)
    # fewer tokens than channels have fewer components: the others are 0
    parts = np.pad(parts, ((0, 0), (0, min(channels, 3) - parts.shape[1])))
    low, high = np.percentile(parts, [1, 99], axis=0)
    span = np.maximum(high - low, np.finfo(np.float32).tiny)  # 0 for constant latents
    colours = np.clip((parts - low) / span, 0, 1)
    if channels == 1:
        colours = np.repeat(colours, 3, axis=1)
    elif channels == 2:
        colours = np.pad(colours, ((0, 0), (0, 1)), constant_values=0.5)
    return np.round(colours.reshape(n, h, w, 3) * 255).astype(np.uint8)
