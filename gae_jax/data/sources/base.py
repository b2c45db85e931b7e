"""What the sources share: splits, and what an unreadable image does."""

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


SHARES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)  # that an error may advise


def empty_split(split: str, holdout: float, counts: list[int]) -> DataError:
    """What to say where a split has no images.

    Args:
      counts: of images in the groups of which ``holdout`` is taken: the classes.
    """

    def sizes(share: float) -> list[tuple[int, int]]:
        return [(count - round(share * count), round(share * count)) for count in counts]

    whole = [share for share in SHARES if all(min(pair) > 0 for pair in sizes(share))]
    some = [share for share in SHARES if all(map(any, zip(*sizes(share), strict=True)))]
    total, smallest, largest = sum(counts), min(counts, default=0), max(counts, default=0)
    size = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    said = f"the {split} split is empty: data.holdout is {holdout} of {number_of(total, 'image')}"
    if len(counts) > 1:
        said += f", rounded in each of {number_of(len(counts), 'class', 'classes')} of {size}"
    if whole or some:
        share = (whole or some)[0]
        train, out = (sum(column) for column in zip(*sizes(share), strict=True))
        return DataError(
            f"{said}; with --config.data.holdout={share} it is {out}, and {train} to train on"
        )
    return DataError(f"{said}; no share leaves both splits an image, so add images")


def select(labels: np.ndarray, split: str, holdout: float) -> np.ndarray:
    """Which of the images with these labels are the split's, in order.

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
    """Refuses places that ArrayRecord does not read: its reader knows files and ``gs://``.

    Raises:
      DataError: for another scheme.
    """
    if "://" in root and not root.startswith("gs://"):
        raise DataError(
            f"data.root is {root!r}: ArrayRecord files are read from local folders and gs:// only; "
            "mount it, or copy it to a local disk"
        )


LOOKED_AT = 256  # images, before a line says how many of them have an EXIF orientation
_COUNTING = threading.Lock()


class Encoded(abc.ABC):
    """Encoded images by index, decoded to RGB when they are read.

    An image that cannot be read, for whatever reason, is named in the error, or, with
    ``on_corrupt="skip"``, named in the log, counted in ``skipped`` and replaced by the next
    readable one.

    A subclass says how many there are, gives their content by `_encoded` and their names by
    `_name`, and has ``class_names`` and ``contents``.

    Args:
      where: what the errors call all of them together.
      count: number of images.
      exif: what an EXIF orientation does: "ignore" (one line says how many images have one), or
        "apply".
    """

    def __init__(self, where: str, count: int, on_corrupt: str, exif: str = "ignore"):
        self._where, self._on_corrupt, self._exif = where, on_corrupt, exif
        self._state = np.full(count, _UNKNOWN, np.uint8)  # of every image
        self.skipped: set[Any] = set()
        self.problems: dict[int, str] = {}  # of images that were skipped: why
        self._looked = self._turned = 0  # images read, and those of them with an orientation
        self._told = False
        self._unreported: list[tuple[int, bool]] | None = None  # (index, turned), in a worker

    @property
    def _read_as(self) -> str:
        """What the repr adds: how pixels differ from those of the default."""
        return "" if self._exif == "ignore" else f", exif {self._exif}"

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
            image = decode(content, exif=self._exif)
        except UserError:
            raise
        except Exception as error:  # a damaged file makes decoders raise whatever there is
            self.note(index, str(error) or type(error).__name__, error)
            return None
        if self._exif == "ignore" and self._state[index] == _UNKNOWN and not self._told:
            self.count_turned([(index, image.info[TURNED])])
        self._state[index] = _READABLE
        image.info[CALLED] = functools.partial(self._called, index)
        return {"image": image, "label": label}

    def note(self, index: int, problem: str, cause: Exception | None = None) -> None:
        """Note that an image cannot be read: name it in the log, once, and count it.

        Raises:
          DataError: naming it, unless such images are to be skipped.
        """
        name = self._called(index)
        if self._on_corrupt == "error":
            raise DataError(
                f"{printable(name)} cannot be read as an image ({problem}); mend it, or pass "
                "--config.data.on_corrupt=skip, or remove it (a training that has begun then goes "
                "on with --amend)"
            ) from cause
        self._state[index], self.problems[index] = _UNREADABLE, problem
        if name in self.skipped:
            return
        self.skipped.add(name)
        logging.warning(
            "skipped %s (%s); %d skipped so far", printable(name), problem, len(self.skipped)
        )

    def _called(self, index: int) -> Any:
        """`_name`, also where damage hides it."""
        try:
            return self._name(index)
        except Exception:  # of damaged records libraries raise whatever they meet
            return f"image {index} of {self._where}"

    def news(self) -> tuple[dict[int, str], list[tuple[int, bool]]]:
        """(why images are skipped, `count_turned`'s argument) since the last call."""
        with _COUNTING:
            looked, self._unreported = self._unreported or [], []
        problems = dict(self.problems)
        self.problems.clear()
        return problems, looked

    def count_turned(self, looked: Sequence[tuple[int, bool]]) -> None:
        """Say once, when some images were read, how many have an orientation that is ignored.

        An image counts once, however many threads and workers read it.

        Args:
          looked: images that were read: their indices, and whether they have an orientation.
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
            if self._told or not self._turned or not enough:
                return
            self._told = True
        logging.warning(
            "%d of the first %d images read of %s have an EXIF orientation, which is ignored, as "
            "for ImageNet; turn photographs upright with --config.data.exif=apply",
            *(self._turned, self._looked, self._where),
        )
