"""Stratified samples of a split, for metrics that are not computed on every image.

Data sets are ordered by class, so their first images are all of one class. The samples here are
spread over the split, keep the shares of the classes, and are the same in every run.
"""

import numpy as np

from gae_jax.data.sources import Source

SEED = 0  # not the run's: runs with several seeds are measured on the same images


def stratified_order(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return all indices [n], shuffled so that every prefix is stratified by class.

    First comes one item of every class, then each class has its share of any prefix. The order of
    the classes depends on their number only: short prefixes of two splits have the same classes.

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
    """Return indices of up to ``most`` items in ascending order, stratified by class."""
    if most >= len(labels):
        return np.arange(len(labels))
    return np.sort(stratified_order(labels, classes)[:most])


def order_of(source: Source) -> np.ndarray:
    """Return the `stratified_order` of a source without reading images.

    A source that has no ``labels`` (int [n]) without reading its images is shuffled instead, which
    keeps the shares of the classes on average.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        return np.random.default_rng(SEED).permutation(len(source))
    return stratified_order(labels, len(source.class_names))
