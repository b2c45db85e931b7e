"""Listing the images in class folders, and the files that are ignored there."""

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gae_jax.data.contents import printable
from gae_jax.runtime.errors import DataError

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm"),
}
# Files and folders that operating systems, archives, notebooks and storage servers leave behind.
JUNK = {
    *("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"),
    *("__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
HIDDEN, DANGLING, AGAIN = "hidden or system", "links that lead nowhere", "folders met before"
LOOSE, SPECIAL, NO_SUFFIX = "images outside of class folders", "no regular files", "no suffix"


def is_junk(name: str) -> bool:
    """Return whether a name is of a hidden or a system's file or folder: no image, no class."""
    return name.startswith(".") or name.lower() in JUNK


class Listing(NamedTuple):
    """The contents of a folder.

    Attributes:
      files: (name relative to the folder, size in bytes) of the images, in order. A dangling link
        has the size -1: an image that cannot be read.
      ignored: reason -> number of files and folders that are ignored.
    """

    files: list[tuple[str, int]]
    ignored: Counter[str]

    @property
    def dangling(self) -> list[str]:
        """Images that are dangling links."""
        return [name for name, size in self.files if size < 0]

    @property
    def is_empty(self) -> bool:
        return len(self.dangling) == len(self.files)

    def __str__(self) -> str:
        """Describe what there is besides images."""
        lost = Counter({DANGLING: len(self.dangling)} if self.dangling else {})
        return describe(self.ignored + lost)


class TopLevel(NamedTuple):
    """What is directly in a folder of class folders.

    Attributes:
      folders: names, in order.
      images: names of images outside of class folders.
      ignored: reason -> number of other entries.
    """

    folders: list[str]
    images: list[str]
    ignored: Counter[str]


def _scan(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(
        f"{printable(path)} cannot be read ({error.strerror}); ask for the permission to read it, "
        "or move it elsewhere"
    )


def _status(entry: os.DirEntry) -> os.stat_result | None:
    """Return the status of an entry or of its link's target; None for a dangling link."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink():
            return None
        raise _unreadable(entry.path, error) from None


def suffix_of(name: str) -> str:
    """Return the suffix of a file name, in lower case."""
    return os.path.splitext(name)[1].lower()


def top_level(folder: Path) -> TopLevel:
    """List what is directly in a folder.

    Raises:
      DataError: if it cannot be read, or a class is a dangling link.
    """
    folders, images = [], []
    ignored: Counter[str] = Counter()
    for entry in _scan(str(folder)):
        if is_junk(entry.name):
            ignored[HIDDEN] += 1
            continue
        status = _status(entry)
        if status is None and not suffix_of(entry.name):
            raise DataError(
                f"{printable(entry.path)} is a link that leads nowhere; mend or remove it"
            )
        if status is None:
            ignored[DANGLING] += 1
        elif stat.S_ISDIR(status.st_mode):
            folders.append(entry.name)
        elif suffix_of(entry.name) in SUFFIXES:
            images.append(entry.name)
        else:
            ignored[suffix_of(entry.name) or NO_SUFFIX] += 1
    return TopLevel(folders, images, ignored)


def list_images(folder: Path) -> Listing:
    """List the images in a class folder and all folders below it; links are followed.

    A folder that was entered before, or is a parent, is not entered again, so circular links end.

    Raises:
      DataError: if a folder cannot be read.
    """
    files: list[tuple[str, int]] = []
    ignored: Counter[str] = Counter()
    try:
        real = folder.resolve()
        above = [path.stat() for path in (real, *real.parents, *folder.absolute().parents)]
    except OSError as error:
        raise _unreadable(str(folder), error) from None
    met = {(status.st_dev, status.st_ino) for status in above}
    waiting = [(str(folder), "")]
    while waiting:
        path, prefix = waiting.pop()
        for entry in _scan(path):
            if is_junk(entry.name):
                ignored[HIDDEN] += 1
                continue
            status, suffix = _status(entry), suffix_of(entry.name)
            if status is None and suffix in SUFFIXES:
                files.append((prefix + entry.name, -1))
            elif status is None:
                ignored[DANGLING] += 1
            elif stat.S_ISDIR(status.st_mode):
                key = status.st_dev, status.st_ino
                if key in met:
                    ignored[AGAIN] += 1
                else:
                    met.add(key)
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
            elif not stat.S_ISREG(status.st_mode):  # a pipe would never end
                ignored[SPECIAL] += 1
            elif suffix in SUFFIXES:
                files.append((prefix + entry.name, status.st_size))
            else:
                ignored[suffix or NO_SUFFIX] += 1
    files.sort(key=lambda file: file[0].split("/"))  # as paths are ordered
    return Listing(files, ignored)


def _spelling(name: str) -> str:
    """Normalise a name: case, spaces at the ends and Unicode form do not count."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def list_classes(folder: Path, class_names: list[str]) -> list[Listing]:
    """List the images of every class; a class without a folder has none.

    Raises:
      DataError: if there are no images, a class folder holds none, or there is a folder of an
        unknown class.
    """
    top = top_level(folder)
    if odd := sorted(set(top.folders) - set(class_names)):
        spelt = {_spelling(name): name for name in class_names}
        same = [(name, spelt[_spelling(name)]) for name in odd if _spelling(name) in spelt]
        remedy = "remove them, or add their training images"
        if same:
            renames = ", ".join(f"{name!a} to {to!a}" for name, to in same[:5])
            remedy = f"names are compared letter by letter, so rename {renames}, or {remedy}"
        raise DataError(
            f"{printable(folder)} has classes that the training images lack: "
            f"{', '.join(map(printable, odd[:5]))}; {remedy}"
        )
    present = set(top.folders)
    # on a network file system threads list directories much faster
    with ThreadPoolExecutor(16) as pool:
        listings = list(
            pool.map(
                lambda name: (
                    list_images(folder / name) if name in present else Listing([], Counter())
                ),
                class_names,
            )
        )
    if all(listing.is_empty for listing in listings):
        ignored = sum((listing.ignored for listing in listings), top.ignored)
        raise DataError(
            f"{printable(folder)} holds no images: expected CLASS/NAME with one of "
            f"{', '.join(sorted(SUFFIXES))}"
            + (f"; ignored: {describe(ignored)}" if ignored else "")
        )
    empty = [
        f"'{printable(name)}' ({str(listing) or 'empty'})"
        for name, listing in zip(class_names, listings, strict=True)
        if name in present and listing.is_empty
    ]
    if empty:
        raise DataError(
            f"{printable(folder)} has class folders without images: {', '.join(empty[:5])}"
            + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            + f"; remove these folders, or add images ({', '.join(sorted(SUFFIXES))})"
        )
    return listings


ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet: NAME, CLASS and a box, by tabs
ANNOTATED = "images"  # the folder of these images, beside it


def list_annotated(folder: Path, class_names: list[str]) -> list[Listing]:
    """List the images of every class by Tiny-ImageNet's list; names are relative to ``folder``.

    Raises:
      DataError: if the list is damaged, or names an image or a class that does not exist.
    """
    path = folder / ANNOTATIONS
    sizes = dict(list_images(folder / ANNOTATED).files)
    by_class: dict[str, list[tuple[str, int]]] = {name: [] for name in class_names}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)} cannot be read ({error}); download it again") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        label = rest.split("\t")[0].strip()
        if label not in by_class or name not in sizes:
            what = f"image {name!r}" if label in by_class else f"class {label!r}"
            raise DataError(
                f"{printable(path)}, line {number}: there is no {what}; each line is NAME, a tab "
                f"and CLASS, of an image in {ANNOTATED}/ and a class of the training images"
            )
        by_class[label].append((f"{ANNOTATED}/{name}", sizes.pop(name)))
    if not any(by_class.values()):
        raise DataError(f"{printable(path)} names no images; download it again")
    listings = [Listing(sorted(by_class[name]), Counter()) for name in class_names]
    if sizes:
        listings[0].ignored["images without a class"] = len(sizes)
    return listings


def describe(ignored: Counter[str]) -> str:
    """Format reasons and their counts."""
    return ", ".join(f"{printable(reason)}: {count}" for reason, count in sorted(ignored.items()))


def class_folders(folder: Path) -> list[str]:
    """Return the names of the classes, in order; hidden and system folders are no classes."""
    return top_level(folder).folders


def named_files(
    class_names: list[str], listings: Iterable[Listing]
) -> tuple[list[str], np.ndarray]:
    """Return (CLASS/NAME, labels int [n]) of all images of listings; NAME only if CLASS is ""."""
    files, labels = [], []
    for label, (name, listing) in enumerate(zip(class_names, listings, strict=True)):
        files += [f"{name}/{file}" if name else file for file, _ in listing.files]
        labels += [label] * len(listing.files)
    return files, np.array(labels)
