"""Linear probes: how well a linear classifier reads frozen features."""

import numpy as np


def without_probe(labels: np.ndarray, count: int) -> str:
    """Return why images with these training labels allow no probe; "" if they do.

    Args:
      count: of test images.
    """
    if len(np.unique(labels)) < 2:
        return f"its {len(labels)} training images are of one class; a probe needs two or more"
    return "" if count else "there is no held-out image"


def linear_probe(train: tuple, test: tuple) -> float:
    """Return the accuracy on ``test`` of a logistic regression fitted on ``train``.

    Features are centred and divided by one std, that of all of them together: scaling each by its
    own would blow up pixels' weakest components and make them look worse (on the digits 93.9 %
    instead of 96.4 %).

    Args:
      train, test: (features [n, ...], labels [n]); features are flattened.
    """
    from sklearn.linear_model import LogisticRegression  # a second, which training need not wait

    features, held_out = (_flat(x).astype(np.float64) for x in (train[0], test[0]))
    mean = features.mean(axis=0)
    scale = np.sqrt(features.var(axis=0).mean()) or 1.0  # 0 of images that are all the same
    model = LogisticRegression(max_iter=2000).fit((features - mean) / scale, train[1])
    return float(model.score((held_out - mean) / scale, test[1]))


def pixel_probe(train: tuple, test: tuple, dimensions: int) -> float:
    """Compute `linear_probe` of raw pixels on their leading principal components.

    The components (fitted on ``train``) are as many as the latents have dimensions, so that both
    probes see equally many numbers; no linear map to so few keeps more of the pixels' variance.
    """
    from sklearn.decomposition import PCA

    pixels, held_out = (_flat(x).astype(np.float32) for x in (train[0], test[0]))
    with np.errstate(invalid="ignore"):  # shares of a variance of 0: images that are all the same
        pca = PCA(min(dimensions, *pixels.shape), random_state=0).fit(pixels)
    return linear_probe((pca.transform(pixels), train[1]), (pca.transform(held_out), test[1]))


def _flat(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).reshape(len(x), -1)
