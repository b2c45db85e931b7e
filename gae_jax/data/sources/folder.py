"""A directory with one folder of images per class."""

import hashlib
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gae_jax.data.contents import ClassContents, Contents, digest_of, printable
from gae_jax.data.sources.base import Encoded, select
from gae_jax.data.sources.listing import (
    ANNOTATIONS,
    DANGLING,
    LOOSE,
    SPECIAL,
    SUFFIXES,
    class_folders,
    describe,
    list_annotated,
    list_classes,
    named_files,
    top_level,
)
from gae_jax.runtime.errors import DataError, number_of

# Split -> names of its folder, in any case.
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
OTHER_SPLITS = ("test", "testing", "dev")


def split_folders(root: Path) -> dict[str, Path]:
    """Find the folders of "train" and "val"; {} if there are class folders only.

    Raises:
      DataError: if a split has two folders, or there are splits but no training images.
    """
    folders, splits = top_level(root).folders, {}
    for split, names in SPLIT_NAMES.items():
        named = [name for name in folders if name.lower() in names]
        if len(named) > 1:
            raise DataError(
                f"{printable(root)} has {named[0]}/ and {named[1]}/; rename all but one of them "
                f"so that one folder is called {split}/"
            )
        if named:
            splits[split] = root / named[0]
    known = {path.name for path in splits.values()}
    rest = [name for name in folders if name not in known and name.lower() not in OTHER_SPLITS]
    if "train" in splits:
        train = top_level(splits["train"])
        # a class of that name among others: bus/, car/, train/
        return {} if train.images and not train.folders and rest else splits
    inner = set(top_level(splits["val"]).folders) if splits else set()
    if folders and (not rest or inner & set(rest)):
        raise DataError(
            f"{printable(root)} has {', '.join(f'{printable(n)}/' for n in folders[:5])} but no "
            f"train/; put the class folders of the training images into {printable(root / 'train')}"
        )
    return {}  # besides other folders, "valid" is a class


class PackedNames(Sequence[str]):
    """File names as one array of bytes, which worker processes share instead of copying them."""

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class Folder(Encoded):
    """A directory of class folders with images.

    ``root/train/CLASS/*`` and ``root/val/CLASS/*`` are used as they are; ``root/CLASS/*`` is
    split by ``holdout``. Classes are numbered in the order of their names, those of ``train`` if it
    exists. Other names of the splits are those of `split_folders`. Tiny-ImageNet's ``val``, one
    folder of images with a list of their classes, is supported too.

    Attributes:
      class_names: printable; names that are not UTF-8 are escaped.
      contents: of the folder that the images were chosen from.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        holdout: float = 0.0,
        on_corrupt: str = "error",
        exif: str = "ignore",
    ):
        self.root, self.split = Path(root), split
        if "://" in root:
            raise DataError(
                f"data.root is {root!r}, but data.name='folder' reads local directories only; "
                "mount it, or use data.name='array_record' or 'tfds', which read gs://"
            )
        if not root or not os.path.isdir(root):
            is_file = bool(root) and os.path.isfile(root)
            raise DataError(
                f"data.root is {printable(root)!r}, which is "
                + ("a file; unpack it if it is an archive, and " if is_file else "no directory; ")
                + "give --config.data.root=DIR with one folder of images per class"
            )
        splits = split_folders(self.root)
        self._top = self._folder_of(splits)
        names = class_folders(splits["train"] if splits else self.root)
        if not names:
            raise self._without_classes(splits.get("train", self.root))
        self._refuse_unlike_classes(names, splits)
        # Tiny-ImageNet has its validation images in one folder, with a list of their classes
        annotated = split != "train" and (self._top / ANNOTATIONS).is_file()
        listings = (list_annotated if annotated else list_classes)(self._top, names)
        self.class_names = [printable(name) for name in names]
        self.contents = Contents.of(
            [
                ClassContents.of_files(name, listing.files)
                for name, listing in zip(self.class_names, listings, strict=True)
            ]
        )
        if splits or split == "train":
            self._log(listings, set(splits.values()))
        files, labels = named_files([""] * len(names) if annotated else names, listings)
        if not splits:
            chosen = select(labels, split, holdout)
            files, labels = [files[i] for i in chosen], labels[chosen]
        # as text: a million paths take a gigabyte and half a minute
        self._files: Sequence[str] = files
        self.labels = labels
        super().__init__(printable(self.root), len(labels), on_corrupt, exif)
        digest = digest_of(*(f"{self._top.name}/{f}" if splits else f for f in files))
        self._repr = f"Folder({split!r}, {len(files)} files, {digest}{self._read_as})"

    def _folder_of(self, splits: dict[str, Path]) -> Path:
        """Return the folder that holds this split's class folders."""
        if not splits:
            return self.root
        folder = splits.get("train" if self.split == "train" else "val")
        root = printable(self.root)
        if folder is None:
            test = next((n for n in top_level(self.root).folders if n.lower() in OTHER_SPLITS), "")
            raise DataError(
                f"{root} has {splits['train'].name}/ but no val/ (or valid/ or validation/); add "
                "it, or hold out a share of the training images with "
                f"--config.data.root={shlex.quote(printable(splits['train']))} "
                "--config.data.holdout=0.1"
                + (f", or use {test}/: rename it to val/" if test else "")
            )
        top = top_level(folder)
        if top.images and not top.folders and self.split != "train":
            wordnet = all(
                re.fullmatch(r"n\d{8}", name) for name in top_level(splits["train"]).folders
            )
            labels = "" if wordnet else " --val-labels=FILE"
            out = shlex.quote(f"{root.rstrip('/')}-shards")
            raise DataError(
                f"{printable(folder)} holds {number_of(len(top.images), 'image')} in no class "
                "folders. Sort "
                f"them with: python -m gae_jax prepare-data --source={shlex.quote(root)} "
                f"--out={out}{labels} (--val-labels names a file with NAME CLASS in each line; "
                "the whole of ImageNet needs none), and then pass "
                f"--config.data.name=array_record --config.data.root={out}; or move each image "
                "into the folder of its class"
            )
        return folder

    def _without_classes(self, folder: Path) -> DataError:
        top, where = top_level(folder), printable(folder)
        if top.images:
            return DataError(
                f"{where} holds {number_of(len(top.images), 'image')} in no class folders: "
                "expected CLASS/NAME; for images without classes move all of them into one "
                f"folder, such as {where}/all, and pass --config.diffusion.model.num_classes=1"
            )
        ignored = describe(top.ignored)
        return DataError(
            f"{where} holds no images: expected CLASS/NAME with one of "
            f"{', '.join(sorted(SUFFIXES))}" + (f"; ignored: {ignored}" if ignored else "")
        )

    def _refuse_unlike_classes(self, names: list[str], splits: dict[str, Path]) -> None:
        """Raise DataError for a root that is the parent of the right one."""
        if splits or len(names) > 1:
            return
        inner = self.root / names[0]
        if "train" in split_folders(inner):
            raise DataError(
                f"{printable(self.root)} holds one folder, in which there is train/; give "
                f"--config.data.root={shlex.quote(printable(inner))}"
            )

    def _log(self, listings, splits: set[Path]) -> None:
        """Log one line: what was found, and what is ignored."""
        top = top_level(self._top)
        ignored = sum((listing.ignored for listing in listings), Counter(top.ignored))
        if top.images:
            ignored[LOOSE] += len(top.images)
        counts = [len(listing.files) for listing in listings]
        present = [count for count in counts if count]
        lacking = [n for n, count in zip(self.class_names, counts, strict=True) if not count]
        beside = [
            printable(name)
            for name in (top_level(self.root).folders if splits else ())
            if self.root / name not in splits
        ]
        lost = [
            printable(self._top / name / file)
            for name, listing in zip(self.class_names, listings, strict=True)
            for file in listing.dangling
        ]
        odd = lost or {LOOSE, DANGLING, SPECIAL} & set(ignored)
        logging.log(
            logging.WARNING if odd else logging.INFO,
            "data: %s: %s, %s (%d to %d in a class)%s%s%s%s",
            *(printable(self._top), number_of(len(present), "class", "classes")),
            *(number_of(sum(counts), "image"), min(present), max(present)),
            f"; {len(lacking)} of the classes have none, such as {lacking[0]}" if lacking else "",
            f"; {len(lost)} of them links that lead nowhere, such as {lost[0]}" if lost else "",
            f"; ignored: {describe(ignored)}" if ignored else "",
            f"; not used: {', '.join(f'{name}/' for name in beside[:5])}" if beside else "",
        )

    def _encoded(self, index: int) -> tuple[Path, int]:
        return self._name(index), int(self.labels[index])

    def _name(self, index: int) -> Path:
        return self._top / self._files[index]

    def place(self, index: int) -> Path:
        """Return CLASS/NAME of an image, with its suffix."""
        return Path(self._files[index])

    def __repr__(self) -> str:
        return self._repr

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": PackedNames(self._files)}

    def fingerprint(self) -> str:
        """Hash names, sizes and modification times of all files."""
        digest = hashlib.sha256()
        for name in self._files:
            try:
                facts = (self._top / name).stat()
                changed = f"{facts.st_size} {facts.st_mtime_ns}"
            except OSError:  # it is no readable image then
                changed = "gone"
            digest.update(os.fsencode(f"{name} {changed}\n"))
        return digest.hexdigest()[:24]
