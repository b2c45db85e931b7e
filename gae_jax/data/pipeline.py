"""Grain pipelines: endless shuffled batches for training, one ordered pass for extraction."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from gae_jax.data.images import CROPS, center_crop, random_crop
from gae_jax.data.sources import Source, make_source


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
    """

    examples: grain.MapDataset
    size: int
    workers: int
    name: str
    light: bool = False

    @property
    def identity(self) -> str:
        """What a position belongs to."""
        return f"{self.name}, batches of {self.size}"

    def read(self, rows: Sequence[int] | None = None, start: int = 0) -> grain.IterDataset:
        """Batches from number ``start`` on: their ``rows``, all of them by default."""
        rows = range(self.size) if rows is None else [int(row) for row in rows]
        count, end = len(rows), sys.maxsize // self.size
        if self.light:

            def batch(index: int) -> dict[str, np.ndarray]:
                found = [self.examples[index * self.size + row] for row in rows]
                return {name: np.stack([one[name] for one in found]) for name in found[0]}

            options = grain.ReadOptions(
                num_threads=self.workers, prefetch_buffer_size=max(8, self.workers)
            )
            return grain.MapDataset.range(start, end).map(batch).to_iter_dataset(options)

        def example(position: int) -> dict[str, np.ndarray]:
            batch, at = divmod(position, count)
            return self.examples[batch * self.size + rows[at]]

        ds = grain.MapDataset.range(start * count, end).map(example)
        return in_batches(ds, count, self.workers)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A config's data section: what the images are and how they are cut."""

    name: str
    root: str
    holdout: float
    image_size: int
    crop: str
    mirror: bool
    on_corrupt: str
    workers: int
    dataset: str = ""
    exif: str = "ignore"

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

    def training_batches(self, source: Source, batch_size: int, seed: int) -> Batches:
        """Endless ``{"image": uint8 [b, S, S, 3], "label": int32 [b]}``, reshuffled every epoch."""

        def augment(item: dict, rng: np.random.Generator) -> dict:
            if self.crop == "random":
                image = random_crop(item["image"], self.image_size, rng)
            else:
                image = center_crop(item["image"], self.image_size)
            if self.mirror and rng.random() < 0.5:
                # contiguous: a reversed view costs more when its batch is stacked
                image = np.take(image, np.arange(self.image_size)[::-1], axis=1)
            return {"image": image, "label": np.int32(item["label"])}

        ds = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(augment)
        how = f"{self.crop} crop of {self.image_size}, mirror {self.mirror}, seed {seed}"
        return Batches(ds, batch_size, self.workers, f"{source!r}, {how}")

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
        readable = getattr(source, "readable", lambda index: True)
        indices = range(len(source)) if indices is None else indices
        batches = max(batches, -(-len(indices) // batch_size))

        def cut(position: int) -> dict:
            inside = position < len(indices)
            at = int(indices[min(position, len(indices) - 1)]) if len(indices) else 0
            item = source[at]
            return {
                "image": CROPS[crop](item["image"], self.image_size).pixels,
                "label": np.int32(item["label"]),
                "index": np.int64(at),
                "valid": np.bool_(inside and readable(at)),
            }

        ds = grain.MapDataset.range(batches * batch_size).map(cut)
        return iter(in_batches(ds, batch_size, self.workers))


def in_batches(ds: grain.MapDataset, size: int, workers: int) -> grain.IterDataset:
    """Batches in the order of ``ds``, whose examples threads read ahead, two batches at most.

    Each thread takes an example at a time: a batch at a time would keep cores idle at its end, and
    as many batches in memory as there are threads.
    """
    ahead = max(2 * size, 2 * workers)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=ahead)
    return ds.to_iter_dataset(options).batch(size, drop_remainder=True)
