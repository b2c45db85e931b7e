"""Facts about ILSVRC 2012: classes of its validation images, numbers of images per class."""

import importlib.util
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gae_jax.runtime.errors import DataError, UserError, number_of

DEVKIT_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
DEVKIT_CLASSES = "data/meta.mat"
DEVKIT_BYTES = 1 << 26  # most bytes of a file in the devkit; the largest has 0.6 MB

TRAIN_IMAGES = 1_281_167
TRAIN_PER_CLASS = (732, 1300)  # fewest and most
VAL_PER_CLASS = 50

VAL_NAME = "ILSVRC2012_val_{:08}.JPEG"
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
_WNID = re.compile(r"n\d{8}")


class ValLabels(NamedTuple):
    """Classes of validation images in one flat folder or tar.

    Attributes:
      classes: {name of an image, without its suffix: class}, or the classes in the order of the
        images' names.
      origin: where the labels were read, for errors.
      train_counts: WordNet id -> number of training images, from the devkit; empty without it.
    """

    classes: Mapping[str, str] | Sequence[str]
    origin: str
    train_counts: Mapping[str, int] = {}

    def of(
        self,
        names: list[str],
        where: Path,
        *,
        on_missing: str = "error",
        class_names: Collection[str] = (),
    ) -> list[str]:
        """Return the classes of these images.

        Args:
          where: folder or tar of the images, for errors.
          on_missing: fewer images than labels: "error", or "skip", which takes the labels of the
            existing images by the numbers in ILSVRC2012's names.
          class_names: of the training images: only images of these must exist; empty: of all.

        Raises:
          DataError: if the labels belong to other images.
        """
        classes: Mapping[str, str]
        if isinstance(self.classes, Mapping):
            stems = {name: Path(name).stem for name in names}
            classes = {x: self.classes[stem] for x, stem in stems.items() if stem in self.classes}
        else:
            classes = self._by_order(self.classes, names, where, on_missing, class_names)
        if missing := [name for name in names if name not in classes]:
            raise DataError(
                f"{self.origin} has no class of {len(missing)} validation images in {where}, such "
                f"as {missing[0]}; each line is NAME CLASS"
            )
        return [classes[name] for name in names]

    def _by_order(
        self,
        ordered: Sequence[str],
        names: list[str],
        where: Path,
        on_missing: str,
        class_names: Collection[str],
    ) -> dict[str, str]:
        if len(ordered) == len(names):
            return dict(zip(sorted(names), ordered, strict=True))
        numbers = val_numbers(names)
        usable = numbers and max(numbers.values()) <= len(ordered)
        lost = []
        if usable:
            wanted = set(class_names) or set(ordered)
            lost = [
                name
                for name in missing_val(numbers, len(ordered))
                if ordered[val_numbers([name])[name] - 1] in wanted
            ]
            if on_missing == "skip" or not lost:
                return {name: ordered[number - 1] for name, number in numbers.items()}
        problem = (
            f"{self.origin} has {len(ordered)} labels, there are {len(names)} validation "
            f"images in {where}"
        )
        if usable:
            raise DataError(
                f"{problem}: {lost[0]} is missing"
                + (f", and {len(lost) - 1} more" if lost[1:] else "")
                + "; fetch the images again, or give a file with NAME CLASS in each line: "
                "--val-labels=FILE, or --on-corrupt=skip to continue without them"
            )
        raise DataError(f"{problem}; give a file with NAME CLASS in each line: --val-labels=FILE")


def listed_val_labels(class_names: Sequence[str], where: Path) -> ValLabels:
    """Read the list of tensorflow-datasets, for training images of these classes.

    Args:
      where: folder or tar of the validation images, for errors.

    Raises:
      DataError: if these are not ImageNet's classes.
    """
    if other := next((name for name in class_names if not _WNID.fullmatch(name)), ""):
        raise DataError(
            f"the images in {where} lie in no class folders, and their classes are not known: "
            f"the training images are not ImageNet's, with classes such as {other!r}; give a file "
            "with NAME CLASS in each line: --val-labels=FILE"
        )
    return read_val_labels(None, None)


def of_imagenet(class_names: Iterable[str]) -> set[str]:
    """Return those of the classes that belong to ILSVRC 2012, by their WordNet ids."""
    named = {name for name in class_names if _WNID.fullmatch(name)}
    return named & set(listed("labels.txt")) if named else set()


def val_numbers(names: Sequence[str]) -> dict[str, int]:
    """Return name -> number, if all have names of ILSVRC2012's validation images; else {}."""
    numbers = {}
    for name in names:
        if (match := _VAL_NUMBER.fullmatch(name)) is None:
            return {}
        if number := int(match[1]):
            numbers[name] = number
    return numbers


def missing_val(numbers: Mapping[str, int], count: int) -> list[str]:
    """Return the names of the missing ones among validation images 1 to ``count``."""
    present = set(numbers.values())
    return [VAL_NAME.format(number) for number in range(1, count + 1) if number not in present]


def read_val_labels(file: Path | None, devkit: Path | None) -> ValLabels:
    """Read the classes of ILSVRC 2012's validation images from what the user has.

    Args:
      file: a text file with ``NAME CLASS`` in each line, by spaces or commas (what follows is not
        read), or, with ``devkit``, one ILSVRC2012_ID in each line, in the order of the names.
      devkit: ILSVRC2012_devkit_t12.tar.gz, whose meta.mat says which class an id is. Without
        ``file``, its own ground truth is used. Without both: the list that tensorflow-datasets
        comes with.

    Raises:
      DataError: if a file is damaged or has another format.
    """
    lines = [] if file is None else _lines(file)
    if file is not None and not lines:
        raise DataError(f"--val-labels: {file} is empty; give NAME CLASS in each line")
    if devkit is None:
        if file is None:
            return ValLabels(listed("validation_labels.txt"), "tensorflow-datasets' own list")
        return ValLabels(_named(file, lines), str(file))
    class_of, counts, truth = _read_devkit(devkit)
    ids = lines or truth.split()
    unknown = (text for text in ids if not _is_number(text) or int(text) not in class_of)
    if odd := next(unknown, ""):
        raise DataError(
            f"{file or devkit}: {odd[:60]!r} is no id of an ILSVRC2012 class; with --devkit the "
            "file has one number in each line"
        )
    return ValLabels([class_of[int(text)] for text in ids], str(file or devkit), counts)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,9}", text))


def _named(file: Path, lines: list[str]) -> dict[str, str]:
    """Parse lines into name without suffix -> class."""
    named: dict[str, str] = {}
    for line in lines:
        name, *classes = re.split(r"[\s,]+", line)
        if not classes or not name:
            raise DataError(
                f"{file}: the line {line[:60]!r} is not NAME CLASS; a file of ILSVRC2012 ids needs "
                "--devkit=ILSVRC2012_devkit_t12.tar.gz"
            )
        if named.setdefault(Path(name).stem, classes[0]) != classes[0]:
            raise DataError(f"{file} gives {name[:60]} more than one class; keep one of its lines")
    return named


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--val-labels: {file} cannot be read ({error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_devkit(path: Path) -> tuple[dict[int, str], dict[str, int], str]:
    """Read the devkit.

    Returns:
      (ILSVRC2012_ID -> WordNet id, WordNet id -> training images, text of the ground truth).
    """
    try:
        with tarfile.open(path) as tar:
            content = {}
            for end in (DEVKIT_CLASSES, DEVKIT_TRUTH):
                members = [m for m in tar.getmembers() if m.isreg() and m.name.endswith(end)]
                file = tar.extractfile(members[0]) if members else None
                if file is None or members[0].size > DEVKIT_BYTES:
                    raise DataError(f"it holds no {end}")
                content[end] = file.read()
        # inner nodes of the hierarchy, ids above 1,000, have children
        leaves = [row for row in _synsets(content[DEVKIT_CLASSES]) if not row[2]]
        class_of = {number: wnid for number, wnid, _, _ in leaves}
        counts = {wnid: images for _, wnid, _, images in leaves}
        if odd := next((wnid for wnid in counts if not _WNID.fullmatch(wnid)), ""):
            raise ValueError(f"{odd[:20]!r} is no WordNet id")
        return class_of, counts, content[DEVKIT_TRUTH].decode("ascii")
    except Exception as error:  # on damage tarfile, zlib and scipy raise anything
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"--devkit: {path} cannot be read ({reason}); give ILSVRC2012_devkit_t12.tar.gz as "
            "published"
        ) from error


# Runs in another process: on some damaged files scipy's reader crashes without an exception.
_READ_SYNSETS = """
import io, json, sys
from scipy.io import loadmat
synsets = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"]
print(json.dumps([
    [int(s["ILSVRC2012_ID"]), str(s["WNID"]), int(s["num_children"]), int(s["num_train_images"])]
    for s in synsets.reshape(-1)
]))
"""


def _synsets(mat: bytes) -> list[tuple[int, str, int, int]]:
    """Read (ILSVRC2012_ID, WordNet id, number of children, training images) from meta.mat.

    Raises:
      ValueError: if it is damaged.
    """
    command = [sys.executable, "-c", _READ_SYNSETS]
    done = subprocess.run(command, input=mat, capture_output=True, timeout=300)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"its {DEVKIT_CLASSES} is damaged: {''.join(last)}")
    return [tuple(row) for row in json.loads(done.stdout)]


@cache
def listed(name: str) -> tuple[str, ...]:
    """Read the words of a list of ILSVRC 2012 in tensorflow-datasets, without importing it.

    Args:
      name: "labels.txt": the synsets of the 1,000 classes (n01440764, ...), in label order;
        "validation_labels.txt": those of the validation images, in the order of their names.

    Raises:
      UserError: if the package is not installed.
    """
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "ImageNet's classes are listed in tensorflow_datasets, which is not installed; run: "
            "pip install tensorflow-datasets"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    return tuple((folder / "datasets/imagenet2012" / name).read_text().split())


def compare_counts(
    class_names: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    train_counts: Mapping[str, int] = {},
) -> list[str]:
    """Say in sentences how counts differ from ILSVRC 2012's; a subset of it is legitimate.

    Args:
      counts: split -> number of images of each class.
      train_counts: WordNet id -> exact number of training images; without it only their range is
        known.

    Returns:
      [] if the classes are not ImageNet's, or all numbers agree.
    """
    if not class_names or not all(map(_WNID.fullmatch, class_names)):
        return []
    known = set(listed("labels.txt"))
    if not set(class_names) <= known:
        other = next(name for name in class_names if name not in known)
        return [f"{other} is a WordNet id, but no class of ILSVRC 2012"]
    sentences = []
    if lost := sorted(known - set(class_names)):
        sentences.append(
            f"{len(class_names)} of ILSVRC 2012's 1000 classes{_some(lost, 'without')}"
        )
    if "train" in counts:
        sentences += _differing_train(
            dict(zip(class_names, counts["train"], strict=True)), train_counts
        )
    if "val" in counts:
        val = dict(zip(class_names, counts["val"], strict=True))
        odd = [f"{name} {n}" for name, n in val.items() if n != VAL_PER_CLASS]
        if odd:
            sentences.append(
                f"val: {sum(val.values())} images; {_classes(odd)} other than "
                f"{VAL_PER_CLASS}{_some(odd, 'as')}"
            )
    return sentences


def _differing_train(train: Mapping[str, int], exact: Mapping[str, int]) -> list[str]:
    fewest, most = TRAIN_PER_CLASS
    if exact:
        odd = [f"{k} {n} of {exact[k]}" for k, n in train.items() if exact.get(k, n) != n]
        what = "another number than the devkit says"
    else:
        odd = [f"{name} {n}" for name, n in train.items() if not fewest <= n <= most]
        what = f"fewer than {fewest} or more than {most}"
    total = sum(train.values())
    if odd:
        return [f"train: {total} images; {_classes(odd)} {what}{_some(odd, 'as')}"]
    if not exact and len(train) == 1000 and total != TRAIN_IMAGES:
        return [f"train: {total} images, ILSVRC 2012 has {TRAIN_IMAGES}; --devkit tells the class"]
    return []


def _classes(odd: Sequence[str]) -> str:
    return f"{number_of(len(odd), 'class', 'classes')} {'has' if len(odd) == 1 else 'have'}"


def _some(names: Sequence[str], word: str) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f", {word} {', '.join(names[:5])}{rest}"


def count_by_class(labels: Sequence[int], classes: int) -> list[int]:
    """Count each label from 0 to ``classes`` - 1."""
    counts = Counter(labels)
    return [counts[label] for label in range(classes)]
