"""ImageNet's classes by their synset, and generated images judged by a classifier of them."""

from collections.abc import Sequence

import numpy as np

from gae_jax.data.imagenet import listed


def labels_in_imagenet(class_names: Sequence[str]) -> np.ndarray | None:
    """Return ImageNet's label of every class that is named by its synset, int [n].

    None if a name is no synset of ImageNet's: a classifier of ImageNet cannot judge such classes.
    """
    number = {synset: label for label, synset in enumerate(listed("labels.txt"))}
    if not class_names or set(class_names) - set(number):
        return None
    return np.array([number[name] for name in class_names])


def judged_right(logits: np.ndarray, labels: np.ndarray, in_imagenet: np.ndarray) -> np.ndarray:
    """Return which images the classifier assigns to their class among the run's, bool [n].

    Args:
      logits: of ImageNet's classes [n, 1000].
      labels: the run's class of each image [n].
      in_imagenet: as `labels_in_imagenet` gives it for the run's classes.
    """
    return np.argmax(logits[:, in_imagenet], axis=1) == labels
