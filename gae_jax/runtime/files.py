"""Files that are written whole or not at all, by one process, and told of where they are damaged.

Of several processes that run one program (`distributed`) the first writes what all of them have;
for the others these functions do nothing, unless they are told that each has a file of its own.
"""

import contextlib
import errno
import io
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from gae_jax.runtime.distributed import is_first
from gae_jax.runtime.errors import DataError, UserError, WriteError, refusal


def write_bytes(path: Path, content: bytes, *, own: bool = False) -> None:
    """Writes a file whole or not at all, also when the process is killed or the disk is full.

    Args:
      own: the file is this process's own; else the first process alone writes.
    """
    if not (own or is_first()):
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp makes files that only their owner may read
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


# /proc, a mount that is gone, a circle of links, a device: of what is read it may mean else
_NO_PLACE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.ENOSYS)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, what the file system refuses becomes a WriteError that names ``path``.

    Raises:
      WriteError: for a full disk, a read-only folder and their like.
    """
    try:
        yield
    except OSError as error:
        text = refusal(OSError(error.errno, error.strerror), path)
        if text is None and error.errno in _NO_PLACE:
            text = (
                f"{path}: {os.strerror(error.errno)}; nothing can be written there: choose another "
                "folder, or mount it again"
            )
        if text is None:
            raise
        raise WriteError(text) from error


def new_memmap(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """An ``.npy`` file to be filled, whose room on the disk is taken at once.

    Without that, a disk that is full when a page is written ends the process with SIGBUS.
    """
    with writing(path):
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array


def check_writable(folder: Path) -> None:
    """Tries to write a file in a folder, which is made, before work that ends in one.

    Raises:
      WriteError: if the file system refuses.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable."):
            pass


def write_npy(path: Path, array: np.ndarray, *, own: bool = False) -> None:
    """`write_bytes` of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getvalue(), own=own)


class NpyFile:
    """An ``.npy`` file that grows along its first axis, and is there once `finish` has returned.

    Args:
      dtype, shape: of what is appended, without the first axis.

    Raises:
      WriteError: here, in `append` and in `finish`, for a full disk and its like.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]):
        self.dtype, self._path, self._shape, self._count = np.dtype(dtype), path, shape, 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, self._name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            self._file = os.fdopen(handle, "wb")
            self._file.write(self._header())

    def _header(self) -> bytes:
        """Of the rows so far; numpy pads it, so that its length is the same for any number."""
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        shape = (self._count, *self._shape)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue()

    def append(self, rows: np.ndarray) -> None:
        """``rows`` [n, *shape]."""
        with writing(self._path):
            self._file.write(np.ascontiguousarray(rows, self.dtype).data)
        self._count += len(rows)

    def finish(self) -> None:
        """Give the file its name."""
        with writing(self._path):
            self._file.seek(0)
            self._file.write(self._header())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.chmod(self._name, 0o644)  # mkstemp makes files that only their owner may read
            os.replace(self._name, self._path)

    def discard(self) -> None:
        """Remove the file unless it was finished."""
        with contextlib.suppress(OSError):  # of a full disk: its buffer cannot be written
            self._file.close()
        Path(self._name).unlink(missing_ok=True)


def write_npz(path: Path, *, own: bool = False, **arrays: np.ndarray) -> None:
    """`write_bytes` of named arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue(), own=own)


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def write_png(path: Path, pixels: np.ndarray) -> None:
    """`write_bytes` of uint8 pixels [H, W, 3]."""
    write_bytes(path, png(pixels))


# How JSON, which has no such numbers, writes them here; `read_figures` turns them back.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_json(path: Path, value: Any, *, own: bool = False) -> None:
    """`write_bytes` of a JSON value that every reader takes.

    A NaN or an infinity, such as the PSNR of equal images, becomes its name in `NON_FINITE`.
    """
    write_bytes(path, (json_text(value) + "\n").encode(), own=own)


def json_text(value: Any) -> str:
    """A JSON value as `write_json` writes it."""
    return json.dumps(_named(value), indent=2, allow_nan=False)


def _named(value: Any) -> Any:
    """The value with names in the place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def write_figures(path: Path, value: Any) -> None:
    """`write_json` of figures that took long: where that fails, they are printed.

    Raises:
      WriteError: if the file system refuses.
    """
    try:
        write_json(path, value)
    except (OSError, WriteError) as error:
        print(json_text(value), flush=True)
        raise WriteError(
            f"{error}\nwhat {path} would hold is printed above; it can be saved under that name"
        ) from None


REMADE = "remove its folder and rerun"  # the remedy for what a stage wrote


@contextlib.contextmanager
def explained(path: Path, remedy: str) -> Iterator[None]:
    """Whatever is raised while a damaged file is read becomes a DataError that names it.

    Args:
      remedy: what to do about it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise whatever they meet in damaged content
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = (reason.splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is truncated or damaged ({reason}); {remedy}") from error


def read_json(path: Path, *, remedy: str = REMADE) -> Any:
    """
    Args:
      remedy: of a file that is damaged.

    Raises:
      UserError: if it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError, too
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None


def read_figures(path: Path, *, remedy: str = REMADE) -> Any:
    """`read_json` of figures: names of `NON_FINITE` are numbers again.

    Files of older versions have them as bare words, which Python reads too.
    """

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restored(item) for key, item in value.items()}
        if isinstance(value, list):
            return [restored(item) for item in value]
        return NON_FINITE.get(value, value) if isinstance(value, str) else value

    return restored(read_json(path, remedy=remedy))


class Record(dict):
    """A JSON object of a file, which names the file where a key is missing."""

    def __init__(self, value: dict, path: Path, remedy: str):
        super().__init__(value)
        self._path, self._remedy = path, remedy

    def __missing__(self, key: str):
        raise DataError(f"{self._path} is damaged: it has no {key}; {self._remedy}")


def read_object(path: Path, *, remedy: str = REMADE, **kinds: type | tuple[type, ...]) -> Record:
    """A JSON object that has at least these keys.

    Args:
      kinds: key -> type or types of its value.

    Raises:
      UserError: as `read_json`, or naming the key that is missing or of another type.
    """
    content = read_json(path, remedy=remedy)
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds a {type(content).__name__}; {remedy}")
    for key, kind in kinds.items():
        is_bool = isinstance(content.get(key), bool)  # an int to Python, and no count
        if not isinstance(content.get(key), kind) or (is_bool and kind is not bool):
            value = repr(content.get(key, "missing"))[:60]
            raise DataError(f"{path} is damaged: {key} is {value}; {remedy}")
    return Record(content, path, remedy)


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, dtype) of an npy file, which is then at its numbers.

    Raises:
      ValueError: if it is none, or holds objects.
    """
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format")
    shape, fortran, dtype = read(file)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"an array of {dtype} {list(shape)}")
    return shape, fortran, dtype


def read_npy(path: Path, *, remedy: str = REMADE, mapped: bool = False) -> np.ndarray:
    """The array of an npy file; its size is compared with the file's before memory is taken.

    Args:
      mapped: a memory map, read-only, in the place of an array in memory.

    Raises:
      DataError: if it is damaged, or something else.
    """
    with explained(path, remedy):
        with path.open("rb") as file:
            shape, _, dtype = npy_header(file)
            expected, size = _bytes_of(shape, dtype), path.stat().st_size - file.tell()
        if expected != size:
            raise ValueError(f"{dtype} {list(shape)} are {expected} bytes, there are {size}")
        return np.load(path, mmap_mode="r" if mapped and expected else None, allow_pickle=False)


def read_npz(path: Path, *names: str, remedy: str = REMADE) -> dict[str, np.ndarray]:
    """Arrays of an npz file by name.

    Args:
      names: of those that must be there, which alone are read; none: all that are there.

    Raises:
      DataError: if it is damaged, something else, or lacks one.
    """
    with explained(path, remedy), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if missing := [name for name in names if name not in members]:
            raise DataError(f"{path} has no {missing[0]} but {sorted(members)[:8]}; {remedy}")
        return {name: read_member(archive, members[name]) for name in names or members}


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The array of an npy member; its size is compared with the member's before memory is taken.

    Raises:
      ValueError: if it is damaged.
    """
    with archive.open(name) as file:
        shape, _, dtype = npy_header(file)
        expected = _bytes_of(shape, dtype)
        size = archive.getinfo(name).file_size - file.tell()
        if expected != size:
            raise ValueError(f"{name}: {list(shape)} are {expected} bytes, there are {size}")
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
