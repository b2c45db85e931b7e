"""Errors that a user can fix.

The command line prints a `UserError` without a traceback, so each names the thing, its value and
the remedy.
"""

import errno
import os
import signal
from pathlib import Path


def number_of(count: int, singular: str, plural: str = "") -> str:
    """Format a number with its noun: "1 class", "2 classes".

    Args:
      plural: "": the singular with an s.
    """
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


class UserError(Exception):
    """Bad input or a bad state of the disk; the message explains it and how to fix it."""


class ConfigError(UserError):
    """A config that does not fit the code that reads it."""


class DataError(UserError):
    """Images or latents that are missing, unreadable or do not belong together."""


class NonFiniteError(UserError):
    """Training produced a NaN or an infinity and was stopped."""


class CheckpointError(UserError):
    """A checkpoint that is missing or could not be written."""


class WriteError(UserError):
    """The file system refused to write; see `refusal`."""


# Remedies for errors of the file system that are not the program's fault.
_MAKE_ROOM = "make room there (or raise the quota), and run the same command again"
_WRITABLE = "choose a folder that can be written, or change its permissions or its mount"
_REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or " + _MAKE_ROOM,
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ENOTDIR: "a file lies where a folder is wanted: move it, or choose another folder",
    errno.EEXIST: "a file lies where a folder is wanted: move it, or choose another folder",
    errno.EISDIR: "a folder lies where a file is wanted: move it, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit on open files: ulimit -n 65536",
    errno.ENFILE: "close other programs: the machine has too many files open",
    errno.EIO: "the disk or the network failed: mend it, and run the same command again",
    errno.ESTALE: "mount the network file system again, and run the same command again",
    errno.ENOTCONN: "mount the network file system again, and run the same command again",
}


def refusal(error: OSError, path: Path | str | None = None) -> str | None:
    """Describe an error of the file system in one line: path and remedy; None for other errors.

    Args:
      path: what was being written, if the error does not say.
    """
    number = error.errno
    if number is None or (remedy := _REMEDIES.get(number)) is None:
        return None
    where = error.filename2 or error.filename or path or "a file"
    where = where.decode(errors="replace") if isinstance(where, bytes) else where
    return f"{where}: {os.strerror(number)}; {remedy}"


class Preempted(BaseException):
    """The process was asked to stop by a signal, and its work is saved.

    Not an Exception, so that code that continues after errors, such as a sweep, does not catch it.
    """

    def __init__(self, text: str, number: int = signal.SIGTERM):
        super().__init__(text)
        self.status = 128 + number  # exit status by the convention of shells
