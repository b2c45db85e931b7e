"""Reading members of tars in place, without unpacking."""

import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gae_jax.runtime.errors import DataError

PADDING = 1 << 20  # zeros that a complete tar may end with; tar itself writes at most some 10 KB

# First bytes of compressed files -> name of the format, and the command that decompresses it.
_STARTS = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\xfd7zXZ": ("xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
}


class Member(NamedTuple):
    """A file inside a tar.

    Attributes:
      name: without its folders.
      offset: of its content in the file on disk.
      size: in bytes.
    """

    name: str
    offset: int
    size: int


class _Part(io.RawIOBase):
    """A range of a file as a file of its own."""

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

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)  # a damaged header may ask for any number of bytes
        self._file.seek(self._offset + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content


def kind_of(start: bytes) -> str:
    """Recognise by its first bytes what a file is that is not a tar; "" if unknown."""
    text = start.lstrip().lower()
    if not start:
        return "empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, which a download that failed leaves"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file (git lfs pull fetches it)"
    if start.startswith(b"PK\3\4"):
        return "a zip file: unpack it, and give the folder with --source"
    if not start.strip(b"\0"):
        return "zeros at its beginning: the download is not complete"
    return ""


def read_members(
    path: Path,
    suffixes: set[str],
    *,
    part: Member | None = None,
    on_double: str = "error",
) -> list[Member]:
    """List the files in a tar, or in a tar that is itself a member of one.

    Only headers are read. Hidden files are left out; links and files with other suffixes are left
    out too, and counted in the log.

    Args:
      suffixes: of the wanted files, in lower case.
      part: the member of ``path`` that is the tar; None: ``path`` is.
      on_double: duplicate names: "error", or "skip", which takes the last one, as tar does.

    Raises:
      DataError: if it is compressed, damaged, truncated, or has no such files.
    """
    where = str(path) if part is None else f"{part.name} in {path}"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            offset, size = (0, size) if part is None else (part.offset, part.size)
            start = _Part(file, offset, size).read(512)
            for magic, (name, command) in _STARTS.items():
                if start.startswith(magic):
                    raise DataError(_compressed(path, where, part, name, command))
            if kind := kind_of(start):
                raise DataError(f"{where} cannot be read as a tar ({kind}); fetch it again")
            entries = list(_entries(_Part(file, offset, size), size, offset, part is not None))
    except DataError:
        raise
    except Exception as error:  # on damage tarfile raises ValueError, RecursionError and more
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{where} cannot be read as a tar ({reason}); fetch it again") from error
    members: dict[str, Member] = {}
    for entry in entries:
        name = Path(entry.name).name
        if not entry.isreg() or name.startswith(".") or Path(name).suffix.lower() not in suffixes:
            continue
        if entry.sparse is not None:
            raise DataError(f"{where}: {name} is stored as a sparse file; pack the tar without -S")
        if name in members and on_double == "error":
            raise DataError(
                f"{where} holds {name} more than once; fetch it again, or pass --on-corrupt=skip "
                "to take the last one of each name"
            )
        if name in members:
            logging.warning("prepare-data: %s holds %s more than once; took the last", where, name)
        members[name] = Member(name, offset + entry.offset_data, entry.size)
    _say_what_is_left_aside(where, entries, members)
    if not members:
        raise DataError(
            f"{where} holds no files with one of {', '.join(sorted(suffixes))}"
            + (f", but {entries[0].name}" if entries else "")
            + "; if it is a tar of class folders, unpack it and give the folder with --source"
        )
    return list(members.values())


def _compressed(path: Path, where: str, part: Member | None, name: str, command: str) -> str:
    why = f"{where} is compressed ({name}), and images are read where they lie in a plain tar"
    if part is None:
        plain = f"{path.name.split('.')[0]}-plain.tar"
        return f"{why}; decompress it: {command} {path} > {plain}, and give {plain}"
    return (
        f"{why}; unpack everything into one folder for each class, DIR/train/CLASS/*, and give "
        "--source=DIR"
    )


def _entries(part: _Part, size: int, offset: int, nested: bool) -> Iterator[tarfile.TarInfo]:
    """Yield all members of a tar.

    Raises:
      tarfile.TarError, or others: where it is damaged or truncated.
    """
    with tarfile.open(fileobj=part, mode="r:") as tar:
        before = -1
        while (entry := tar.next()) is not None:
            if entry.size < 0 or tar.offset <= before:
                raise tarfile.ReadError(f"damaged at byte {offset + entry.offset}")
            if entry.isreg() and entry.offset_data + entry.size > size:
                raise tarfile.ReadError(
                    f"cut off at byte {offset + size}, inside its member {entry.name}"
                )
            before = tar.offset
            yield entry
        # tarfile ends silently at a damaged or zeroed header, and where a file was truncated; a
        # complete archive ends with zeros and nothing else
        end = tar.offset
        part.seek(end)
        rest = part.read(PADDING + 1)
        if not rest and nested:
            return
        if len(rest) < tarfile.BLOCKSIZE or rest[: tarfile.BLOCKSIZE].strip(b"\0"):
            raise tarfile.ReadError(f"damaged or cut off at byte {offset + end}")
        if rest.strip(b"\0") or len(rest) > PADDING:
            raise tarfile.ReadError(
                f"its members end at byte {offset + end} of {offset + size}, and more follows: "
                "damaged there, or not fetched completely"
            )


def _say_what_is_left_aside(where: str, entries, members: dict[str, Member]) -> None:
    def aside(entry) -> bool:
        name = Path(entry.name).name
        return not (entry.isdir() or name.startswith(".") or (entry.isreg() and name in members))

    if names := [entry.name for entry in entries if aside(entry)]:
        logging.warning(
            "prepare-data: %d members of %s are links, or files of other kinds, and are left "
            "aside, such as %s",
            *(len(names), where, names[0]),
        )
