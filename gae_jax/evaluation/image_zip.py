"""Arrays of images inside zip files (npz), batch by batch."""

import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import explained, npy_header, writing

ZIP = b"PK"  # how zip files begin
CHUNK = 256  # images that are copied at a time


def start_of(path: Path) -> bytes:
    """Read a file's first 8 bytes, which show its type.

    Raises:
      DataError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None


def reading(path: Path) -> AbstractContextManager:
    """Turn what zipfile, zlib and numpy raise for a damaged file into a DataError."""
    return explained(path, "copy or make it again")


def images_header(file: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Read (shape, dtype) of an npy member; the file is then at its first number."""
    shape, fortran, dtype = npy_header(file)
    if fortran and len(shape) > 1:
        raise DataError(
            f"{path}: {name} is in Fortran order, which cannot be read image by image; save "
            "np.ascontiguousarray of it"
        )
    return shape, dtype


def check_images(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, name: str = "the array"
) -> tuple[int, int, int, int]:
    """Return the shape; raise DataError unless it is that of uint8 [N, H, W, 3], N, H, W >= 1."""
    if dtype != np.uint8:
        raise DataError(
            f"{path}: {name} is {dtype}, not uint8; round to the levels 0 to 255 once, as the "
            "sampler does, and save uint8"
        )
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
        raise DataError(
            f"{path}: {name} has shape {list(shape)}, not [N, H, W, 3]; give RGB images with the "
            "channels last"
        )
    if not shape[0]:
        raise DataError(f"{path}: {name} holds no images; draw samples first")
    count, height, width, channels = shape
    return count, height, width, channels


@contextmanager
def new_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Write a zip atomically. One process writes a path.

    Its temporary name is fixed, so that a killed run leaves no more than one large file.
    """
    temporary = path.with_name(f".{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                with zipfile.ZipFile(file, "w") as archive:
                    yield archive
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Write an array as the member ``NAME.npy``."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def write_images(
    archive: zipfile.ZipFile,
    path: Path,
    batches: np.ndarray | Iterable[np.ndarray],
    count: int | None,
) -> None:
    """Write ``arr_0`` batch by batch.

    Args:
      batches: iterable of uint8 [n, H, W, 3], or one array or memory map of them all.
      count: how many images there must be; None for an iterable whose number is not known, which
        then goes through a scratch file.

    Raises:
      DataError: for other images, of several sizes or none, or not as many as ``count``.
    """
    if isinstance(batches, np.ndarray):
        check_images(path, batches.shape, batches.dtype, "the array to write")
        count = len(batches) if count is None else count
        batches = np.split(batches, range(CHUNK, len(batches), CHUNK))  # views: nothing is read
    if count is None:  # the header, which comes first, says how many there are
        with tempfile.TemporaryFile(dir=path.parent) as file:
            count = 0
            for batch in _checked(path, batches):
                count += len(batch)
                file.write(batch.tobytes())
            if not count:
                raise DataError(f"{path}: there are no images to write; give at least one")
            file.flush()
            images = np.memmap(file, np.uint8, "r", shape=(count, *batch.shape[1:]))
            write_images(archive, path, images, count)
        return
    written = 0
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
        for batch in _checked(path, batches):
            if not written:
                shape = (count, *batch.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            written += len(batch)
            if written > count:
                break
            file.write(batch.tobytes())
    if written != count:
        number = f"more than {count}" if written > count else written
        raise DataError(f"{path}: {number} images for {count} labels; give one label per image")


def _checked(path: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the batches that hold images, all of one size."""
    first = None
    for batch in batches:
        batch = np.asarray(batch)
        if not len(batch):
            continue
        check_images(path, batch.shape, batch.dtype, "a batch to write")
        first = first or batch.shape[1:]
        if batch.shape[1:] != first:
            raise DataError(
                f"{path}: a batch of {list(batch.shape[1:])} images after {list(first)}; all "
                "samples must be of one size"
            )
        yield batch
