"""Batches made by worker processes, which write the rows into shared memory.

Pillow holds Python's lock while it decodes and resizes, so threads do not scale. grain's worker
processes import JAX (a second and 150 MB each), use named shared memory, which a killed parent
leaves behind, and are not restarted when one is killed. The workers here import only what decoding
needs, start in a fifth of that time, share anonymous memory, and take chunks of rows: a batch costs
the parent one message for each MiB of pixels, and one copy.

Jobs are deterministic, so a killed worker is replaced and its jobs are given to others.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from gae_jax.data import worker
from gae_jax.data.rows import Rows
from gae_jax.runtime.errors import DataError

CHUNK_BYTES = 2**20  # of the rows of a job
OUTSTANDING = 2  # jobs that a worker has, so that it never waits for the next one
MOST_DEATHS = 3  # workers that may die over one image, or before any is ready
LEAVE_WITHIN = 5.0  # seconds that a worker has to end

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
REMEDY = "data.workers=0 reads in threads of this process"
# `-c` and no script: a child must not import the parent's main module again
START = (
    "import sys; sys.path[:] = sys.argv[1].split(chr(0x1f)); "
    "from gae_jax.data.worker import main; main(*map(int, sys.argv[2:]))"
)


def anonymous_memory(size: int) -> int:
    """Return a file descriptor of ``size`` zero bytes without a name; freed with its last user."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("gae_jax", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, size)
    return handle


@dataclasses.dataclass
class Job:
    """Rows ``first`` to ``first + len(positions)`` of a batch."""

    batch: int
    first: int
    positions: list[int]
    deaths: int = 0


class Worker:
    """A process, its connection and the jobs that it has."""

    def __init__(self, shared: int, stored: int, rows: int, handles: Sequence[int]):
        self.line, line_of_child = (Connection(end.detach()) for end in socket.socketpair())
        self.jobs: collections.OrderedDict[int, Job] = collections.OrderedDict()
        self.ready = False
        environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
        # Interrupts are held back from its first moment: a child inherits the mask of its thread.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", START, chr(0x1F).join(sys.path)),
                    *map(str, (line_of_child.fileno(), shared, stored, rows)),
                ],
                pass_fds=(line_of_child.fileno(), shared, stored, *handles),
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            line_of_child.close()

    def end(self, within: float = LEAVE_WITHIN) -> None:
        """Close the connection and wait for the process; kill it if it does not end."""
        self.line.close()
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class WorkerBatches:
    """An iterator over batches ``start`` to ``end`` of a task, made by worker processes.

    Batch b holds the positions ``b * size + row`` for the ``rows``. Batches are copies of shared
    memory, so the caller may keep them.

    Args:
      task: makes the rows.
      count: number of processes.

    Raises:
      DataError: from `next`: a worker's error, or if workers keep dying.
    """

    def __init__(
        self, task: Rows, *, size: int, rows: Sequence[int], start: int, end: int, count: int
    ):
        self._task, self._size, self._rows = task, size, np.asarray(rows, np.int64)
        self._fields = task.fields
        bytes_of_row = sum(
            int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            for shape, dtype in self._fields.values()
        )
        self._chunk = max(1, min(len(rows), CHUNK_BYTES // bytes_of_row))
        chunks = -(-len(rows) // self._chunk)
        # one batch that is waited for, and chunks ahead for all workers
        self._slots = 2 + -(-OUTSTANDING * count // chunks)
        _, self._bytes = worker.layout(self._fields, len(rows))
        self._next, self._planned, self._end = start, start, end
        self._missing: dict[int, int] = {}  # batch -> rows that are not there yet
        self._todo: collections.deque[Job] = collections.deque()
        self._errors: dict[int, tuple[int, Exception]] = {}  # batch -> its first row that failed
        self._number, self._unready = 0, 0
        self._lock, self._closed, self._stopping = threading.Lock(), False, False
        self._wake, self._waker = (Connection(end.detach()) for end in socket.socketpair())
        self._shared = anonymous_memory(self._slots * self._bytes)
        self._memory = mmap.mmap(self._shared, self._slots * self._bytes)
        self._views = [
            worker.views(self._memory, self._fields, len(rows), slot) for slot in range(self._slots)
        ]
        pieces = worker.store(task)
        self._stored = anonymous_memory(0)
        with os.fdopen(os.dup(self._stored), "wb") as file:
            for piece in pieces:
                file.write(piece)
        handles = getattr(task.source, "handles", ())
        self._arguments = (self._shared, self._stored, len(rows), handles)
        self._workers: list[Worker] = []
        try:
            for _ in range(count):
                self._workers.append(Worker(*self._arguments))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._next >= self._end or self._closed:
            self.close()
            raise StopIteration
        try:
            self._plan()
            batch = self._next
            while self._missing[batch]:
                self._serve()
                if self._stopping:
                    raise StopIteration
            if batch in self._errors:
                raise self._errors[batch][1]
            arrays = {name: view.copy() for name, view in self._views[batch % self._slots].items()}
            del self._missing[batch]
            self._next += 1
            self._plan()
            self._send()
            return arrays
        except BaseException:
            self.close()
            raise

    def _plan(self) -> None:
        """Split batches into jobs, as many as have a slot in the shared memory."""
        while self._planned < min(self._end, self._next + self._slots):
            positions = (self._planned * self._size + self._rows).tolist()
            for first in range(0, len(positions), self._chunk):
                part = positions[first : first + self._chunk]
                self._todo.append(Job(self._planned, first, part))
            self._missing[self._planned] = len(positions)
            self._planned += 1

    def _send(self) -> None:
        """Hand out jobs, the earliest first, to the workers with the fewest."""
        for depth in range(1, OUTSTANDING + 1):
            for process in self._workers:
                if not self._todo:
                    return
                if len(process.jobs) >= depth:
                    continue
                job = self._todo.popleft()
                self._number += 1
                process.jobs[self._number] = job
                message = (self._number, job.batch % self._slots, job.first, job.positions)
                try:
                    process.line.send(message)
                except OSError:  # it died; `_serve` finds its jobs
                    continue

    def _serve(self) -> None:
        """Wait for messages of workers, take their results, and hand out more jobs."""
        self._send()
        ready = wait([*(process.line for process in self._workers), self._wake])
        if self._wake in ready:
            self._stopping = True
            return
        for process in [process for process in self._workers if process.line in ready]:
            try:
                number, error, (unreadable, looked) = process.line.recv()
            except (EOFError, OSError):
                self._replace(process)
                continue
            for index, problem in unreadable.items():
                self._task.source.note(index, problem)
            if looked:
                self._task.source.count_turned(looked)
            if number == "ready":
                process.ready, self._unready = True, 0
                continue
            self._finish(process.jobs.pop(number), error)
        self._send()

    def _finish(self, job: Job, error: Exception | None) -> None:
        """Count the rows of a job; its error is raised when its batch is due."""
        self._missing[job.batch] -= len(job.positions)
        if error is not None:
            failed = self._errors.get(job.batch)
            if failed is None or job.first < failed[0]:
                self._errors[job.batch] = job.first, error

    def _replace(self, dead: Worker) -> None:
        """Replace a worker that died; its jobs come first, an image at a time.

        Raises:
          DataError: if workers keep dying before they are ready.
        """
        self._workers.remove(dead)
        dead.end()
        how = ended(dead.process.returncode)
        if not dead.ready:
            self._unready += 1
            if self._unready >= MOST_DEATHS:
                raise DataError(
                    f"worker processes end before they are ready ({how}); what they wrote to "
                    f"stderr stands above. {REMEDY}"
                )
        again = []
        for job in dead.jobs.values():
            culprit = dead.ready and job is next(iter(dead.jobs.values()))
            for offset, position in enumerate(job.positions):
                part = Job(job.batch, job.first + offset, [position], job.deaths + culprit)
                if part.deaths >= MOST_DEATHS and len(job.positions) == 1:
                    self._finish(part, self._deadly(part, how))
                else:
                    again.append(part)
        self._todo.extendleft(reversed(again))
        logging.warning("a worker process that reads images %s; another takes its place", how)
        self._workers.append(Worker(*self._arguments))

    def _deadly(self, job: Job, how: str) -> DataError:
        return DataError(
            f"{self._task.name(job.positions[0])}: {job.deaths} worker processes in turn {how} "
            "while they read it; if memory ran out (signal 9), set data.workers lower than "
            f"{len(self._workers) + 1}, else remove the image"
        )

    def cpu_seconds(self) -> float:
        """Return the CPU time of the worker processes so far; 0 where /proc does not exist."""
        total = 0.0
        for each in self._workers:
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{each.process.pid}/stat").read_text()
                total += sum(map(int, text.rpartition(")")[2].split()[11:13]))
        return total / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the iteration in which another thread waits."""
        with self._lock:
            if not self._closed:
                self._waker.send(None)

    def close(self) -> None:
        """End the processes and free the memory; not to be called while another thread iterates."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for process in self._workers:
            process.line.close()
        deadline = time.monotonic() + LEAVE_WITHIN
        for process in self._workers:
            process.end(max(0.0, deadline - time.monotonic()))
        self._workers.clear()
        self._views.clear()
        self._memory.close()
        os.close(self._shared)
        os.close(self._stored)
        self._wake.close()
        self._waker.close()

    def __del__(self):
        if hasattr(self, "_stored"):
            self.close()


def ended(status: int) -> str:
    """Describe the exit status of a process in words."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    return f"was ended by signal {-status} ({name})"
