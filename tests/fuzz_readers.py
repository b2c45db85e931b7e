"""What the fuzz damages: for every kind of file of the package a sound sample and its reader.

A sample is made once; ``read`` is called with the folder of a copy in which one file is damaged. A
new reader is a function with ``@kind(make)``: `fuzz` finds it in `KINDS`.
"""

import io
import json
import os
import pickle
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    """
    Attributes:
      make: writes a sound sample into a folder.
      read: reads all of it.
      spared: parts of paths of files that are not damaged, of which another kind takes care.
      whole: pattern of folders that an error may name instead of a file somewhere in them.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    spared: tuple[str, ...] = ()
    whole: str = ""


KINDS: dict[str, Kind] = {}


def kind(make: Callable, *spared: str, whole: str = ""):
    def add(read: Callable) -> Callable:
        KINDS[read.__name__] = Kind(make, read, spared, whole)
        return read

    return add


def _images(folder: Path) -> None:
    import imagenet
    from PIL import Image

    pixels = [np.asarray(Image.open(io.BytesIO(content))) for content in imagenet.jpegs(0, 6)]
    for at, (name, more) in enumerate(
        [
            ("a/0.jpg", {"quality": 90}),
            ("a/1.png", {}),
            ("a/2.webp", {}),
            ("b/3.png", {"mode": "P"}),
            ("b/4.jpg", {"mode": "CMYK"}),
            ("b/5.png", {"mode": "LA"}),
        ]
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        image = Image.fromarray(pixels[at])
        image.convert(more.pop("mode", "RGB")).save(folder / name, **more)


@kind(_images)
def images(folder: Path) -> None:
    from gae_jax.data.images import center_crop, random_crop
    from gae_jax.data.sources.folder import Folder

    source = Folder(str(folder), "train", holdout=0.0)
    for index in range(len(source)):
        image = source[index]["image"]
        center_crop(image, 32)
        random_crop(image, 32, np.random.default_rng(0))


def _tensors() -> dict[str, np.ndarray]:
    return {
        "blocks.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "blocks.0.bias": np.ones(3, np.float16),
        "count": np.array(7, np.int64),
    }


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    import safetensors.numpy

    safetensors.numpy.save_file(tensors, path)


@kind(lambda folder: _save(folder / "model.safetensors", _tensors()))
def weights(folder: Path) -> None:
    from gae_jax.interop.files import read_state_dict

    read_state_dict(folder / "model.safetensors")


def _parts(folder: Path) -> None:
    places = {}
    for number, (name, tensor) in enumerate(_tensors().items()):
        part = f"model-0000{number + 1}-of-00003.safetensors"
        _save(folder / part, {name: tensor})
        places[name] = part
    index = {"metadata": {"total_size": 62}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@kind(_parts)
def weights_in_parts(folder: Path) -> None:
    from gae_jax.interop.files import read_state_dict

    read_state_dict(folder)


class _Storage:
    def __init__(self, key: str, count: int):
        self.key, self.count = key, count


def _torch_file(path: Path) -> None:
    """What ``torch.save`` writes of ``{"ema": {name: tensor}, "step": 3}``, without torch."""
    import zipfile

    fake, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def rebuild(*_):
        raise NotImplementedError

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    storage = type("FloatStorage", (), {"__module__": "torch"})
    utils._rebuild_tensor_v2, fake._utils, fake.FloatStorage = rebuild, utils, storage

    class Tensor:
        def __init__(self, key, array):
            self.key, self.array = key, array

        def __reduce__(self):
            strides = tuple(x // self.array.itemsize for x in self.array.strides)
            stored = _Storage(self.key, self.array.size)
            return rebuild, (stored, 0, self.array.shape, strides, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, _Storage):
                return ("storage", storage, value.key, "cpu", value.count)
            return None

    arrays = {name: x.astype(np.float32) for name, x in _tensors().items()}
    there = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": fake, "torch._utils": utils})
    try:
        text = io.BytesIO()
        tensors = {name: Tensor(str(i), x) for i, (name, x) in enumerate(arrays.items())}
        Pickler(text, 2).dump({"ema": tensors, "step": 3})
    finally:
        for name, module in there.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        archive.writestr("archive/byteorder", "little")
        for i, x in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", x.tobytes())
        archive.writestr("archive/version", "3\n")


@kind(lambda folder: _torch_file(folder / "checkpoint.pt"))
def torch_file(folder: Path) -> None:
    from gae_jax.interop.files import read_checkpoint

    read_checkpoint(folder / "checkpoint.pt", "ema")


def _samples(folder: Path) -> None:
    from PIL import Image

    from gae_jax.evaluation.archives import write_samples

    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    write_samples(folder / "samples.npz", pixels, np.arange(5))
    np.save(folder / "samples.npy", pixels)
    (folder / "png").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "png" / f"{index:06}_0001.png")


@kind(_samples)
def samples(folder: Path) -> None:
    from gae_jax.evaluation.archives import open_samples, samples_digest
    from gae_jax.evaluation.stored_statistics import is_statistics

    for name in ("samples.npz", "samples.npy", "png"):
        is_statistics(folder / name)
        found = open_samples(folder / name)
        for batch in found.batches(2):
            assert batch.dtype == np.uint8
        samples_digest(folder / name)


def _statistics(folder: Path) -> None:
    from gae_jax.evaluation.stored_statistics import write_statistics

    rows = np.random.default_rng(0).normal(size=(20, 6))
    mean, covariance = rows.mean(0), np.cov(rows, rowvar=False)
    facts = dict(count=20, front_end="tf", facts={})
    write_statistics(folder / "ours.npz", {"pool": (mean, covariance)}, **facts)
    np.savez(folder / "fid.npz", mu=mean, sigma=covariance)
    content = {"fid": {"mu": mean, "sigma": covariance}}
    (folder / "edm2.pkl").write_bytes(pickle.dumps(content))


@kind(_statistics)
def statistics(folder: Path) -> None:
    from gae_jax.evaluation.stored_statistics import is_statistics, load_statistics

    for name in ("ours.npz", "fid.npz", "edm2.pkl"):
        is_statistics(folder / name)
        load_statistics(folder / name)


def _tars(folder: Path) -> None:
    import imagenet

    imagenet.write_tars(folder)
    rows = imagenet.images()["val"]
    (folder / "labels.txt").write_text("".join(f"{name} {wnid}\n" for wnid, name, _ in rows))


def _originals(folder: Path, labels) -> None:
    from gae_jax.data.originals import from_tars
    from gae_jax.data.shards import listing_of

    found = from_tars(folder / "train.tar", folder / "val.tar", labels)
    for examples in found.splits.values():
        listing_of(examples)
        for example in examples:
            example.read()


@kind(_tars, "labels", "devkit")
def tars(folder: Path) -> None:
    from gae_jax.data.imagenet import read_val_labels

    _originals(folder, read_val_labels(folder / "labels.txt", None))


@kind(_tars, "train", "val")
def labels_of_val(folder: Path) -> None:
    from gae_jax.data.imagenet import read_val_labels

    for file, devkit in (("labels.txt", None), (None, "devkit.tar.gz")):
        given = [folder / name if name else None for name in (file, devkit)]
        _originals(folder, read_val_labels(*given))


def _shards(folder: Path) -> None:
    import imagenet

    from gae_jax.commands import prepare_data

    tree = imagenet.write_tree(folder / "tree")
    options = [f"--source={tree}", f"--out={folder}/shards", "--shard-images=4", "--workers=1"]
    prepare_data.prepare(prepare_data.parse(options))


@kind(_shards, "tree/")
def shards(folder: Path) -> None:
    from gae_jax.data.sources.array_record import ArrayRecords

    for split in ("train", "holdout"):
        source = ArrayRecords(str(folder / "shards"), split)
        for index in range(len(source)):
            source[index]


@kind(_shards, "tree/")
def shards_again(folder: Path) -> None:
    """--verify, and the command that made the folder once more."""
    from gae_jax.commands import prepare_data

    options = [f"--source={folder}/tree", f"--out={folder}/shards", "--shard-images=4"]
    prepare_data.prepare(prepare_data.parse([*options, "--workers=1", "--no-check"]))
    prepare_data.verify(folder / "shards")


def _latents(folder: Path) -> None:
    from gae_jax.data import latent_shards as sets

    rng = np.random.default_rng(0)
    for name, dtype in (("full", "float32"), ("half", "bfloat16")):
        (folder / name).mkdir()
        for index in range(2):
            rows = rng.normal(size=(3, 2, 2, 2, 4)).astype(sets.DTYPES[dtype])
            facts = dict(tokenizer="abc", skipped=0, elements=True)
            sets.write_shard(folder / name, index, rows, np.arange(3), **facts)
        facts = dict(dtype=dtype, statistics_of="element", tokenizer="abc", views=["image"])
        sets.finish_set(folder / name, 2, **facts)


@kind(_latents)
def latents(folder: Path) -> None:
    from gae_jax.data.latent_shards import finished_shards
    from gae_jax.data.latents import LatentSet

    for name in ("full", "half"):
        finished_shards(folder / name, 2, tokenizer="abc")
        found = LatentSet.open(folder / name)
        for index in range(len(found)):
            found[index]
        assert np.shape(found.mean) == np.shape(found.std)
        assert len(found.labels) == len(found)


@kind(_latents, "labels-", "latents-", "manifest", "elements")
def latents_unfinished(folder: Path) -> None:
    from gae_jax.data.latent_shards import finish_set

    facts = dict(tokenizer="abc", views=["image"])
    finish_set(folder / "full", 2, dtype="float32", statistics_of="element", **facts)


def _released_latents(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in range(2):
        tensors = {
            "latents": rng.normal(size=(3, 4, 2, 2)).astype(np.float32),
            "latents_flip": rng.normal(size=(3, 4, 2, 2)).astype(np.float32),
            "labels": np.arange(3),
        }
        _save(folder / f"latents_rank00_shard00{shard}.safetensors", tensors)
    ones = np.ones((1, 4, 1, 1), np.float32)
    _save(folder / "latents_stats.safetensors", {"mean": ones, "std": ones})


@kind(_released_latents)
def released_latents(folder: Path) -> None:
    from gae_jax.porting.torch_latents import read_latents, survey

    found = survey(folder, (2, 2, 4))
    for file in found.files:
        read_latents(file, found.views, np.dtype(np.float32))


if "FUZZ_FAULT" in os.environ:  # set by test_fuzz for child processes: a reader with that fault

    @kind(lambda folder: (folder / "file").write_bytes(bytes(range(100))))
    def faulty(folder: Path) -> None:
        if (folder / "file").read_bytes() != bytes(range(100)):
            from gae_jax.runtime.errors import UserError

            exec(os.environ["FUZZ_FAULT"], {"os": os, "time": time, "UserError": UserError})
