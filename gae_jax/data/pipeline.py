"""Image pipelines: endless shuffled batches for training, one ordered pass for extraction.

Examples are made by grain in threads of this process, or by worker processes (`data.workers`);
the batches are the same, bit for bit.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from gae_jax.data.batches import Batches, ReadAhead, in_batches, shuffled_order
from gae_jax.data.cache import cached
from gae_jax.data.cached_images import DecodedRows
from gae_jax.data.rows import Augmentation, OrderedRows, TrainingRows
from gae_jax.data.sources import Source, make_source
from gae_jax.data.sources.base import Encoded
from gae_jax.data.workers import WorkerBatches
from gae_jax.runtime.distributed import cores, cores_of_machine
from gae_jax.runtime.errors import number_of

AUTO = "auto"
# With fewer images threads have read all of them before worker processes have started.
FEW_IMAGES = 1_000
THREADS = 8  # most threads that read if no processes do; more would only wait for Python's lock


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A config's data section: which images, how they are cropped, and how they are read."""

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
        """Return how many worker processes read ``images`` of a source; 0: threads do."""
        if not isinstance(source, Encoded):  # in memory, nothing to decode
            return 0
        if self.workers != AUTO:
            return int(self.workers)
        count = cores()
        return count if count > 1 and images >= FEW_IMAGES else 0

    @property
    def threads(self) -> int:
        """Number of threads that read if no worker processes do."""
        return min(THREADS, cores() if self.workers in (AUTO, 0) else int(self.workers))

    def training_batches(self, source: Source, batch_size: int, seed: int) -> Batches:
        """Make endless batches, reshuffled every epoch.

        Returns:
          Batches of ``{"image": uint8 [b, S, S, 3], "label": int32 [b]}``.
        """
        processes = self.processes(source, len(source))
        how = f"{self.crop} crop of {self.image_size}, mirror {self.mirror}, seed {seed}"
        name = f"{source!r}, {how}"
        images = self.cached(source)
        crop = Augmentation(image_size=self.image_size, crop=self.crop, mirror=self.mirror)
        task = None
        if processes:
            remedy = ", or let threads read images: --config.data.workers=0"
            task = TrainingRows(images, shuffled_order(len(source), seed, otherwise=remedy), crop)

        def augment(item: dict, rng: np.random.Generator) -> dict:
            image = crop(item, rng)
            # contiguous: a reversed view costs more when its batch is stacked
            return {"image": np.ascontiguousarray(image), "label": np.int32(item["label"])}

        ds = grain.MapDataset.source(images).seed(seed).shuffle().repeat().random_map(augment)
        log_readers(source, processes, self.threads)
        return Batches(
            ds,
            batch_size,
            self.threads,
            name,
            task=task,
            processes=processes,
            remedy=self.remedy(source, processes),
        )

    def remedy(self, source: Source, processes: int) -> str:
        """Say what to do if the device waits for batches: fields to set, and how to get cores."""
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
        indices: Sequence[int] | np.ndarray | None = None,
        batches: int = 0,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Read every image once, in batches of "image", "label", "index" and "valid".

        The last batch is padded to the same size. ``valid`` is False for padding and for skipped
        unreadable images.

        Args:
          crop: a name in `data.images.CROPS`.
          indices: only these images, in this order.
          batches: least number of batches; the last ones may be all padding.
        """
        indices = range(len(source)) if indices is None else indices
        batches = max(batches, -(-len(indices) // batch_size))
        images = source
        if crop == "adm" or self.crop == "random":  # else the cache holds other pixels
            images = self.cached(source, most=2 * len(indices) > len(source))
        rows = OrderedRows(images, image_size=self.image_size, crop=crop, indices=indices)
        if processes := self.processes(source, len(indices)):
            read = WorkerBatches(
                rows,
                size=batch_size,
                rows=range(batch_size),
                start=0,
                end=batches,
                count=min(processes, batches * batch_size),
            )
            return ReadAhead(read)
        ds = grain.MapDataset.range(batches * batch_size).map(rows.row)
        return iter(in_batches(ds, batch_size, self.threads))

    def cached(self, source: Source, *, most: bool = True) -> Source:
        """Return the source's cache if the config asks for one, else the source; see `cached`."""
        if not isinstance(source, Encoded):
            return source

        def read(rows: DecodedRows, start: int, size: int) -> Iterator[dict[str, np.ndarray]]:
            end = -(-len(source) // size)
            if processes := self.processes(source, len(source) - start * size):
                return WorkerBatches(
                    rows, size=size, rows=range(size), start=start, end=end, count=processes
                )

            def row(position: int) -> dict[str, np.ndarray]:
                out = {name: np.zeros((1, *of[0]), of[1]) for name, of in rows.fields.items()}
                rows.fill([position], out)
                return {name: array[0] for name, array in out.items()}

            ds = grain.MapDataset.range(start * size, end * size).map(row)
            return iter(in_batches(ds, size, self.threads))

        return cached(
            source,
            where=self.cache,
            folder=self.cache_dir,
            crop=self.crop,
            read=read,
            image_size=self.image_size,
            most=most,
        )


def more_cores() -> str:
    """Say how this process gets more cores."""
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
def _log_once(text: str) -> None:
    logging.info(text)


def log_readers(source: Source, processes: int, threads: int) -> None:
    """Log once whether processes or threads read images, and how many."""
    if isinstance(source, Encoded):
        who = (
            number_of(processes, "worker process", "worker processes")
            if processes
            else number_of(threads, "thread")
        )
        verb = "reads" if (processes or threads) == 1 else "read"
        _log_once(f"data: {who} {verb} images ({number_of(cores(), 'core')}; data.workers)")
