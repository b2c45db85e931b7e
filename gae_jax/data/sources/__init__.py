"""Sources of images: random access with one interface.

A source has a length, ``source[i] -> {"image": PIL image (RGB), "label": int}``, the names of
its classes, ``contents`` (`data.contents.Contents`, by which stages notice that images changed),
and a ``repr`` that identifies what is read (latents and references record it). A source that knows
all labels without reading images has ``labels``, int [n]. Sources can be read from many threads at
once, and pickled.
"""

from typing import Protocol

from gae_jax.data.contents import Contents
from gae_jax.data.sources.array_record import ArrayRecords
from gae_jax.data.sources.digits import Digits
from gae_jax.data.sources.folder import Folder
from gae_jax.data.sources.tfds import Tfds
from gae_jax.runtime.errors import DataError

SPLITS = ("train", "holdout")
SOURCES = ("digits", "folder", "tfds", "array_record")


class Source(Protocol):
    """Images with labels, by index."""

    class_names: list[str]
    contents: Contents

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def make_source(
    name: str,
    split: str,
    *,
    root: str = "",
    dataset: str = "",
    holdout: float = 0.0,
    on_corrupt: str = "error",
    exif: str = "ignore",
) -> Source:
    """Make the source of a config's data section.

    Args:
      name: one of `SOURCES`.
      split: "train" or "holdout".
      root: folder: the directory of class folders, or one that holds ``train`` and ``val``; tfds:
        the data_dir of TensorFlow Datasets; array_record: what ``prepare-data`` wrote. The last
        two may be ``gs://``.
      dataset: tfds: name and version of the data set.
      holdout: share of the images held out where there is no split on disk.
      on_corrupt: unreadable images: "error", or "skip" (see `base.Encoded`).
      exif: EXIF orientations: "ignore", or "apply".

    Raises:
      DataError: if the data cannot be found or is incomplete.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, use one of {SPLITS}")
    if name == "digits":
        return Digits(split, holdout=holdout)
    if name == "folder":
        return Folder(root, split, holdout=holdout, on_corrupt=on_corrupt, exif=exif)
    if name == "tfds":
        return Tfds(root, dataset, split, holdout=holdout, on_corrupt=on_corrupt, exif=exif)
    if name == "array_record":
        return ArrayRecords(root, split, holdout=holdout, on_corrupt=on_corrupt, exif=exif)
    known = ", ".join(map(repr, SOURCES[:-1]))
    raise DataError(f"data.name is {name!r}; known sources are {known} and {SOURCES[-1]!r}")
