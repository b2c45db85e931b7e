"""The contents of a source, independent of its path: classes, counts, digests; comparing two."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np

from gae_jax.runtime.errors import number_of

SHOWN = 5  # classes, or images of a class, that a difference names


def printable(name: str | os.PathLike) -> str:
    """Return a file name as valid Unicode: bytes that are not UTF-8 become ``\\xe9`` etc."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def digest_of(*parts: str) -> str:
    """Hash texts, which may hold file names that are not UTF-8, to 16 hex digits."""
    text = "\n".join(parts)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class ClassContents:
    """The images of one class.

    Attributes:
      count: number of images; None if the source does not know it.
      digest: of names and sizes of the images, without the name of the class; "" if unknown.
      images: "SIZE NAME" of every image, joined by NUL; "" if unknown.
    """

    name: str
    count: int | None = None
    digest: str = ""
    images: str = ""

    @classmethod
    def of_files(cls, name: str, files: Iterable[tuple[str, int]]) -> "ClassContents":
        """Make it of files in order: (name relative to the class, size in bytes)."""
        rows = [f"{size} {file}" for file, size in files]
        images = "\0".join(rows)
        return cls(name, len(rows), digest_of(images), images)

    def sizes(self) -> dict[str, str]:
        """Return name of an image -> its size."""
        rows = (row.split(" ", 1) for row in self.images.split("\0") if row)
        return {name: size for size, name in rows}


@dataclasses.dataclass(frozen=True)
class Contents:
    """The images of a source before a share is held out.

    Pixels are not read: an image replaced by another of the same name and size goes unnoticed.

    Attributes:
      count: number of all images.
      digest: of everything that identifies them.
    """

    classes: tuple[ClassContents, ...]
    count: int
    digest: str

    @classmethod
    def of(
        cls, classes: Sequence[ClassContents], *, count: int | None = None, facts: str = ""
    ) -> "Contents":
        """Make contents with their digest.

        Args:
          count: number of all images, if the classes do not have it.
          facts: what identifies the images besides names, counts and digests of the classes.
        """
        total = sum(part.count or 0 for part in classes) if count is None else count
        rows = [f"{part.name}\0{part.count}\0{part.digest}" for part in classes]
        return cls(tuple(classes), total, digest_of(facts, str(total), *rows))

    @property
    def class_names(self) -> list[str]:
        return [part.name for part in self.classes]

    def to_json(self) -> dict:
        """Return a JSON value, without the names of the images."""
        rows = [{"name": p.name, "count": p.count, "digest": p.digest} for p in self.classes]
        return {"images": self.count, "digest": self.digest, "classes": rows}

    @classmethod
    def from_json(cls, value: dict, images: dict[str, str]) -> "Contents":
        """Invert `to_json`; ``images``: name of a class -> its `ClassContents.images`."""
        classes = [
            ClassContents(images=images.get(row["name"], ""), **row) for row in value["classes"]
        ]
        return cls(tuple(classes), value["images"], value["digest"])


@dataclasses.dataclass(frozen=True)
class Differences:
    """How contents changed.

    Attributes:
      classes: sentences on classes that were added, removed, renamed or reordered.
      images: sentences on images of classes that both contents have.
      replaced: number of images with the same name and another size.
      names: whether images were added or removed.
    """

    classes: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    replaced: int = 0
    names: bool = False

    def __bool__(self) -> bool:
        return bool(self.classes or self.images)

    def __str__(self) -> str:
        return "; ".join([*self.classes, *self.images])


def counted(labels: np.ndarray, class_names: Sequence[str]) -> list[ClassContents]:
    """Make contents of classes from labels, int [n], where no more is known."""
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    return [ClassContents(name, count) for name, count in zip(class_names, counts, strict=True)]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _quoted(names: Sequence[str]) -> str:
    return ("class " if len(names) == 1 else "classes ") + _listed([f"'{n}'" for n in names])


def differences(old: Contents, new: Contents) -> Differences:
    """Describe what changed from ``old`` to ``new``."""
    if old.digest == new.digest:
        return Differences()
    before, after = ({part.name: part for part in c.classes} for c in (old, new))
    removed = [name for name in before if name not in after]
    added = [name for name in after if name not in before]
    renamed: dict[str, str] = {}
    for name in removed:
        same = [a for a in added if after[a].digest and after[a].digest == before[name].digest]
        if same and same[0] not in renamed.values():
            renamed[name] = same[0]
    classes = [f"class '{name}' was renamed to '{new}'" for name, new in renamed.items()]
    if len(classes) > SHOWN:
        classes = [*classes[:SHOWN], f"{len(classes) - SHOWN} more classes were renamed"]
    if gone := [name for name in removed if name not in renamed]:
        classes.append(f"{_quoted(gone)} {'was' if len(gone) == 1 else 'were'} removed")
    if new_names := [name for name in added if name not in renamed.values()]:
        classes.append(f"{_quoted(new_names)} {'was' if len(new_names) == 1 else 'were'} added")
    if not classes and old.class_names != new.class_names:
        classes.append(
            f"the classes are in another order: {_listed(old.class_names)} before, "
            f"{_listed(new.class_names)} now"
        )
    images, replaced, names = [], 0, False
    common = [(before[name], after[name]) for name in before if name in after]
    changed = [pair for pair in common if pair[0] != pair[1] and not _same(*pair)]
    for was, now in changed:
        said, other, moved = _changes(was, now)
        replaced, names = replaced + other, names or moved
        images.append(said)
    if len(images) > SHOWN:
        images = [*images[:SHOWN], f"the images of {len(images) - SHOWN} more classes changed"]
    if not classes and not images:
        said = f"{old.count} images (digest {old.digest}) before, {new.count} ({new.digest}) now"
        images, names = [said], True
    return Differences(tuple(classes), tuple(images), replaced, names)


def _same(was: ClassContents, now: ClassContents) -> bool:
    return (was.count, was.digest) == (now.count, now.digest)


def _changes(was: ClassContents, now: ClassContents) -> tuple[str, int, bool]:
    """Describe the changes of one class.

    Returns:
      (sentence, number of replaced images, whether images were added or removed).
    """
    if not (was.images and now.images):
        if now.count is None:
            return f"'{was.name}' has images whose number is not known", 0, True
        has = number_of(now.count, "image")
        if was.count is not None:
            has += f", not {was.count} as before"
        return f"'{was.name}' has {has}", 0, True
    old, new = was.sizes(), now.sizes()
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    other = [name for name in new if name in old and new[name] != old[name]]
    sentences = [
        f"{len(names)} {'image' if len(names) == 1 else 'images'} {what} ({_listed(names)})"
        for names, what in ((added, "more"), (removed, "fewer"), (other, "of another size"))
        if names
    ]
    return f"'{was.name}' has {' and '.join(sentences)}", len(other), bool(added or removed)
