"""The program of a worker process that makes rows of batches, started by `data.workers`.

It imports neither JAX nor grain, leaves interrupts to its parent, and ends when the parent closes
the connection or dies.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import signal
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gae_jax.data.rows import Fields, Rows

LOOK = 2.0  # seconds between two looks at whether the parent lives
ALIGN = 64


def layout(fields: Fields, rows: int) -> tuple[dict[str, int], int]:
    """Lay out a batch of ``rows`` in shared memory.

    Returns:
      (offset of every field in bytes, bytes in all).
    """
    offsets, end = {}, 0
    for name, (shape, dtype) in fields.items():
        offsets[name] = end
        end += -(-rows * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize // ALIGN) * ALIGN
    return offsets, end


def views(memory: mmap.mmap, fields: Fields, rows: int, slot: int) -> dict[str, np.ndarray]:
    """Return the arrays of batch number ``slot`` in shared memory."""
    offsets, size = layout(fields, rows)
    return {
        name: np.ndarray((rows, *shape), dtype, memory, slot * size + offsets[name])
        for name, (shape, dtype) in fields.items()
    }


def store(task: Rows) -> list[bytes | memoryview]:
    """Pickle a task for `load`; large arrays become separate pieces, which are not copied."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(task, protocol=5, buffer_callback=buffers.append)
    pieces: list[bytes | memoryview] = [head, *(buffer.raw() for buffer in buffers)]
    sizes = np.array([len(pieces), *map(len, pieces)], np.int64)
    padded: list[bytes | memoryview] = [sizes.tobytes()]
    for piece in pieces:
        padded += [bytes(-sum(map(len, padded)) % ALIGN), piece]
    return padded


def load(memory: mmap.mmap) -> Rows:
    """Load a task from memory that holds what `store` returned; arrays share its pages."""
    count = int(np.frombuffer(memory, np.int64, 1)[0])
    sizes = np.frombuffer(memory, np.int64, count, 8)
    at, pieces = 8 * (count + 1), []
    for size in sizes.tolist():
        at += -at % ALIGN
        pieces.append(memoryview(memory)[at : at + size])
        at += size
    return pickle.loads(pieces[0], buffers=pieces[1:])


def main(connection: int, shared: int, stored: int, rows: int) -> None:
    """Answer jobs until the parent is gone.

    Args:
      connection, shared, stored: file descriptors of the connection to the parent, of the memory
        of the batches and of the pickled task.
      rows: of a batch.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # the parent logs what is skipped
    parent, line = os.getppid(), Connection(connection)
    memory = mmap.mmap(stored, os.fstat(stored).st_size, access=mmap.ACCESS_COPY)
    task = load(memory)
    batches = mmap.mmap(shared, os.fstat(shared).st_size)
    arrays: dict[int, dict[str, np.ndarray]] = {}
    with contextlib.suppress(EOFError, ConnectionError):
        news(task.source)  # drops what the parent knows already
        line.send(("ready", None, ({}, [])))
        while True:
            while not line.poll(LOOK):
                if os.getppid() != parent:
                    return
            number, slot, first, positions = line.recv()
            if slot not in arrays:
                arrays[slot] = views(batches, task.fields, rows, slot)
            error = None
            try:
                out = {
                    name: array[first : first + len(positions)]
                    for name, array in arrays[slot].items()
                }
                task.fill(positions, out)
            except Exception as caught:  # the parent raises it, whatever it was
                error = portable(caught)
            line.send((number, error, news(task.source)))


def news(source: Any) -> tuple[dict[int, str], list[tuple[int, bool]]]:
    """Return the `news` of a `data.sources.base.Encoded`; nothing for other sources."""
    return source.news() if hasattr(source, "news") else ({}, [])


def portable(error: Exception) -> Exception:
    """Return the error, or, if it cannot be pickled, a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickle calls the classes of errors, which raise what they like
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
