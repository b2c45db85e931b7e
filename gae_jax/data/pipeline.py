"""Grain pipelines: endless shuffled batches for training, one ordered pass for extraction."""

import dataclasses
from collections.abc import Iterator

import grain
import jax
import numpy as np

from gae_jax.data.images import CROPS, center_crop, random_crop
from gae_jax.data.sources import Source, make_source


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

    def source(self, split: str) -> Source:
        return make_source(
            self.name,
            split,
            root=self.root,
            dataset=self.dataset,
            holdout=self.holdout,
            on_corrupt=self.on_corrupt,
        )

    def training_batches(self, source: Source, batch_size: int, seed: int) -> grain.IterDataset:
        """Endless ``{"image": uint8 [b, S, S, 3], "label": int32 [b]}``, reshuffled every epoch.

        ``batch_size`` is global; a process gets its share. Global batches depend on the seed
        alone, not on the number of processes or threads.
        """

        def augment(item: dict, rng: np.random.Generator) -> dict:
            if self.crop == "random":
                image = random_crop(item["image"], self.image_size, rng)
            else:
                image = center_crop(item["image"], self.image_size)
            if self.mirror and rng.random() < 0.5:
                image = image[:, ::-1]
            return {"image": image, "label": np.int32(item["label"])}

        ds = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(augment)
        return iterate(ds, batch_size, self.workers)

    def ordered(
        self, source: Source, batch_size: int, crop: str = "adm"
    ) -> Iterator[dict[str, np.ndarray]]:
        """Every image once: batches with "image", "label", "index", "valid".

        ``crop`` is a name of `data.images.CROPS`, of the middle of an image.
        The last batch is padded to the same size. ``valid`` is False for padding and for images
        that could not be read and are to be skipped.
        """
        readable = getattr(source, "readable", lambda index: True)

        def cut(index: int) -> dict:
            inside = index < len(source)
            at = min(index, len(source) - 1)
            item = source[at]
            return {
                "image": CROPS[crop](item["image"], self.image_size).pixels,
                "label": np.int32(item["label"]),
                "index": np.int64(at),
                "valid": np.bool_(inside and readable(at)),
            }

        padded = -(-len(source) // batch_size) * batch_size
        ds = grain.MapDataset.range(padded).map(cut).batch(batch_size)
        return iter(ds.to_iter_dataset(self._read_options()))

    def _read_options(self) -> grain.ReadOptions:
        return read_options(self.workers)


def read_options(workers: int) -> grain.ReadOptions:
    """Threads that read ahead of the device."""
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(4 * workers, 8))


def iterate(ds: grain.MapDataset, batch_size: int, workers: int) -> grain.IterDataset:
    """Batches of this process's share; batching comes before threads, so order is fixed."""
    count, index = jax.process_count(), jax.process_index()
    ds = ds.batch(batch_size // count, drop_remainder=True)[index::count]
    return ds.to_iter_dataset(read_options(workers))
