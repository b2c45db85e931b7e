"""Files of a set of samples: its parts, the archive made of them, and a picture."""

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
from einops import rearrange

from gae_jax.evaluation.archives import write_samples
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import (
    explained,
    new_memmap,
    read_npz,
    read_object,
    write_json,
    write_png,
)

REMOVE = "remove it and run the same command again"  # of a part of a set
DRAWN_AGAIN = "draw the set again with: sample --fresh"


def finished_parts(folder: Path, labels: np.ndarray, size: int) -> dict[str, int]:
    """Return {number of the first image of every finished part: its network calls}.

    Raises:
      DataError: for a part that was drawn for other labels.
    """
    calls = {}
    for first in range(0, len(labels), size):
        ids = range(first, min(first + size, len(labels)))
        path = part_of(folder, ids)
        if not path.exists():
            continue
        part = read_npz(path, "labels", "calls", remedy=REMOVE)
        if not np.array_equal(part["labels"], labels[ids.start : ids.stop]):
            raise DataError(
                f"{path} was drawn for other labels than this run's (sample.labels_file "
                "has changed?); make it again with --fresh"
            )
        with explained(path, REMOVE):
            calls[str(first)] = int(part["calls"])
    return calls


def _images_of(path: Path) -> np.ndarray:
    """Load uint8 [n, H, W, 3] of a part."""
    images = read_npz(path, "images", remedy=REMOVE)["images"]
    if images.ndim != 4 or images.dtype != np.uint8:
        raise DataError(f"{path} holds {images.dtype} {list(images.shape)}, no images; {REMOVE}")
    return images


def part_of(folder: Path, ids: range) -> Path:
    """Return the file of the part with these images."""
    return folder / "parts" / f"{ids.start:08d}-{ids.stop - 1:08d}.npz"


def assemble(folder: Path, labels: np.ndarray, *, png: bool) -> np.ndarray:
    """Write ``samples.npz`` in the ADM evaluator's format, from the parts.

    Args:
      png: also writes ``png/ID_LABEL.png``.

    Returns:
      The images, as a memory map of what could be more than the memory holds.
    """
    parts = sorted((folder / "parts").glob("*.npz"))
    shape = (len(labels), *_images_of(parts[0]).shape[1:])
    raw = folder / ".images.npy"
    images = new_memmap(raw, np.dtype(np.uint8), shape)
    for path in parts:
        start = int(path.stem.split("-")[0])
        with explained(path, REMOVE):
            part = _images_of(path)
            images[start : start + len(part)] = part
    images.flush()
    if png:
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            write_png(folder / "png" / f"{index:06d}_{label:04d}.png", pixels)
    write_samples(folder / "samples.npz", images, labels)
    return images


def finish_set(folder: Path, labels: np.ndarray, facts: dict, *, png: bool) -> None:
    """Write the files of a set from its parts; the manifest comes last and makes it valid."""
    images = assemble(folder, labels, png=png)
    write_png(folder / "grid.png", class_grid(images, labels, *GRID))
    write_json(folder / "manifest.json", facts)


def clear_parts(folder: Path) -> None:
    """Remove the parts that `assemble` read and its scratch file, if they exist."""
    (folder / ".images.npy").unlink(missing_ok=True)
    shutil.rmtree(folder / "parts", ignore_errors=True)


def digest(paths: list[Path]) -> str:
    """Hash the contents of files, as short as the fingerprints of weights."""
    contents = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            contents.update(hashlib.file_digest(file, "sha256").digest())
    return contents.hexdigest()[:16]


def load_set(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Load one set of samples of a folder: (images uint8, labels, manifest)."""
    files = read_npz(folder / name / "samples.npz", "arr_0", "arr_1", remedy=DRAWN_AGAIN)
    manifest = read_object(folder / name / "manifest.json", remedy=DRAWN_AGAIN)
    return files["arr_0"], files["arr_1"], manifest


GRID = (8, 10)  # rows and columns at most


def shown_classes(labels: np.ndarray, columns: int = GRID[1]) -> np.ndarray:
    """Return the classes that a grid shows, ascending; of too many, evenly spaced ones."""
    classes = np.unique(labels)
    if len(classes) <= columns:
        return classes
    return classes[np.linspace(0, len(classes) - 1, columns).round().astype(int)]


def class_grid(
    images: np.ndarray, labels: np.ndarray, rows: int, columns: int = GRID[1], gap: int = 2
) -> np.ndarray:
    """Draw one column for each of `shown_classes`, with white lines; no more rows than each has.

    The images of a single class, ``rows`` at most, form a square.
    """
    shown = [np.flatnonzero(labels == label)[:rows] for label in shown_classes(labels, columns)]
    rows = min(map(len, shown))
    panels = np.stack([images[indices[:rows]] for indices in shown])
    if len(shown) == 1:
        edge = math.ceil(math.sqrt(rows))
        full = edge * math.ceil(rows / edge)
        padding = ((0, 0), (0, full - rows), (0, 0), (0, 0), (0, 0))
        panels = np.pad(panels, padding, constant_values=255)
        panels = rearrange(panels, "1 (rows classes) h w c -> classes rows h w c", classes=edge)
    padded = np.pad(panels, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    grid = rearrange(padded, "classes rows h w c -> (rows h) (classes w) c")
    return grid[:-gap, :-gap]
