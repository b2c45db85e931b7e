"""Locks of stages: one process at a time runs a stage.

The lock of ``RUN/STAGE`` is ``RUN/.STAGE.lock``, a JSON file with the process and its machine. Of
several processes that run one program the first holds it. Reading finished stages needs no lock.

A lock whose process has ended (killed, or its machine is gone) is taken over. On the same machine
the process table shows that at once. On other machines a heartbeat does: the holder rewrites the
lock every `BEAT` seconds, and a lock that has not changed for `SILENCE` seconds is stale.
"""

import contextlib
import fcntl
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import write_json, writing

BEAT = 10.0
SILENCE = 45.0

_held: dict[Path, "_Lock"] = {}  # by this process


class LockedError(UserError):
    """Another process runs this stage."""


class _Lock:
    def __init__(self, path: Path, *, beat: float):
        self.path, self._beat = path, beat
        self._content, self._over = myself(), threading.Event()
        self._write(0)
        self._thread = threading.Thread(target=self._live, name=f"lock {path}", daemon=True)
        self._thread.start()

    def _write(self, beats: int) -> None:
        write_json(self.path, {**self._content, "beats": beats}, own=True)

    def _live(self) -> None:
        beats = 0
        while not self._over.wait(self._beat):
            beats += 1
            try:
                holder = read(self.path)
                if holder and not same_process(holder, self._content):
                    logging.error(
                        "%s: process %s on %s took the lock over; stop one of the two, both write "
                        "to the same folder",
                        *(self.path, holder.get("pid"), holder.get("host")),
                    )
                    return
                if not self.path.parent.exists():
                    return
                self._write(beats)
            except (OSError, UserError):  # a full disk: the stage itself reports it
                logging.debug("%s could not be written", self.path)

    def mine(self) -> bool:
        return same_process(read(self.path) or {}, self._content)

    def release(self) -> None:
        if self._content["pid"] != os.getpid():
            return  # a fork of the process that holds it
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.mine():
                self.path.unlink(missing_ok=True)


def myself() -> dict:
    """Describe this process as a lock does."""
    return {
        "host": platform.node(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def machine() -> str:
    """Identify what process ids belong to: this boot of this machine, and its container."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started(pid: int) -> str | None:
    """Return when a process of this machine started, in the kernel's clock ticks.

    Process ids are reused: id and start time together identify a process.

    Returns:
      None if there is no such process or it is a zombie; "" if the system does not tell.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # of another user
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]


def lives(holder: dict) -> bool:
    """Whether the process of a lock of this machine is alive; True if in doubt."""
    pid = holder.get("pid")
    now = started(pid) if isinstance(pid, int) and pid > 0 else None
    return now is not None and (now == "" or now == holder.get("started"))


def same_process(a: dict, b: dict) -> bool:
    """Whether two locks belong to the same process."""
    return all(a.get(key) == b.get(key) for key in ("machine", "pid", "started"))


def read(path: Path) -> dict | None:
    """Read a lock; None if there is none, {} if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def acquire(
    folder: Path, *, beat: float = BEAT, silence: float = SILENCE, poll: float = 1.0
) -> None:
    """Acquire the lock of a stage's folder; nothing happens if this process holds it already.

    Args:
      folder: of the stage; need not exist.
      beat: seconds between heartbeats.
      silence: seconds without a heartbeat after which a lock of another machine is stale.
      poll: seconds between two looks at such a lock.

    Raises:
      LockedError: naming the process that holds it.
      WriteError: if the run's folder cannot be written.
    """
    path = folder.parent.absolute() / f".{folder.name}.lock"
    if path in _held and _held[path].mine():
        return
    _held.pop(path, None)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    holder = read(path)
    if holder and holder.get("machine") != machine():
        _await_sign_of_life(folder, path, holder, silence, poll)
    with _alone(path.parent):
        now = read(path)
        if now and not same_process(now, myself()):
            # of another machine: acquired or refreshed since we looked
            here = now.get("machine") == machine()
            if lives(now) if here else now != holder:
                raise LockedError(_text(folder, path, now))
            logging.warning(
                "%s: process %s on %s, which ran it since %s, is gone; its lock is taken over",
                *(folder, now.get("pid"), now.get("host"), now.get("since")),
            )
        _held[path] = _Lock(path, beat=beat)


def _await_sign_of_life(
    folder: Path, path: Path, holder: dict, silence: float, poll: float
) -> None:
    """Raise LockedError if the lock changes within ``silence`` seconds."""
    logging.info(
        "%s: process %s on %s holds its lock; watching for %.0f s whether that is alive",
        *(folder, holder.get("pid"), holder.get("host"), silence),
    )
    end = time.monotonic() + silence
    while time.monotonic() < end:
        time.sleep(poll)
        now = read(path)
        if now is None:
            return
        if now != holder:
            raise LockedError(_text(folder, path, now))


def _text(folder: Path, path: Path, holder: dict) -> str:
    return (
        f"process {holder.get('pid')} on {holder.get('host')} has been writing {folder} since "
        f"{holder.get('since')}; wait for it, stop it there (kill {holder.get('pid')}), or give "
        f"another --workdir. If there is no such process, remove {path}"
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Exclude other processes of this machine, where the file system supports it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def release(folder: Path) -> None:
    """Release the lock of a stage's folder if this process holds it."""
    if lock := _held.pop(folder.parent.absolute() / f".{folder.name}.lock", None):
        lock.release()


def release_all() -> None:
    """Release all locks of this process."""
    while _held:
        _held.popitem()[1].release()
