"""Atomic writes by one process, and reads that name the file where it is damaged.

Of several processes (`distributed`) the first writes; in the others the functions that write do
nothing, unless they are called with ``own=True`` for files that every process has for itself.
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
from typing import IO, Any

import numpy as np
from PIL import Image

from gae_jax.runtime.distributed import is_first
from gae_jax.runtime.errors import DataError, UserError, WriteError, refusal


def write_bytes(path: Path, content: bytes, *, own: bool = False) -> None:
    """Write a file atomically, also when the process is killed or the disk is full.

    Args:
      own: whether this process writes a file of its own; if not, only the first process writes.

    Raises:
      WriteError: if the file system refuses.
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


# On writing these mean /proc, a lost mount, a circle of links or a device; on reading other things.
_NO_PLACE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.ENOSYS)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a WriteError that names ``path``.

    Raises:
      WriteError: for a full disk, a read-only folder and the like.
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
    """Create an ``.npy`` file to be filled, with its disk space reserved.

    Otherwise a full disk would end the process with SIGBUS when a page is written.
    """
    with writing(path):
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array


def check_writable(folder: Path) -> None:
    """Create a folder and try to write into it, before long work whose result goes there.

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
    """An ``.npy`` file that grows along its first axis and exists once `finish` has returned.

    Args:
      dtype, shape: of a row, without the first axis.

    Raises:
      WriteError: also in `append` and `finish`, for a full disk and the like.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]):
        self.dtype, self._path, self._shape, self._count = np.dtype(dtype), path, shape, 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, self._name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            self._file = os.fdopen(handle, "wb")
            self._file.write(self._header())

    def _header(self) -> bytes:
        """Return the header for the rows so far; its length does not depend on their number."""
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        shape = (self._count, *self._shape)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue()

    def append(self, rows: np.ndarray) -> None:
        """Append ``rows`` [n, *shape]."""
        with writing(self._path):
            self._file.write(np.ascontiguousarray(rows, self.dtype).data)
        self._count += len(rows)

    def finish(self) -> None:
        """Complete the file and give it its name."""
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
        with contextlib.suppress(OSError):  # on a full disk the buffer cannot be flushed
            self._file.close()
        Path(self._name).unlink(missing_ok=True)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], *, own: bool = False) -> None:
    """`write_bytes` of named arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub reads ** as allow_pickle too
    write_bytes(path, buffer.getvalue(), own=own)


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels, uint8 [H, W, 3], as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def write_png(path: Path, pixels: np.ndarray) -> None:
    """`write_bytes` of uint8 pixels [H, W, 3]."""
    write_bytes(path, png(pixels))


# JSON has no such numbers: they are written as these strings, which `read_figures` turns back.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_json(path: Path, value: Any, *, own: bool = False) -> None:
    """`write_bytes` of a value as strict JSON.

    A NaN or an infinity, such as the PSNR of equal images, becomes a string of `NON_FINITE`.
    """
    write_bytes(path, (json_text(value) + "\n").encode(), own=own)


def json_text(value: Any) -> str:
    """Format a value as `write_json` writes it."""
    return json.dumps(_named(value), indent=2, allow_nan=False)


def _named(value: Any) -> Any:
    """Replace non-finite numbers by their names."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def write_figures(path: Path, value: Any) -> None:
    """Write metrics that took long to compute; if that fails, print them.

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


REMADE = "remove its folder and rerun"  # remedy for damaged files that a stage wrote


@contextlib.contextmanager
def explained(path: Path, remedy: str) -> Iterator[None]:
    """Turn whatever is raised while a damaged file is read into a DataError that names it.

    Args:
      remedy: what the user can do about it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # on damaged content libraries raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = (reason.splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is truncated or damaged ({reason}); {remedy}") from error


def read_json(path: Path, *, remedy: str = REMADE) -> Any:
    """Read a JSON file.

    Args:
      remedy: for a damaged file.

    Raises:
      UserError: if it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError too
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None


def read_figures(path: Path, *, remedy: str = REMADE) -> Any:
    """Read metrics from JSON: strings of `NON_FINITE` become numbers again."""

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restored(item) for key, item in value.items()}
        if isinstance(value, list):
            return [restored(item) for item in value]
        return NON_FINITE.get(value, value) if isinstance(value, str) else value

    return restored(read_json(path, remedy=remedy))


class Record(dict):
    """A JSON object read from a file; looking up a missing key raises an error with its path."""

    def __init__(self, value: dict, path: Path, remedy: str):
        super().__init__(value)
        self._path, self._remedy = path, remedy

    def __missing__(self, key: str):
        raise DataError(f"{self._path} is damaged: it has no {key}; {self._remedy}")


def read_object(path: Path, *, remedy: str = REMADE, **kinds: type | tuple[type, ...]) -> Record:
    """Read a JSON object that has at least the given keys.

    Args:
      kinds: key -> type or types of its value.

    Raises:
      UserError: as `read_json`, or naming the key that is missing or of another type.
    """
    content = read_json(path, remedy=remedy)
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds a {type(content).__name__}; {remedy}")
    for key, kind in kinds.items():
        is_bool = isinstance(content.get(key), bool)  # which Python counts among the ints
        if not isinstance(content.get(key), kind) or (is_bool and kind is not bool):
            value = repr(content.get(key, "missing"))[:60]
            raise DataError(f"{path} is damaged: {key} is {value}; {remedy}")
    return Record(content, path, remedy)


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an npy file, up to where its numbers begin.

    Returns:
      (shape, whether in Fortran order, dtype).

    Raises:
      ValueError: if it is not an npy file, or holds objects.
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
    """Read an npy file; the size of the file is checked before memory is allocated.

    Args:
      mapped: return a read-only memory map instead of an array in memory.

    Raises:
      DataError: if it is damaged, or not an npy file.
    """
    with explained(path, remedy):
        with path.open("rb") as file:
            shape, _, dtype = npy_header(file)
            expected, size = _bytes_of(shape, dtype), path.stat().st_size - file.tell()
        if expected != size:
            raise ValueError(f"{dtype} {list(shape)} are {expected} bytes, there are {size}")
        return np.load(path, mmap_mode="r" if mapped and expected else None, allow_pickle=False)


def read_npz(path: Path, *names: str, remedy: str = REMADE) -> dict[str, np.ndarray]:
    """Read arrays of an npz file by name.

    Args:
      names: the arrays to read, all required; none: read all.

    Raises:
      DataError: if it is damaged, not an npz file, or an array is missing.
    """
    with explained(path, remedy), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if missing := [name for name in names if name not in members]:
            raise DataError(f"{path} has no {missing[0]} but {sorted(members)[:8]}; {remedy}")
        return {name: read_member(archive, members[name]) for name in names or members}


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an npy member of an archive; its size is checked before memory is allocated.

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
