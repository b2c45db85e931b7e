"""Where images come from: random-access sources with one interface.

A source has a length, ``source[i] -> {"image": PIL image (RGB), "label": int}``, the names of
its classes, and a ``repr`` that identifies its contents (a data iterator's state is refused for
another source).
"""

import hashlib
import logging
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from gae_jax.errors import DataError

SPLITS = ("train", "holdout")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class Source(Protocol):
    """Images with labels, by index."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def make_source(
    name: str, split: str, *, root: str = "", holdout: float = 0.0, on_corrupt: str = "error"
) -> Source:
    """The source of a config's data section.

    Args:
      name: "digits" or "folder".
      split: "train" or "holdout".
      root: folder: the directory of class folders, or one that holds ``train`` and ``val``.
      holdout: share of the images held out where there is no split on disk.
      on_corrupt: what an unreadable image does: "error", or "skip" (see `Folder`).

    Raises:
      DataError: if the data cannot be found.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, use one of {SPLITS}")
    if name == "digits":
        return Digits(split, holdout=holdout)
    if name == "folder":
        return Folder(root, split, holdout=holdout, on_corrupt=on_corrupt)
    raise DataError(f"data.name is {name!r}; known sources are 'digits' and 'folder'")


def held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """A fixed stratified choice: True for ``share`` of the items of every class."""
    chosen = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: round(share * len(members))]] = True
    return chosen


def _select(labels: np.ndarray, split: str, holdout: float) -> np.ndarray:
    if not 0 <= holdout < 1:
        raise DataError(f"data.holdout is {holdout}; it must be in [0, 1)")
    out = held_out(labels, holdout)
    chosen = np.flatnonzero(out if split == "holdout" else ~out)
    if not len(chosen):
        raise DataError(
            f"the {split} split is empty: data.holdout is {holdout} of {len(labels)} images; "
            "set it to 0.1, say"
        )
    return chosen


class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI, 8 x 8, 17 grey levels), bundled with it.

    The 8 x 8 images are enlarged (bicubic) to ``size`` pixels and repeated over RGB.
    """

    def __init__(self, split: str, *, holdout: float = 0.2, size: int = 32):
        from sklearn.datasets import load_digits  # the only user of it in the data path

        data = load_digits()
        self._chosen = _select(data.target, split, holdout)
        self._grey = np.round(data.images[self._chosen] * (255 / 16)).astype(np.uint8)
        self._labels = data.target[self._chosen]
        self._repr = f"Digits({split!r}, holdout={holdout}, size={size})"
        self._size = size
        self.class_names = [str(name) for name in data.target_names]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict:
        image = Image.fromarray(self._grey[index])
        image = image.resize((self._size, self._size), resample=Image.Resampling.BICUBIC)
        return {"image": image.convert("RGB"), "label": int(self._labels[index])}

    def __repr__(self) -> str:
        return self._repr


class Folder:
    """A directory of class folders with JPEG, PNG or WebP images.

    ``root/train/CLASS/*`` and ``root/val/CLASS/*`` are used as they are; ``root/CLASS/*`` is
    split by ``holdout``. Classes are numbered in the order of their names.

    An image that cannot be read is named in the error, or, with ``on_corrupt="skip"``, named in
    the log, counted in ``skipped`` and replaced by the next readable one.
    """

    def __init__(self, root: str, split: str, *, holdout: float = 0.0, on_corrupt: str = "error"):
        self.root, self.split, self._on_corrupt = Path(root), split, on_corrupt
        if not root or not self.root.is_dir():
            raise DataError(
                f"data.root is {root!r}, which is no directory; give --config.data.root=DIR with "
                "one folder of images per class"
            )
        folder = self._split_on_disk()
        self.class_names = sorted(p.name for p in (folder or self.root).iterdir() if p.is_dir())
        self._paths, labels = [], []
        for label, name in enumerate(self.class_names):
            for path in sorted(((folder or self.root) / name).rglob("*")):
                if path.suffix.lower() in SUFFIXES:
                    self._paths.append(path)
                    labels.append(label)
        if not self._paths:
            raise DataError(
                f"{folder or self.root} holds no images: expected CLASS/NAME with one of "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        labels = np.array(labels)
        if folder is None:
            chosen = _select(labels, split, holdout)
            self._paths, labels = [self._paths[i] for i in chosen], labels[chosen]
        self._labels = labels
        self.skipped: set[Path] = set()
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

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict:
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            image = self._read(self._paths[at])
            if image is not None:
                return {"image": image, "label": int(self._labels[at])}
        raise DataError(f"none of the {len(self)} images in {self.root} can be read")

    def readable(self, index: int) -> bool:
        """Whether the file of this index, not a replacement, can be read."""
        return self._read(self._paths[index]) is not None

    def _read(self, path: Path) -> Image.Image | None:
        if path in self.skipped:
            return None
        try:
            with Image.open(path) as image:
                return _to_rgb(image)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            if self._on_corrupt == "error":
                raise DataError(
                    f"{path} cannot be read as an image ({error}); mend or remove it, or pass "
                    "--config.data.on_corrupt=skip"
                ) from error
            self.skipped.add(path)
            logging.warning("skipped %s (%s); %d skipped so far", path, error, len(self.skipped))
            return None

    def __repr__(self) -> str:
        return self._repr


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels; transparent ones are laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
