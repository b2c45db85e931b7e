"""Files that are written whole or not at all, and by one process.

Of several processes that run one program (`distributed`) the first writes what all of them have;
for the others these functions do nothing, unless they are told that each has a file of its own.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gae_jax.distributed import is_first
from gae_jax.errors import UserError, WriteError, refusal


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


def write_npy(path: Path, array: np.ndarray, *, own: bool = False) -> None:
    """`write_bytes` of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getvalue(), own=own)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """`write_bytes` of named arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def write_png(path: Path, pixels: np.ndarray) -> None:
    """`write_bytes` of uint8 pixels [H, W, 3]."""
    write_bytes(path, png(pixels))


def write_json(path: Path, value: Any, *, own: bool = False) -> None:
    """`write_bytes` of a JSON value."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode(), own=own)


def read_json(path: Path, *, remedy: str = "remove its folder and rerun") -> Any:
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
