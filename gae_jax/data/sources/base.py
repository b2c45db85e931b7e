"""What the sources share: splits, and what an unreadable image does."""

import abc
import logging
from typing import Any

import numpy as np

from gae_jax.data.decoding import UNREADABLE, decode
from gae_jax.errors import DataError

_UNKNOWN, _READABLE, _UNREADABLE = range(3)


def held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """A fixed stratified choice: True for ``share`` of the items of every class."""
    chosen = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(share * len(members))]] = True
    return chosen


def check_holdout(share: float) -> None:
    """
    Raises:
      DataError: if this is no share.
    """
    if not 0 <= share < 1:
        raise DataError(f"data.holdout is {share}; it must be in [0, 1)")


def empty_split(split: str, holdout: float, count: int) -> DataError:
    """What to say where a split of ``count`` images has none."""
    return DataError(
        f"the {split} split is empty: data.holdout is {holdout} of {count} images; "
        "set it to 0.1, say"
    )


def select(labels: np.ndarray, split: str, holdout: float) -> np.ndarray:
    """Which of the images with these labels are the split's, in order.

    Raises:
      DataError: if there are none.
    """
    check_holdout(holdout)
    out = held_out(labels, holdout)
    chosen = np.flatnonzero(out if split == "holdout" else ~out)
    if not len(chosen):
        raise empty_split(split, holdout, len(labels))
    return chosen


def check_place(root: str) -> None:
    """Refuses places that ArrayRecord does not read: its reader knows files and ``gs://``.

    Raises:
      DataError: for another scheme.
    """
    if "://" in root and not root.startswith("gs://"):
        raise DataError(
            f"data.root is {root!r}: ArrayRecord files are read from local folders and gs:// only; "
            "mount it, or copy it to a local disk"
        )


class Encoded(abc.ABC):
    """Encoded images by index, decoded to RGB when they are read.

    An image that cannot be read is named in the error, or, with ``on_corrupt="skip"``, named in
    the log, counted in ``skipped`` and replaced by the next readable one.

    A subclass says how many there are, gives their content by `_encoded` and their names by
    `_name`, and has ``class_names``.

    Args:
      where: what the errors call all of them together.
      count: number of images.
    """

    def __init__(self, where: str, count: int, on_corrupt: str):
        self._where, self._on_corrupt = where, on_corrupt
        self._state = np.full(count, _UNKNOWN, np.uint8)  # of every image
        self.skipped: set[Any] = set()

    @abc.abstractmethod
    def _encoded(self, index: int) -> tuple[Any, int]:
        """(path or file of an encoded image, label)."""

    @abc.abstractmethod
    def _name(self, index: int) -> Any:
        """What an image is called in errors, readable or not."""

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, index: int) -> dict:
        for offset in range(len(self)):
            item = self._read((index + offset) % len(self))
            if item is not None:
                return item
        raise DataError(f"none of the {len(self)} images in {self._where} can be read")

    def readable(self, index: int) -> bool:
        """Whether the image of this index, not a replacement, can be read."""
        if self._state[index] == _UNKNOWN:
            self._read(index)
        return bool(self._state[index] == _READABLE)

    def _read(self, index: int) -> dict | None:
        if self._state[index] == _UNREADABLE:
            return None
        try:
            content, label = self._encoded(index)
            image = decode(content)
        except UNREADABLE as error:
            name = self._name(index)
            if self._on_corrupt == "error":
                raise DataError(
                    f"{name} cannot be read as an image ({error}); mend or remove it, or pass "
                    "--config.data.on_corrupt=skip"
                ) from error
            self._state[index] = _UNREADABLE
            self.skipped.add(name)
            logging.warning("skipped %s (%s); %d skipped so far", name, error, len(self.skipped))
            return None
        self._state[index] = _READABLE
        return {"image": image, "label": label}
