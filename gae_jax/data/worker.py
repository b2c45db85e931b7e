"""A process that makes rows of batches: what runs in it, started by `data.workers`.

It imports neither JAX nor grain, ignores interrupts, which its parent answers, and ends when the
parent closes the connection or dies.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import signal
from multiprocessing.connection import Connection

import numpy as np

LOOK = 2.0  # seconds between two looks at whether the parent lives
ALIGN = 64


def layout(fields, rows: int) -> tuple[dict[str, int], int]:
    """(offset of every field, bytes in all) of a batch of ``rows`` in shared memory."""
    offsets, end = {}, 0
    for name, (shape, dtype) in fields.items():
        offsets[name] = end
        end += -(-rows * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize // ALIGN) * ALIGN
    return offsets, end


def views(memory, fields, rows: int, slot: int) -> dict[str, np.ndarray]:
    """The arrays of batch number ``slot`` of a shared memory."""
    offsets, size = layout(fields, rows)
    return {
        name: np.ndarray((rows, *shape), dtype, memory, slot * size + offsets[name])
        for name, (shape, dtype) in fields.items()
    }


def store(task) -> list:
    """The pieces of a pickled task, large arrays left as they are; for `load`."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(task, protocol=5, buffer_callback=buffers.append)
    pieces = [head, *(buffer.raw() for buffer in buffers)]
    sizes = np.array([len(pieces), *map(len, pieces)], np.int64)
    padded = [sizes.tobytes()]
    for piece in pieces:
        padded += [bytes(-sum(map(len, padded)) % ALIGN), piece]
    return padded


def load(memory):
    """The task whose pieces lie in a memory. Arrays share its pages until they are written."""
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
    logging.disable(logging.CRITICAL)  # the parent tells what is skipped
    parent, line = os.getppid(), Connection(connection)
    memory = mmap.mmap(stored, os.fstat(stored).st_size, access=mmap.ACCESS_COPY)
    task = load(memory)
    batches = mmap.mmap(shared, os.fstat(shared).st_size)
    arrays: dict[int, dict[str, np.ndarray]] = {}
    with contextlib.suppress(EOFError, ConnectionError):
        news(task.source)  # what the parent knows
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


def news(source) -> tuple[dict[int, str], list[tuple[int, bool]]]:
    """What `data.sources.base.Encoded.news` of the source tells; nothing of other sources."""
    return source.news() if hasattr(source, "news") else ({}, [])


def portable(error: Exception) -> Exception:
    """An error that can be sent; one that cannot is told in words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickle calls the classes of errors, which raise what they like
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
