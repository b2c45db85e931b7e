"""The input of ``prepare-data``: a tree of class folders, or the tars of ILSVRC 2012.

Images are listed in the order of label and name. Labels number the classes in the order of their
names (for ImageNet: of their WordNet ids).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gae_jax.data.contents import printable
from gae_jax.data.imagenet import ValLabels, listed_val_labels, of_imagenet
from gae_jax.data.shards import Example
from gae_jax.data.sources.folder import split_folders
from gae_jax.data.sources.listing import (
    LOOSE,
    SUFFIXES,
    class_folders,
    describe,
    list_classes,
    top_level,
)
from gae_jax.data.tars import Member, read_members
from gae_jax.runtime.errors import DataError, number_of
from gae_jax.runtime.progress import Progress

TARS = {".tar", ".tgz", ".gz", ".tbz2", ".bz2", ".txz", ".xz", ".zst"}  # tars of single classes


class Originals(NamedTuple):
    """Images to be written to shards.

    Attributes:
      splits: "train" and, if there is one, "val" -> images.
    """

    class_names: list[str]
    splits: dict[str, list[Example]]


def from_tree(root: Path, val_labels: ValLabels | None, *, on_corrupt: str = "error") -> Originals:
    """List class folders in one of the forms of `split_folders`; ``val`` may be flat.

    Other files and folders are named in the log.

    Args:
      val_labels: classes of flat validation images; None: tensorflow-datasets' list.
      on_corrupt: missing flat validation images: "error" or "skip".

    Raises:
      DataError: if there are no images, or the splits have different classes.
    """
    if not root.is_dir():
        raise DataError(f"--source: {root} is no directory; give the folder of the images")
    folders = split_folders(root) or {"train": root}
    if folders["train"] != root:
        _say_what_is_beside(root, folders)
    names, splits = class_folders(folders["train"]), {}
    class_names = [printable(name) for name in names]
    for split, folder in folders.items():
        top = top_level(folder)
        if split == "val" and top.images:
            splits[split] = _flat(folder, class_names, folders["train"], val_labels, on_corrupt)
            continue
        listings = list_classes(folder, names)
        ignored = sum((listing.ignored for listing in listings), Counter(top.ignored))
        ignored += Counter({LOOSE: len(top.images)})
        if ignored:
            logging.warning("prepare-data: %s: left aside: %s", folder, describe(ignored))
        splits[split] = [
            Example(label, file, str(folder / name / file), size=size)
            for label, (name, listing) in enumerate(zip(names, listings, strict=True))
            for file, size in listing.files
        ]
    return Originals(class_names, splits)


def _flat(
    folder: Path,
    class_names: list[str],
    train: Path,
    val_labels: ValLabels | None,
    on_corrupt: str,
) -> list[Example]:
    """List validation images that are not in class folders."""
    top = top_level(folder)
    if top.folders:
        raise DataError(
            f"{folder} has images, such as {top.images[0]}, beside class folders, such as "
            f"{top.folders[0]}; move one kind elsewhere"
        )
    labels = val_labels or listed_val_labels(class_names, folder)
    classes = labels.of(top.images, folder, on_missing=on_corrupt, class_names=class_names)
    rows = [(x, name, str(folder / name)) for x, name in zip(classes, top.images, strict=True)]
    return with_sizes("val", _sorted(class_names, rows, train, folder, labels.origin))


def _say_what_is_beside(root: Path, folders: dict[str, Path]) -> None:
    names = [path.name for path in folders.values()]
    if beside := [name for name in top_level(root).folders if name not in names]:
        logging.warning(
            "prepare-data: beside %s in %s there is %s, which is left aside",
            *(" and ".join(names), root, ", ".join(beside[:5]) + (", ..." if beside[5:] else "")),
        )


def with_sizes(split: str, examples: list[Example]) -> list[Example]:
    """Add the sizes of the files; those that cannot be reached keep -1."""
    sized = []
    with Progress(f"listing {split}", len(examples), unit="image") as progress:
        for example in examples:
            try:
                sized.append(example._replace(size=Path(example.path).stat().st_size))
            except OSError:  # reported when the file is read
                sized.append(example)
            progress.update()
    return sized


def from_tars(
    train: Path | None,
    val: Path | None,
    val_labels: ValLabels | None,
    *,
    on_corrupt: str = "error",
) -> Originals:
    """List the tars of ILSVRC 2012: training images in a tar of one tar per class, a flat val tar.

    Only their headers are read here.

    Args:
      on_corrupt: duplicate members and missing validation images: "error" or "skip".

    Raises:
      DataError: if a tar is damaged or truncated, or the splits have different classes.
    """
    splits, class_names = {}, []
    if train:
        rows = list(_members_of_classes(train, on_corrupt))
        class_names = sorted({row[0] for row in rows})
        splits["train"] = _sorted(class_names, rows, train, train)
    if val:
        members = read_members(val, SUFFIXES, on_double=on_corrupt)
        names = [member.name for member in members]
        labels = val_labels or listed_val_labels(class_names, val)
        classes = labels.of(names, val, on_missing=on_corrupt, class_names=class_names)
        if not train:
            class_names = sorted(set(classes))
        rows = [(name, *_row(val, x)) for name, x in zip(classes, members, strict=True)]
        splits["val"] = _sorted(class_names, rows, train, val, labels.origin)
    return Originals(class_names, splits)


def _row(path: Path, member: Member) -> tuple[str, str, int, int]:
    """Return (name, path, offset, size) of an `Example`."""
    return member.name, str(path), member.offset, member.size


def _sorted(
    class_names: Sequence[str],
    rows: Iterable[tuple],
    train: Path | None,
    where: Path,
    labels: str = "",
) -> list[Example]:
    """Make sorted examples of rows (class, name, ...).

    Args:
      train: the training images, for errors; None if the classes are those of the rows.
      where, labels: the images of the rows, and the origin of their labels, for errors.
    """
    label_of, rows = {name: label for label, name in enumerate(class_names)}, list(rows)
    if labels and (known := of_imagenet({row[0] for row in rows} | set(class_names))) >= set(
        class_names
    ):  # some of ImageNet's classes
        without_training = [row for row in rows if row[0] in known and row[0] not in label_of]
        if without_training and len(without_training) < len(rows):
            logging.warning(
                "prepare-data: %s: left aside: %s of classes without training images, such as %s",
                *(
                    where,
                    number_of(len(without_training), "validation image"),
                    without_training[0][0],
                ),
            )
            rows = [row for row in rows if row[0] in label_of or row[0] not in known]
    if odd := sorted({row[0] for row in rows} - set(label_of)):
        raise DataError(
            f"{where}{f', by {labels},' if labels else ''} has validation images of classes that "
            f"the training images of {train} lack: {', '.join(odd[:5])}; give their training "
            "images, or remove these images, or give other labels with --val-labels=FILE"
        )
    return sorted(Example(label_of[row[0]], *row[1:]) for row in rows)


def _members_of_classes(path: Path, on_double: str) -> Iterable[tuple]:
    """Yield (class, name, path, offset, size) of the images in a tar of tars."""
    classes = read_members(path, TARS, on_double=on_double)
    with Progress(f"listing {path.name}", len(classes), unit="class") as progress:
        for part in classes:
            for member in read_members(path, SUFFIXES, part=part, on_double=on_double):
                yield (Path(part.name).stem, *_row(path, member))
            progress.update()
