"""The nearest real image of generated ones: whether they are copies of what was trained on."""

from collections.abc import Iterable

import numpy as np


def normalized(features: np.ndarray) -> np.ndarray:
    """Scale rows [n, D] to length 1; rows of zeros stay."""
    features = np.asarray(features, np.float32)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(np.float32).tiny)


def nearest_images(
    queries: np.ndarray, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Find the real image with the highest cosine similarity to each query.

    Args:
      queries: features [q, D] of generated images.
      batches: (uint8 images [n, H, W, 3], features [n, D]) of the real ones.

    Returns:
      (images uint8 [q, H, W, 3], cosine similarities [q]).

    Raises:
      ValueError: if there are no real images.
    """
    queries = normalized(queries)
    similarity = np.full(len(queries), -np.inf, np.float32)
    nearest = None
    for images, features in batches:
        if nearest is None:
            nearest = np.zeros((len(queries), *images.shape[1:]), images.dtype)
        cosine = queries @ normalized(features).T  # [q, n]
        best = np.argmax(cosine, axis=1)
        highest = cosine[np.arange(len(best)), best]
        nearer = highest > similarity
        similarity = np.where(nearer, highest, similarity)
        nearest[nearer] = images[best[nearer]]
    if nearest is None:
        raise ValueError("there are no real images to search")
    return nearest, similarity
