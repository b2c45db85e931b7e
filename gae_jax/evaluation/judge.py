"""A classifier trained on real images only, to judge generated ones.

scikit-learn's multilayer perceptron on small grey images, trained apart from every network of
the pipeline. Its hidden layer also gives the features of the Frechet distance.
"""

import jax
import numpy as np
from einops import reduce
from threadpoolctl import threadpool_limits

from gae_jax.evaluation.extractors import Extractor
from gae_jax.nn.network import fingerprint

EDGE = 8  # pixels: what the judge looks at


def small_grey(images: np.ndarray) -> np.ndarray:
    """Average uint8 [n, S, S, 3] over blocks and channels -> [n, 64] in [0, 1].

    Images smaller than `EDGE` are taken pixel by pixel, [n, S * S].
    """
    block = max(images.shape[1] // EDGE, 1)
    crop = images[:, : EDGE * block, : EDGE * block].astype(np.float32) / 255
    return reduce(crop, "n (h p) (w q) c -> n (h w)", "mean", p=block, q=block)


class Judge:
    """Fitted on real images [n, S, S, 3] (uint8) and their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from sklearn.neural_network import MLPClassifier  # takes a second

        self._model = MLPClassifier((128,), alpha=1e-2, max_iter=1000, random_state=0)
        # its matrices are so small that threads only wait for each other, and for other processes
        with threadpool_limits(1):
            self._model.fit(small_grey(images), labels)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self._model.predict(small_grey(images))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return activations of the hidden layer, [n, 128]."""
        hidden = small_grey(images) @ self._model.coefs_[0] + self._model.intercepts_[0]
        return np.maximum(hidden, 0)

    def extractor(self) -> Extractor:
        """Wrap `features` as an extractor for the evaluator of tokenizers; its space is "pool"."""
        kernel, bias = (
            part[0].astype(np.float32) for part in (self._model.coefs_, self._model.intercepts_)
        )

        def run(arrays, images):
            hidden = jax.numpy.matmul(small_grey(images), kernel, precision="highest") + bias
            return {"pool": jax.nn.relu(hidden)}

        digest = fingerprint({"kernel": kernel, "bias": bias})
        return Extractor("judge", digest, f"grey, {EDGE} x {EDGE}", run, ({}, {}))
