"""What the sources share: splits, and the handling of unreadable images."""

import abc
import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from gae_jax.data.contents import printable
from gae_jax.data.decoding import CALLED, TURNED, decode
from gae_jax.runtime.errors import DataError, UserError, number_of

_UNKNOWN, _READABLE, _UNREADABLE = range(3)


def held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Choose held-out items, stratified and always the same: bool [n], True for held out.

    Args:
      labels: int [n].
      share: of the items of every class, in [0, 1).
    """
    chosen = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(share * len(members))]] = True
    return chosen


def check_holdout(share: float) -> None:
    """Raise DataError unless a held-out share is in [0, 1)."""
    if not 0 <= share < 1:
        raise DataError(f"data.holdout is {share}; it must be in [0, 1)")


SHARES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)  # that an error may suggest


def empty_split(split: str, holdout: float, counts: list[int]) -> DataError:
    """Make the error for a split without images, with a share that would work.

    Args:
      counts: number of images in every class.
    """

    def sizes(share: float) -> list[tuple[int, int]]:
        return [(count - round(share * count), round(share * count)) for count in counts]

    in_every_class = [share for share in SHARES if all(min(pair) > 0 for pair in sizes(share))]
    in_some_class = [share for share in SHARES if all(map(any, zip(*sizes(share), strict=True)))]
    total, smallest, largest = sum(counts), min(counts, default=0), max(counts, default=0)
    size = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    said = f"the {split} split is empty: data.holdout is {holdout} of {number_of(total, 'image')}"
    if len(counts) > 1:
        said += f", rounded in each of {number_of(len(counts), 'class', 'classes')} of {size}"
    if shares := in_every_class or in_some_class:
        share = shares[0]
        train, out = (sum(column) for column in zip(*sizes(share), strict=True))
        return DataError(
            f"{said}; with --config.data.holdout={share} it is {out}, and {train} to train on"
        )
    return DataError(f"{said}; no share leaves both splits an image, so add images")


def select(labels: np.ndarray, split: str, holdout: float) -> np.ndarray:
    """Return the indices of a split's images, ascending.

    Args:
      labels: int [n], of all images.

    Raises:
      DataError: if there are none.
    """
    check_holdout(holdout)
    out = held_out(labels, holdout)
    chosen = np.flatnonzero(out if split == "holdout" else ~out)
    if not len(chosen):
        raise empty_split(split, holdout, np.unique(labels, return_counts=True)[1].tolist())
    return chosen


def check_place(root: str) -> None:
    """Raise DataError for URLs other than gs://, which ArrayRecord cannot read."""
    if "://" in root and not root.startswith("gs://"):
        raise DataError(
            f"data.root is {root!r}: ArrayRecord files are read from local folders and gs:// only; "
            "mount it, or copy it to a local disk"
        )


LOOKED_AT = 256  # images that are read before the log says how many have an EXIF orientation
_COUNTING = threading.Lock()


class Encoded(abc.ABC):
    """Encoded images by index, decoded to RGB when they are read.

    An unreadable image raises an error that names it. With ``on_corrupt="skip"`` it is instead
    named in the log, counted in ``skipped`` and replaced by the next readable image.

    A subclass implements `_encoded` and `_name`, and has ``class_names`` and ``contents``.

    Args:
      where: name of the images as a whole, for errors.
      count: number of images.
      on_corrupt: "error" or "skip".
      exif: EXIF orientations: "ignore" (the log says how many images have one), or "apply".
    """

    def __init__(self, where: str, count: int, on_corrupt: str, exif: str = "ignore"):
        self._where, self._on_corrupt, self._exif = where, on_corrupt, exif
        self._state = np.full(count, _UNKNOWN, np.uint8)  # of every image
        self.skipped: set[Any] = set()
        self.problems: dict[int, str] = {}  # of images that were skipped: why
        self._looked = self._turned = 0  # images read, and how many of them have an orientation
        self._logged = False
        self._unreported: list[tuple[int, bool]] | None = None  # (index, turned), in a worker

    @property
    def _read_as(self) -> str:
        """The part of the repr that says how pixels differ from the default."""
        return "" if self._exif == "ignore" else f", exif {self._exif}"

    @abc.abstractmethod
    def _encoded(self, index: int) -> tuple[Any, int]:
        """Return (path or file of an encoded image, label)."""

    @abc.abstractmethod
    def _name(self, index: int) -> Any:
        """Name an image in errors, readable or not."""

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, index: int) -> dict:
        for offset in range(len(self)):
            item = self._read((index + offset) % len(self))
            if item is not None:
                return item
        raise DataError(f"none of the {len(self)} images in {self._where} can be read")

    def readable(self, index: int) -> bool:
        """Return whether the image of this index, not a replacement, can be read."""
        if self._state[index] == _UNKNOWN:
            self._read(index)
        return bool(self._state[index] == _READABLE)

    def _read(self, index: int) -> dict | None:
        if self._state[index] == _UNREADABLE:
            return None
        try:
            content, label = self._encoded(index)
            image = decode(content, exif=self._exif)
        except UserError:
            raise
        except Exception as error:  # on a damaged file decoders raise anything
            self.note(index, str(error) or type(error).__name__, error)
            return None
        if self._exif == "ignore" and self._state[index] == _UNKNOWN and not self._logged:
            self.count_turned([(index, image.info[TURNED])])
        self._state[index] = _READABLE
        image.info[CALLED] = functools.partial(self._called, index)
        return {"image": image, "label": label}

    def note(self, index: int, problem: str, cause: Exception | None = None) -> None:
        """Record that an image cannot be read: log it once, and count it.

        Raises:
          DataError: naming it, unless such images are skipped.
        """
        name = self._called(index)
        if self._on_corrupt == "error":
            raise DataError(
                f"{printable(name)} cannot be read as an image ({problem}); repair it, or pass "
                "--config.data.on_corrupt=skip, or remove it (training that has begun then resumes "
                "with --amend)"
            ) from cause
        self._state[index], self.problems[index] = _UNREADABLE, problem
        if name in self.skipped:
            return
        self.skipped.add(name)
        logging.warning(
            "skipped %s (%s); %d skipped so far", printable(name), problem, len(self.skipped)
        )

    def _called(self, index: int) -> Any:
        """Return `_name`, or the index if damage hides the name."""
        try:
            return self._name(index)
        except Exception:  # on damaged records libraries raise anything
            return f"image {index} of {self._where}"

    def news(self) -> tuple[dict[int, str], list[tuple[int, bool]]]:
        """Return (why images are skipped, argument of `count_turned`) since the last call."""
        with _COUNTING:
            looked, self._unreported = self._unreported or [], []
        problems = dict(self.problems)
        self.problems.clear()
        return problems, looked

    def count_turned(self, looked: Sequence[tuple[int, bool]]) -> None:
        """Log once, after some images were read, how many have an orientation that is ignored.

        An image counts once, however many threads and workers read it.

        Args:
          looked: images that were read: (index, whether it has an orientation).
        """
        with _COUNTING:
            for index, turned in looked:
                if self._state[index] != _UNKNOWN:
                    continue
                self._state[index] = _READABLE
                self._looked, self._turned = self._looked + 1, self._turned + turned
                if self._unreported is not None:
                    self._unreported.append((index, turned))
            enough = self._looked >= min(LOOKED_AT, len(self) - len(self.skipped))
            if self._logged or not self._turned or not enough:
                return
            self._logged = True
        logging.warning(
            "%d of the first %d images read of %s have an EXIF orientation, which is ignored, as "
            "for ImageNet; turn photographs upright with --config.data.exif=apply",
            *(self._turned, self._looked, self._where),
        )
