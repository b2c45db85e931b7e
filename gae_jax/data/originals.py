"""What ``prepare-data`` reads: a tree of class folders, or the tars of ILSVRC 2012.

Whatever they come from, images are listed in the order of label and name, labels being the places
of the classes in the order of their names (of ImageNet: of their WordNet ids).
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gae_jax.data.imagenet import ValLabels, read_val_labels
from gae_jax.data.shards import Example
from gae_jax.data.sources.folder import SUFFIXES, class_folders, class_images
from gae_jax.data.tars import Member, read_members
from gae_jax.errors import DataError
from gae_jax.train.log import Progress

SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
TARS = {".tar", ".tgz", ".gz", ".tbz2", ".bz2", ".txz", ".xz", ".zst"}  # tars of single classes


class Originals(NamedTuple):
    """Images to be written.

    Attributes:
      splits: "train", and "val" where there is one.
    """

    class_names: list[str]
    splits: dict[str, list[Example]]


def from_tree(root: Path, val_labels: ValLabels | None, *, on_corrupt: str = "error") -> Originals:
    """Class folders in one of the forms of `split_folders`; ``val`` may be flat.

    Args:
      val_labels: of images that lie in ``val`` itself; None: tensorflow-datasets' list.
      on_corrupt: what flat validation images that are missing do: "error" or "skip".

    Raises:
      DataError: if there are no images, or classes do not agree.
    """
    folders = split_folders(root)
    class_names, splits = class_folders(folders["train"]), {}
    for split, folder in folders.items():
        flat = sorted(path for path in folder.iterdir() if _is_image(path))
        if split == "val" and flat:
            if mixed := class_folders(folder):
                raise DataError(
                    f"{folder} has images, such as {flat[0].name}, beside class folders, such as "
                    f"{mixed[0]}; move one kind elsewhere"
                )
            names = [path.name for path in flat]
            labels = val_labels or read_val_labels(None, None)
            classes = labels.of(names, on_missing=on_corrupt)
            rows = [(x, p.name, str(p)) for x, p in zip(classes, flat, strict=True)]
            rows = _sorted(class_names, rows, folders["train"], folder, labels.origin)
            splits[split] = with_sizes(split, rows)
            continue
        if flat:
            logging.warning(
                "prepare-data: %d images lie in %s itself, in no class, and are left aside, such "
                "as %s",
                *(len(flat), folder, flat[0].name),
            )
        paths, labels = class_images(folder, class_names)
        splits[split] = with_sizes(
            split,
            [
                Example(int(label), p.relative_to(folder / class_names[label]).as_posix(), str(p))
                for p, label in zip(paths, labels, strict=True)
            ],
        )
    return Originals(class_names, splits)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of "train" and, if there is one, of "val".

    ``train/`` and one of ``val/``, ``valid/`` and ``validation/``, in any case; the root itself
    where it has class folders alone. What lies beside the splits is named in the log.

    Raises:
      DataError: if there is no such folder, or it is not clear which is meant.
    """
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError as error:
        what = "no directory" if isinstance(error, FileNotFoundError | NotADirectoryError) else (
            f"not readable ({error.strerror})"
        )  # fmt: skip
        raise DataError(f"--source: {root} is {what}; give the folder of the images") from None
    splits, rest = {}, [path for path in folders if not path.name.startswith(".")]
    for split, names in SPLIT_FOLDERS.items():
        named = [path for path in rest if path.name.lower() in names]
        if len(named) > 1:
            raise DataError(
                f"{root} has {named[0].name}/ and {named[1].name}/; give a folder with one of them"
            )
        if named:
            splits[split] = named[0]
    if "train" in splits and "val" not in splits and not class_folders(splits["train"]):
        del splits["train"]  # a class that is called so
    if not splits:
        return {"train": root}
    if "train" not in splits:
        raise DataError(
            f"{root} has {splits['val'].name}/ but no train/; put the class folders of the "
            f"training images into {root / 'train'}"
        )
    if beside := [path.name for path in rest if path not in splits.values()]:
        logging.warning(
            "prepare-data: beside %s in %s there is %s, which is left aside",
            " and ".join(path.name for path in splits.values()),
            *(root, ", ".join(beside[:5]) + (", ..." if beside[5:] else "")),
        )
    return splits


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def with_sizes(split: str, examples: list[Example]) -> list[Example]:
    """The same with the sizes of their files; what cannot be reached keeps -1."""
    sized = []
    with Progress(f"listing {split}", len(examples), unit="image") as progress:
        for example in examples:
            try:
                sized.append(example._replace(size=Path(example.path).stat().st_size))
            except OSError:  # told when it is read
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
    """ILSVRC2012_img_train.tar, a tar of one tar per class, and ILSVRC2012_img_val.tar, a flat one.

    Only their headers are read here.

    Args:
      on_corrupt: what a member that is there twice, or a missing validation image, does: "error"
        or "skip".

    Raises:
      DataError: if a tar is damaged or cut off, or classes do not agree.
    """
    splits, class_names = {}, []
    if train:
        rows = list(_members_of_classes(train, on_corrupt))
        class_names = sorted({row[0] for row in rows})
        splits["train"] = _sorted(class_names, rows, train, train)
    if val:
        members = read_members(val, SUFFIXES, on_double=on_corrupt)
        names = [member.name for member in members]
        labels = val_labels or read_val_labels(None, None)
        classes = labels.of(names, on_missing=on_corrupt)
        if not train:
            class_names = sorted(set(classes))
        rows = [(name, *_row(val, x)) for name, x in zip(classes, members, strict=True)]
        splits["val"] = _sorted(class_names, rows, train, val, labels.origin)
    return Originals(class_names, splits)


def _row(path: Path, member: Member) -> tuple[str, str, int, int]:
    """(name, path, offset, size) of an `Example`."""
    return member.name, str(path), member.offset, member.size


def _sorted(
    class_names: Sequence[str],
    rows: Iterable[tuple],
    train: Path,
    where: Path,
    labels: str = "",
) -> list[Example]:
    """Examples of (class, name, ...), in order.

    Args:
      train: which images the classes are of, and ``where`` and ``labels`` the others: for errors.
    """
    label_of, rows = {name: label for label, name in enumerate(class_names)}, list(rows)
    if odd := sorted({row[0] for row in rows} - set(label_of)):
        raise DataError(
            f"{where}{f', by {labels},' if labels else ''} has validation images of classes that "
            f"the training images of {train} lack: {', '.join(odd[:5])}; give their training "
            "images, or the labels of these images with --val-labels=FILE"
        )
    return sorted(Example(label_of[row[0]], *row[1:]) for row in rows)


def _members_of_classes(path: Path, on_double: str) -> Iterable[tuple]:
    """(class, name, path, offset, size) of the images in a tar of tars."""
    classes = read_members(path, TARS, on_double=on_double)
    with Progress(f"listing {path.name}", len(classes), unit="class") as progress:
        for part in classes:
            for member in read_members(path, SUFFIXES, part=part, on_double=on_double):
                yield (Path(part.name).stem, *_row(path, member))
            progress.update()
