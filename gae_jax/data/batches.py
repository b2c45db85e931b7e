"""Batches of examples: endless sequences by position, and iterators that are read ahead of use."""

import dataclasses
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np

from gae_jax.data.rows import Order, Rows
from gae_jax.data.workers import WorkerBatches


@dataclasses.dataclass(frozen=True)
class Batches:
    """An endless sequence of global batches, of which every process reads its own rows.

    Batch b holds the examples b * size to (b + 1) * size of an endless order. So the position in
    the sequence is one number, whatever the number of processes and threads.

    Attributes:
      examples: endless, by index; dicts of numpy arrays. None if a ``task`` makes them.
      size: rows of a global batch.
      workers: number of threads that read ahead.
      name: which examples these are, and their order.
      task: makes the rows, in worker processes or a batch at a time in threads.
      processes: number of worker processes; 0: threads read.
      remedy: what a user can do if the device waits for batches.
    """

    examples: grain.MapDataset | None
    size: int
    workers: int
    name: str
    task: Rows | None = None
    processes: int = 0
    remedy: str = "data.workers says who reads"

    @property
    def identity(self) -> str:
        """What a position counts in: a checkpoint resumes with the same identity only."""
        return f"{self.name}, batches of {self.size}"

    def read(self, rows: Sequence[int] | None = None, start: int = 0) -> Iterable:
        """Read batches from number ``start`` on: the given rows of each, by default all."""
        rows = range(self.size) if rows is None else [int(row) for row in rows]
        count, end = len(rows), sys.maxsize // self.size
        task = self.task
        if task is not None and self.processes:
            return WorkerBatches(
                task, size=self.size, rows=rows, start=start, end=end, count=self.processes
            )
        if task is not None:

            def batch(index: int) -> dict[str, np.ndarray]:
                out = {
                    name: np.empty((count, *shape), dtype)
                    for name, (shape, dtype) in task.fields.items()
                }
                task.fill([index * self.size + row for row in rows], out)
                return out

            options = grain.ReadOptions(
                num_threads=self.workers, prefetch_buffer_size=max(8, self.workers)
            )
            return grain.MapDataset.range(start, end).map(batch).to_iter_dataset(options)

        examples = self.examples
        assert examples is not None

        def example(position: int) -> dict[str, np.ndarray]:
            batch, at = divmod(position, count)
            return examples[batch * self.size + rows[at]]

        ds = grain.MapDataset.range(start * count, end).map(example)
        return in_batches(ds, count, self.workers)


class ReadAhead:
    """An iterator that a thread reads ``depth`` items ahead of its user."""

    def __init__(self, items: Iterable, depth: int = 2):
        self._iterator = iter(items)
        self._queue: queue.Queue[tuple] = queue.Queue(depth)  # (item, error or None)
        self._closed = threading.Event()
        # the thread holds no reference to this object, so that garbage collection closes it
        arguments = self._iterator, self._queue, self._closed
        self._thread = threading.Thread(target=_fill, args=arguments, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        return self.get()

    def get(self, timeout: float | None = None):
        """Return the next item.

        Raises:
          StopIteration: at the end.
          queue.Empty: if there is none within ``timeout`` seconds.
          Exception: whatever reading raised.
        """
        item, error = self._queue.get(timeout=timeout)
        if error is not None:
            self._queue.put((None, error))
            raise error
        return item

    def close(self) -> None:
        """End the thread, and the worker processes that it reads from."""
        self._closed.set()
        stop = getattr(self._iterator, "stop", None)
        if stop and self._thread.is_alive():
            stop()
        self._thread.join(timeout=10)
        if not self._thread.is_alive() and hasattr(self._iterator, "close"):
            self._iterator.close()

    def __del__(self):
        self.close()


def _fill(iterator: Iterator, items: queue.Queue, closed: threading.Event) -> None:
    """Run the thread of `ReadAhead`."""

    def put(entry: tuple) -> bool:
        while not closed.is_set():
            try:
                items.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    last: tuple = (None, StopIteration())
    try:
        for item in iterator:
            if not put((item, None)):
                return
    except Exception as error:  # the user of the iterator gets it, whatever it is
        last = None, error
    put(last)


def in_batches(ds: grain.MapDataset, size: int, workers: int) -> grain.IterDataset:
    """Group examples into batches in the order of ``ds``; threads read up to two batches ahead.

    Each thread reads one example at a time. With a batch at a time, cores would idle at the end of
    each batch, and memory would hold a batch for every thread.
    """
    ahead = max(2 * size, 2 * workers)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)
    return ds.to_iter_dataset(options).batch(size, drop_remainder=True)


def shuffled_order(count: int, seed: int, *, otherwise: str = "") -> Order:
    """Return grain's endless shuffled order of ``count`` examples as a function without grain.

    Args:
      otherwise: another remedy, for the error.

    Raises:
      RuntimeError: if grain's shuffle differs from that of `Order`.
    """
    shuffled = grain.MapDataset.range(count).seed(seed).shuffle()
    states = shuffled.repeat().random_map(
        lambda index, rng: (index, rng.bit_generator.state, rng.integers(2**62))
    )
    order = Order(count, shuffled._seed, states[0][1])
    rng = np.random.Generator(np.random.Philox(0))
    for position in (0, 1, count - 1, 3 * count + count // 2):
        index, _, number = states[position]
        order.reset(rng, position)
        if order.index(position) != index or rng.integers(2**62) != number:
            raise RuntimeError(
                f"grain {grain.__version__} shuffles in another way than its version 0.2.18; "
                f"install that version{otherwise}"
            )
    return order
