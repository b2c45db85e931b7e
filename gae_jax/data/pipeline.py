"""Pipelines of images: endless shuffled batches for training, one ordered pass for extraction.

Threads of this process make the examples by grain, or worker processes do (`data.workers`); the
batches are the same, bit for bit.
"""

import dataclasses
import functools
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np

from gae_jax.data.cache import cached
from gae_jax.data.cached_images import DecodedRows
from gae_jax.data.rows import Order, OrderedRows, Rows, TrainingRows
from gae_jax.data.sources import Source, make_source
from gae_jax.data.sources.base import Encoded
from gae_jax.data.workers import WorkerBatches
from gae_jax.runtime.distributed import cores, cores_of_machine
from gae_jax.runtime.errors import number_of

AUTO = "auto"
# Worker processes that are started for few images are there when the images are read.
FEW_IMAGES = 1_000
THREADS = 8  # that read where no processes do; more only wait for Python's lock


@dataclasses.dataclass(frozen=True)
class Batches:
    """An endless sequence of global batches, of which every process reads its rows.

    Batch b holds the examples b * size to (b + 1) * size of an endless order. So the position in
    the sequence is one number, whatever the number of processes and threads.

    Attributes:
      examples: by index, endless; dicts of numpy arrays.
      size: rows of a global batch.
      workers: threads that read ahead.
      name: what the examples are and how they are ordered.
      light: examples cost so little that threads had better take whole batches.
      task: makes the same rows in worker processes.
      processes: number of these; 0: threads read.
      remedy: what to do if a device waits for batches.
    """

    examples: grain.MapDataset
    size: int
    workers: int
    name: str
    light: bool = False
    task: Rows | None = None
    processes: int = 0
    remedy: str = "data.workers says who reads"

    @property
    def identity(self) -> str:
        """What a position belongs to."""
        return f"{self.name}, batches of {self.size}"

    def read(self, rows: Sequence[int] | None = None, start: int = 0) -> Iterable:
        """Batches from number ``start`` on: their ``rows``, all of them by default."""
        rows = range(self.size) if rows is None else [int(row) for row in rows]
        count, end = len(rows), sys.maxsize // self.size
        if self.task is not None and self.processes:
            return WorkerBatches(
                self.task,
                **dict(size=self.size, rows=rows, start=start, end=end, count=self.processes),
            )
        if self.light:

            def batch(index: int) -> dict[str, np.ndarray]:
                examples = [self.examples[index * self.size + row] for row in rows]
                return {name: np.stack([item[name] for item in examples]) for name in examples[0]}

            options = grain.ReadOptions(
                num_threads=self.workers, prefetch_buffer_size=max(8, self.workers)
            )
            return grain.MapDataset.range(start, end).map(batch).to_iter_dataset(options)

        def example(position: int) -> dict[str, np.ndarray]:
            batch, at = divmod(position, count)
            return self.examples[batch * self.size + rows[at]]

        ds = grain.MapDataset.range(start * count, end).map(example)
        return in_batches(ds, count, self.workers)


class ReadAhead:
    """An iterator that a thread goes through, ``depth`` items ahead of its user."""

    def __init__(self, items: Iterable, depth: int = 2):
        self._iterator, self._queue = iter(items), queue.Queue(depth)
        self._closed = threading.Event()
        # the thread does not know this object, so that one that nobody needs closes itself
        arguments = self._iterator, self._queue, self._closed
        self._thread = threading.Thread(target=_fill, args=arguments, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        return self.get()

    def get(self, timeout: float | None = None):
        """The next item.

        Raises:
          StopIteration: at the end.
          queue.Empty: if none comes in ``timeout`` seconds.
          Exception: what reading raised.
        """
        item, error = self._queue.get(timeout=timeout)
        if error is not None:
            self._queue.put((None, error))
            raise error
        return item

    def close(self) -> None:
        """End the thread, and the processes behind it."""
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
    """The thread of `ReadAhead`."""

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
    except Exception as error:  # whatever it was, the user of the iterator is to meet it
        last = None, error
    put(last)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A config's data section: what the images are, how they are cut, and who reads them."""

    name: str
    root: str
    holdout: float
    image_size: int
    crop: str
    mirror: bool
    on_corrupt: str
    workers: int | str
    dataset: str = ""
    exif: str = "ignore"
    cache: str = "none"
    cache_dir: str = ""

    def source(self, split: str) -> Source:
        return make_source(
            self.name,
            split,
            root=self.root,
            dataset=self.dataset,
            holdout=self.holdout,
            on_corrupt=self.on_corrupt,
            exif=self.exif,
        )

    def processes(self, source: Source, images: int) -> int:
        """Number of worker processes that read ``images`` of a source; 0: threads do."""
        if not isinstance(source, Encoded):  # it lies in memory, nothing is decoded
            return 0
        if self.workers != AUTO:
            return int(self.workers)
        count = cores()
        return count if count > 1 and images >= FEW_IMAGES else 0

    @property
    def threads(self) -> int:
        """Number of threads that read where no processes do."""
        return min(THREADS, cores() if self.workers in (AUTO, 0) else int(self.workers))

    def training_batches(self, source: Source, batch_size: int, seed: int) -> Batches:
        """Endless ``{"image": uint8 [b, S, S, 3], "label": int32 [b]}``, reshuffled every epoch."""
        processes = self.processes(source, len(source))
        how = f"{self.crop} crop of {self.image_size}, mirror {self.mirror}, seed {seed}"
        name = f"{source!r}, {how}"
        cut = dict(image_size=self.image_size, crop=self.crop, mirror=self.mirror)
        order = order_of(len(source), seed) if processes else None
        images = self.cached(source)
        task = TrainingRows(images, order, **cut)

        def augment(item: dict, rng: np.random.Generator) -> dict:
            image = task.augment(item, rng)
            # contiguous: a reversed view costs more when its batch is stacked
            return {"image": np.ascontiguousarray(image), "label": np.int32(item["label"])}

        ds = grain.MapDataset.source(images).seed(seed).shuffle().repeat().random_map(augment)
        say_readers(source, processes, self.threads)
        workers = dict(task=task, processes=processes) if processes else {}
        remedy = self.remedy(source, processes)
        return Batches(ds, batch_size, self.threads, name, remedy=remedy, **workers)

    def remedy(self, source: Source, processes: int) -> str:
        """What to do if a device waits for batches: fields to set, and who gives it more cores."""
        ways = []
        if not isinstance(source, Encoded):
            if self.threads < (most := min(THREADS, cores())):
                ways.append(f"set data.workers={most} (now {number_of(self.threads, 'thread')})")
        elif processes < cores():
            ways.append(f"set data.workers={cores()} (now {processes})")
        if isinstance(source, Encoded) and self.cache == "none" and self.crop == "center":
            ways.append("set data.cache=disk (or memory): images are then decoded once")
        return "; or ".join([*ways, more_cores()])

    def ordered(
        self,
        source: Source,
        batch_size: int,
        crop: str = "adm",
        *,
        indices: Sequence[int] | None = None,
        batches: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Every image once: batches with "image", "label", "index", "valid".

        The last batch is padded to the same size. ``valid`` is False for padding and for images
        that could not be read and are to be skipped.

        Args:
          crop: a name of `data.images.CROPS`, of the middle of an image.
          indices: only these images, in this order.
          batches: at least so many, of padding in the end.
        """
        indices = range(len(source)) if indices is None else indices
        batches = max(batches, -(-len(indices) // batch_size))
        images = source
        if crop == "adm" or self.crop == "random":  # else other pixels are kept
            images = self.cached(source, whole=2 * len(indices) > len(source))
        rows = OrderedRows(images, image_size=self.image_size, crop=crop, indices=indices)
        if processes := self.processes(source, len(indices)):
            read = WorkerBatches(
                rows,
                **dict(size=batch_size, rows=range(batch_size), start=0, end=batches),
                count=min(processes, batches * batch_size),
            )
            return ReadAhead(read)
        ds = grain.MapDataset.range(batches * batch_size).map(rows.row)
        return iter(in_batches(ds, batch_size, self.threads))

    def cached(self, source: Source, *, whole: bool = True) -> Source:
        """The source from its cache, if the config asks for one; args as `cache.cached`."""
        if not isinstance(source, Encoded):
            return source

        def read(rows: DecodedRows, start: int, size: int) -> Iterator[dict[str, np.ndarray]]:
            end = -(-len(source) // size)
            if processes := self.processes(source, len(source) - start * size):
                return WorkerBatches(
                    rows, **dict(size=size, rows=range(size), start=start, end=end), count=processes
                )

            def one(position: int) -> dict[str, np.ndarray]:
                out = {name: np.zeros((1, *of[0]), of[1]) for name, of in rows.fields.items()}
                rows.fill([position], out)
                return {name: array[0] for name, array in out.items()}

            ds = grain.MapDataset.range(start * size, end * size).map(one)
            return iter(in_batches(ds, size, self.threads))

        return cached(
            source,
            **dict(where=self.cache, folder=self.cache_dir, crop=self.crop, read=read),
            image_size=self.image_size,
            whole=whole,
        )


def more_cores() -> str:
    """Who gives this process more cores, and how many it needs."""
    usable, installed = cores(), cores_of_machine()
    if "SLURM_JOB_ID" in os.environ:
        return (
            f"ask Slurm for more than {number_of(usable, 'core')} for each process: "
            "--cpus-per-task of sbatch, srun or launch/slurm.sh"
        )
    if usable < installed:
        return (
            f"let this process use more than {usable} of the machine's {installed} cores (taskset, "
            "the limits of its container, other processes of this program)"
        )
    return (
        f"take a machine of more than {number_of(usable, 'core')}; with the same --config and "
        "--workdir, python -m gae_jax doctor says how many these images take"
    )


@functools.cache
def _say(text: str) -> None:
    logging.info(text)


def say_readers(source: Source, processes: int, threads: int) -> None:
    """Tell once who reads images."""
    if isinstance(source, Encoded):
        who = (
            number_of(processes, "worker process", "worker processes")
            if processes
            else number_of(threads, "thread")
        )
        verb = "reads" if (processes or threads) == 1 else "read"
        _say(f"data: {who} {verb} images ({number_of(cores(), 'core')}; data.workers)")


def order_of(count: int, seed: int) -> Order:
    """The order of `ImageData.training_batches`, for processes without grain.

    Raises:
      RuntimeError: if grain orders in another way than `Order` does.
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
                f"grain {grain.__version__} shuffles in another way than its version 0.2.18; set "
                "data.workers=0 to read in threads, or install that version"
            )
    return order


def in_batches(ds: grain.MapDataset, size: int, workers: int) -> grain.IterDataset:
    """Batches in the order of ``ds``, whose examples threads read ahead, two batches at most.

    Each thread takes an example at a time: a batch at a time would keep cores idle at its end, and
    as many batches in memory as there are threads.
    """
    ahead = max(2 * size, 2 * workers)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)
    return ds.to_iter_dataset(options).batch(size, drop_remainder=True)
