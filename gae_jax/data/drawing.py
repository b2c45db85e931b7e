"""Which images of a split stand for all of it, where a figure is not of every image.

Data sets lie class by class, so their first images are of one class. What is drawn here is spread
over the whole split, keeps the shares of the classes, and is the same in every run.
"""

import numpy as np

from gae_jax.data.sources import Source

SEED = 0  # not the run's: runs of several seeds are measured by the same images


def stratified_order(labels: np.ndarray, classes: int) -> np.ndarray:
    """All indices [n], shuffled so that every prefix is stratified by class.

    First comes one item of every class, then each class has its share of any prefix. The classes'
    turns depend on their number alone: short prefixes of two splits are of the same classes.

    Args:
      labels: int [n], from 0 to ``classes`` - 1.
    """
    random = np.random.default_rng(SEED)
    turns = random.permutation(classes)
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled inside each
    names, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    return order[np.lexsort((np.repeat(turns[names], counts), rank / np.repeat(counts, counts)))]


def drawn(labels: np.ndarray, classes: int, most: int) -> np.ndarray:
    """Indices of up to ``most`` items in ascending order, stratified by class."""
    if most >= len(labels):
        return np.arange(len(labels))
    return np.sort(stratified_order(labels, classes)[:most])


def order_of(source: Source) -> np.ndarray:
    """`stratified_order` of a source; no image is read.

    A source that does not know its labels (``labels``, int [n]) without reading its images is
    shuffled instead, which keeps the classes' shares on average.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        return np.random.default_rng(SEED).permutation(len(source))
    return stratified_order(labels, len(source.class_names))
