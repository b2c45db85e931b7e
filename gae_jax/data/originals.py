"""What ``prepare-data`` reads: a tree of class folders, or the tars of ILSVRC 2012.

Whatever they come from, images are listed in the order of label and name, labels being the places
of the classes in the order of their names (of ImageNet: of their WordNet ids).
"""

import io
import re
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from gae_jax.data.shards import Example
from gae_jax.data.sources.folder import SUFFIXES, class_folders, class_images
from gae_jax.errors import DataError
from gae_jax.train.log import Progress

DEVKIT_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
DEVKIT_CLASSES = "ILSVRC2012_devkit_t12/data/meta.mat"


class Originals(NamedTuple):
    """Images to be written.

    Attributes:
      splits: "train", and "val" where there is one.
    """

    class_names: list[str]
    splits: dict[str, list[Example]]


class ValLabels(NamedTuple):
    """Classes of the validation images, which lie in one flat folder or tar.

    Attributes:
      named: name of an image, without its suffix -> class; or
      ordered: classes in the order of the images' names.
    """

    named: Mapping[str, str] | None = None
    ordered: list[str] | None = None
    origin: str = ""

    def of(self, names: list[str]) -> list[str]:
        """The classes of these images.

        Raises:
          DataError: if the labels are of other images.
        """
        if self.ordered is not None:
            if len(self.ordered) != len(names):
                raise DataError(
                    f"{self.origin} has {len(self.ordered)} labels, there are {len(names)} "
                    "validation images; give a file with NAME CLASS in each line: --val-labels=FILE"
                )
            classes = dict(zip(sorted(names), self.ordered, strict=True))
        else:
            classes = {name: self.named.get(Path(name).stem) for name in names}
        if missing := [name for name in names if classes[name] is None]:
            raise DataError(
                f"{self.origin} has no class of {len(missing)} validation images, such as "
                f"{missing[0]}; each line is NAME CLASS"
            )
        return [classes[name] for name in names]


def read_val_labels(file: Path | None, devkit: Path | None) -> ValLabels:
    """The classes of ILSVRC 2012's validation images, from what the user has of these.

    Args:
      file: a text file with ``NAME CLASS`` in each line, by spaces or commas (what follows is not
        read), or, with ``devkit``, one ILSVRC2012_ID in each line, in the order of the names.
      devkit: ILSVRC2012_devkit_t12.tar.gz, whose meta.mat says which class an id is. Without
        ``file``, its own ground truth is used. Without both: the list that tensorflow-datasets
        comes with.

    Raises:
      DataError: if a file is not what it should be.
    """
    if devkit is None and file is None:
        from importlib.resources import files

        path = files("tensorflow_datasets") / "datasets/imagenet2012/validation_labels.txt"
        return ValLabels(ordered=path.read_text().split(), origin="tensorflow-datasets' own list")
    lines = [] if file is None else _lines(file)
    if devkit is None:
        pairs = [re.split(r"[\s,]+", line)[:2] for line in lines]
        if odd := next((line for line, pair in zip(lines, pairs, strict=True) if not pair[1:]), ""):
            raise DataError(
                f"{file}: the line {odd[:60]!r} is not NAME CLASS; a file of ILSVRC2012 ids needs "
                "--devkit=ILSVRC2012_devkit_t12.tar.gz"
            )
        return ValLabels(named={Path(name).stem: label for name, label in pairs}, origin=str(file))
    class_of, truth = _read_devkit(devkit)
    ids = lines or truth.split()
    unknown = (found for found in ids if not found.isdigit() or int(found) not in class_of)
    if odd := next(unknown, ""):
        raise DataError(
            f"{file or devkit}: {odd[:60]!r} is no id of an ILSVRC2012 class; with --devkit the "
            "file has one number in each line"
        )
    return ValLabels(ordered=[class_of[int(found)] for found in ids], origin=str(file or devkit))


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--val-labels: {file} cannot be read ({error})") from error


def _read_devkit(path: Path) -> tuple[dict[int, str], str]:
    """({ILSVRC2012_ID: WordNet id} of the classes, text of the ground truth)."""
    from scipy.io import loadmat

    try:
        with tarfile.open(path) as tar:
            classes = io.BytesIO(tar.extractfile(DEVKIT_CLASSES).read())
            truth = tar.extractfile(DEVKIT_TRUTH).read().decode()
        synsets = loadmat(classes, squeeze_me=True)["synsets"]
        # inner nodes of the hierarchy, ids above 1,000, have children
        found = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if not s["num_children"]}
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(
            f"--devkit: {path} cannot be read ({error}); give ILSVRC2012_devkit_t12.tar.gz as "
            "published"
        ) from error
    return found, truth


def from_tree(root: Path, val_labels: ValLabels | None) -> Originals:
    """``root/train/CLASS/*`` with ``root/val/CLASS/*`` or ``root/val/*``, or ``root/CLASS/*``.

    Args:
      val_labels: of images that lie in ``val`` itself; None: tensorflow-datasets' list.

    Raises:
      DataError: if there are no images, or classes do not agree.
    """
    if not root.is_dir():
        raise DataError(f"--source: {root} is no directory")
    folders = {"train": root / "train" if (root / "train").is_dir() else root}
    if folders["train"] != root and (root / "val").is_dir():
        folders["val"] = root / "val"
    class_names, splits = class_folders(folders["train"]), {}
    for split, folder in folders.items():
        flat = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if split == "val" and flat:
            labels = (val_labels or read_val_labels(None, None)).of([path.name for path in flat])
            rows = [(x, p.name, str(p)) for x, p in zip(labels, flat, strict=True)]
            splits[split] = _sorted(class_names, rows)
            continue
        paths, labels = class_images(folder, class_names)
        splits[split] = [
            Example(int(label), path.relative_to(folder / class_names[label]).as_posix(), str(path))
            for path, label in zip(paths, labels, strict=True)
        ]
    return Originals(class_names, splits)


def from_tars(train: Path | None, val: Path | None, val_labels: ValLabels | None) -> Originals:
    """ILSVRC2012_img_train.tar, a tar of one tar per class, and ILSVRC2012_img_val.tar, a flat one.

    Only their headers are read here.

    Raises:
      DataError: if a tar is damaged or cut off, or classes do not agree.
    """
    splits, found = {}, []
    if train:
        found = list(_members_of_classes(train))
        class_names = sorted({label for label, *_ in found})
        splits["train"] = _sorted(class_names, found)
    if val:
        members = _members(val)
        labels = (val_labels or read_val_labels(None, None)).of([name for name, *_ in members])
        if not train:
            class_names = sorted(set(labels))
        rows = [
            (label, name, str(val), offset, size)
            for label, (name, offset, size) in zip(labels, members, strict=True)
        ]
        splits["val"] = _sorted(class_names, rows)
    return Originals(class_names, splits)


def _sorted(class_names: list[str], rows: Iterable[tuple]) -> list[Example]:
    """Examples of (class, name, ...), in order."""
    label_of, rows = {name: label for label, name in enumerate(class_names)}, list(rows)
    if odd := sorted({row[0] for row in rows} - set(label_of)):
        raise DataError(
            f"the validation images have classes that the training images lack: "
            f"{', '.join(odd[:5])}"
        )
    return sorted(Example(label_of[row[0]], *row[1:]) for row in rows)


def _members_of_classes(path: Path) -> Iterable[tuple[str, str, str, int, int]]:
    """(class, name, path, offset, size) of the images in a tar of tars."""
    classes = _members(path, suffixes={".tar"})
    with Progress(f"listing {path.name}", len(classes), unit="class") as progress:
        for name, offset, size in classes:
            for image, inner, length in _members(path, offset, size):
                yield Path(name).stem, image, str(path), offset + inner, length
            progress.update()


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file, offset: int, size: int):
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._offset + self._at)
        content = self._file.read(min(len(buffer), max(self._size - self._at, 0)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _members(
    path: Path, offset: int = 0, size: int | None = None, *, suffixes: set[str] = SUFFIXES
) -> list[tuple[str, int, int]]:
    """(base name, offset of the content, size) of the files in a tar, or a part of a file that is.

    Raises:
      DataError: if it is damaged, cut off, or has no such files.
    """
    try:
        with path.open("rb") as file:
            part = _Part(file, offset, path.stat().st_size if size is None else size)
            with tarfile.open(fileobj=part, mode="r:") as tar:
                members = [member for member in tar if member.isfile()]
                # tarfile ends without a word at a damaged header, and where a file was cut off;
                # an archive ends with blocks of zeros
                part.seek(tar.offset)
                end = part.read(tarfile.BLOCKSIZE)
                if end != bytes(tarfile.BLOCKSIZE) and not (end == b"" and size is not None):
                    raise tarfile.ReadError(f"damaged or cut off at byte {offset + tar.offset}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read as a tar ({error}); fetch it again") from error
    found = [
        (Path(member.name).name, member.offset_data, member.size)
        for member in members
        if Path(member.name).suffix.lower() in suffixes
    ]
    if not found:
        raise DataError(f"{path} holds no files with one of {', '.join(sorted(suffixes))}")
    return found
