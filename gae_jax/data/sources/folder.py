"""A directory with one folder of images per class."""

import hashlib
from pathlib import Path

import numpy as np

from gae_jax.data.sources.base import Encoded, select
from gae_jax.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def class_folders(folder: Path) -> list[str]:
    """The names of the classes, in their order."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def class_images(folder: Path, class_names: list[str]) -> tuple[list[Path], np.ndarray]:
    """(paths, labels int [n]) of the images in class folders, in the order of class and name.

    Raises:
      DataError: if there are none, or there is a folder of another class.
    """
    if odd := sorted(set(class_folders(folder)) - set(class_names)):
        raise DataError(
            f"{folder} has classes that the training images lack: {', '.join(odd[:5])}; remove "
            "them, or add their training images"
        )
    paths, labels = [], []
    for label, name in enumerate(class_names):
        found = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else ()
        mine = [path for path in found if path.suffix.lower() in SUFFIXES]
        paths += mine
        labels += [label] * len(mine)
    if not paths:
        raise DataError(
            f"{folder} holds no images: expected CLASS/NAME with one of "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return paths, np.array(labels)


class Folder(Encoded):
    """A directory of class folders with JPEG, PNG or WebP images.

    ``root/train/CLASS/*`` and ``root/val/CLASS/*`` are used as they are; ``root/CLASS/*`` is
    split by ``holdout``. Classes are numbered in the order of their names; where there is
    ``train``, of the folders in it.
    """

    def __init__(self, root: str, split: str, *, holdout: float = 0.0, on_corrupt: str = "error"):
        self.root, self.split = Path(root), split
        if "://" in root:
            raise DataError(
                f"data.root is {root!r}, but data.name='folder' reads local directories only; "
                "mount it, or use data.name='array_record' or 'tfds', which read gs://"
            )
        if not root or not self.root.is_dir():
            raise DataError(
                f"data.root is {root!r}, which is no directory; give --config.data.root=DIR with "
                "one folder of images per class"
            )
        folder = self._split_on_disk()
        self._top = folder or self.root
        self.class_names = class_folders(self.root / "train" if folder else self.root)
        self._paths, labels = class_images(folder or self.root, self.class_names)
        if folder is None:
            chosen = select(labels, split, holdout)
            self._paths, labels = [self._paths[i] for i in chosen], labels[chosen]
        self.labels = labels
        super().__init__(str(self.root), len(labels), on_corrupt)
        listing = "\n".join(str(path.relative_to(self.root)) for path in self._paths)
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        self._repr = f"Folder({split!r}, {len(self._paths)} files, {digest})"

    def _split_on_disk(self) -> Path | None:
        if not (self.root / "train").is_dir():
            return None
        folder = self.root / ("train" if self.split == "train" else "val")
        if not folder.is_dir():
            raise DataError(f"{self.root} has train/ but no val/; add it, or move the classes up")
        return folder

    def _encoded(self, index: int) -> tuple[Path, int]:
        return self._paths[index], int(self.labels[index])

    def _name(self, index: int) -> Path:
        return self._paths[index]

    def place(self, index: int) -> Path:
        """CLASS/NAME of an image, with its suffix."""
        return self._paths[index].relative_to(self._top)

    def __repr__(self) -> str:
        return self._repr
