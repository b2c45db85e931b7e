"""Images per second of the data pipeline, compared with bare decoding and cropping."""

import io
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gae_jax.data import latent_shards, latents, shards
from gae_jax.data.batches import Batches
from gae_jax.data.pipeline import ImageData
from gae_jax.data.workers import ONE_THREAD
from gae_jax.runtime.distributed import cores
from gae_jax.runtime.files import write_bytes, write_json

CROPS = ("center", "random")
SIZE = 500, 375  # of most ImageNet images
QUALITY = 90
PATH = str(Path(__file__).parents[2])  # PYTHONPATH of processes


def full_photographs() -> list[np.ndarray]:
    """scikit-learn's two photographs, uint8 [427, 640, 3]; without it, noise of similar spectrum.

    The power of photographs falls with the square of the frequency, in all three colours.
    """
    try:
        from sklearn.datasets import load_sample_images

        return load_sample_images().images
    except (ImportError, OSError):
        random, shape = np.random.default_rng(0), (427, 640)
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1]))
    frequency[0, 0] = np.inf
    images = []
    for _ in range(2):
        grey, *colours = (
            np.fft.irfft2(np.fft.rfft2(random.standard_normal(shape)) / frequency, shape)
            for _ in range(4)
        )
        pixels = np.stack([grey + 0.2 * colour for colour in colours], axis=-1)
        pixels = 128 + 60 * (pixels - pixels.mean()) / pixels.std()
        images.append(np.clip(pixels, 0, 255).astype(np.uint8))
    return images


def photographs(count: int, seed: int, size: tuple[int, int] = SIZE) -> list[bytes]:
    """Make JPEG files, by default of ImageNet's size: crops of `full_photographs`.

    Args:
      size: width and height.
    """
    random, files = np.random.default_rng(seed), []
    originals = full_photographs()
    width, height = size
    for index in range(count):
        image = originals[index % len(originals)]
        top = int(random.integers(image.shape[0] - height + 1))
        left = int(random.integers(image.shape[1] - width + 1))
        file = io.BytesIO()
        crop = Image.fromarray(image[top : top + height, left : left + width])
        crop.save(file, "jpeg", quality=QUALITY)
        files.append(file.getvalue())
    return files


def write_folder(folder: Path, contents: list[bytes]) -> list[Path]:
    """Write files of one class for the source ``folder``; returns their paths."""
    (inside := folder / "photographs").mkdir()
    paths = [inside / f"{index:06}.jpeg" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def write_images(folder: Path, contents: list[bytes]) -> None:
    """Write one shard and its manifest, as `prepare-data` does."""
    together = folder / "photographs"
    write_bytes(together, b"".join(contents))
    ends = np.cumsum([0, *map(len, contents)])
    examples = [
        shards.Example(0, f"{index:06}.JPEG", str(together), int(ends[index]), len(content))
        for index, content in enumerate(contents)
    ]
    name = shards.shard_name("train", 0, 1)
    entry = shards.write_shard(folder / name, examples, check=False, on_corrupt="error")
    manifest = shards.manifest_of(["photographs"], {"train": [name]}, {name: entry})
    write_json(folder / "manifest.json", manifest)


class Cost(NamedTuple):
    """Seconds per image: wall-clock time, and CPU time of all cores together."""

    clock: float
    cpu: float


class Stopwatch:
    """Measures time since it was created.

    Args:
      others: returns seconds of CPU time of the processes that work for this one.
    """

    def __init__(self, others: Callable[[], float] = lambda: 0.0):
        self._others = others
        self._start = time.perf_counter(), time.process_time() + others()

    def cost(self, images: int) -> Cost:
        clock, cpu = self._start
        spent = time.process_time() + self._others() - cpu
        return Cost((time.perf_counter() - clock) / images, spent / images)


def time_pipeline(batches_of: Batches, batches: int, *, warmup: int) -> Cost:
    """Measure the cost per example of ``batches`` training batches, after ``warmup`` of them."""
    iterator, batch_size = iter(batches_of.read()), batches_of.size
    for _ in itertools.islice(iterator, warmup):
        pass
    watch = Stopwatch(getattr(iterator, "cpu_seconds", lambda: 0.0))
    for _ in itertools.islice(iterator, batches):
        pass
    cost = watch.cost(batches * batch_size)
    iterator.close()
    return cost


def time_bare(
    paths: Sequence[Path], crop: str, size: int, *, workers: int, count: int, warmup: int
) -> Cost:
    """Measure the cost per image of bare processes that read, decode and crop ``count`` images.

    Args:
      paths: files of the images.
      workers: number of processes.
    """
    start = "import sys; from gae_jax.benchmark.bare import main; main()"
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1") | {"PYTHONPATH": PATH}
    command = [sys.executable, "-c", start, crop, str(size)]
    listed = [str(path) for path in paths]
    processes = [
        subprocess.Popen(
            [*command, str(index * len(paths) // workers), *listed],
            **dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment),
        )
        for index in range(workers)
    ]

    def answers() -> list[str]:
        return [process.stdout.readline().strip() for process in processes]

    def run(images: int) -> tuple[float, float]:
        each, begin = -(-images // workers), time.perf_counter()
        for process in processes:
            process.stdin.write(f"{each}\n")
            process.stdin.flush()
        cpu = sum(map(float, answers()))
        return (time.perf_counter() - begin) / (each * workers), cpu / (each * workers)

    try:
        answers()
        run(max(warmup, workers))
        return Cost(*run(count))
    finally:
        for process in processes:
            process.communicate()


def time_data(
    folder: Path,
    crop: str,
    *,
    image_size: int,
    images: int,
    batch_size: int,
    workers: int,
    rates: tuple[float, ...],
    repeats: int,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure one crop; both loops take turns, and the best repeat of each counts.

    Other processes on the machine can only make either slower. The number of cores for an
    accelerator follows from CPU time, which other processes disturb least.

    Args:
      folder: an empty folder for the images.
      crop: "center": ADM's crop; "random": ADM's random crop, and mirror images.
      images: of one repeat.
      workers: processes of either loop; 0: one for each core.
      rates: images per second that one accelerator may need.
      say: is called with the number of cores that each of these needs.
    """
    workers = workers or cores()
    contents = photographs(min(images, 512), seed)
    write_images(folder, contents)
    (files := folder / "files").mkdir()
    paths = write_folder(files, contents)
    data = ImageData(
        name="array_record",
        root=str(folder),
        holdout=0.0,
        image_size=image_size,
        crop=crop,
        mirror=crop == "random",
        on_corrupt="error",
        workers=workers,
    )
    batches, warmup, pipeline, bare = -(-images // batch_size), 2 * workers, [], []
    for _ in range(repeats):
        read = data.training_batches(data.source("train"), batch_size, 0)
        pipeline.append(time_pipeline(read, batches, warmup=warmup))
        bare.append(
            time_bare(
                *(paths, crop, image_size),
                workers=workers,
                count=batches * batch_size,
                warmup=warmup * batch_size,
            )
        )
    row = figures_of(pipeline, bare, batches, batch_size)
    needed = {f"{rate:g}": rate * row["cpu_ms_per_image"] / 1e3 for rate in rates}
    for rate, number in needed.items():
        say(f"{crop} crop: {rate} images/s for one accelerator need {number:.1f} cores like these")
    return row | {
        "workers": workers,
        "cores_per_accelerator": needed,
        "bytes_per_image": float(np.mean([len(content) for content in contents])),
    }


def random_latents(
    folder: Path, shape: tuple[int, ...], random: np.random.Generator
) -> latents.LatentSet:
    """Write four shards of 1,024 images, two views each, of class 0 to an empty folder."""
    parts, images = 4, 1024
    for index in range(parts):
        rows = random.standard_normal((images, 2, *shape), np.float32)
        labels = np.zeros(images, np.int32)
        latent_shards.write_shard(folder, index, rows, labels, tokenizer="random", skipped=0)
    latent_shards.finish_set(folder, parts, dtype="float32", tokenizer="random")
    return latents.LatentSet.open(folder)


def time_latents(
    folder: Path, shape: tuple[int, ...], *, batch_size: int, workers: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Measure reading latents from disk, two views each, compared with a plain gather.

    Args:
      folder: an empty folder for `random_latents`.
      shape: of a latent, (h, w, d).
      workers: threads that read; 0: one for each core.
    """
    random = np.random.default_rng(seed)
    stored = random_latents(folder, shape, random)
    workers, batches = workers or cores(), 32
    read = stored.training_batches(batch_size, seed, workers)
    pipeline, bare = [], []
    for _ in range(repeats):
        pipeline.append(time_pipeline(read, batches, warmup=2 * workers))
        watch = Stopwatch()
        for _ in range(batches):
            chosen = random.integers(len(stored), size=batch_size)
            np.stack([stored[index]["latent"][0] for index in chosen])
        bare.append(watch.cost(batches * batch_size))
    row = figures_of(pipeline, bare, batches, batch_size)
    return row | {"workers": workers, "bytes_per_image": 4.0 * np.prod(shape)}


def figures_of(
    pipeline: list[Cost], bare: list[Cost], batches: int, batch_size: int
) -> dict[str, Any]:
    """The figures of both kinds of rows; the best repeat counts."""
    costs = {"": pipeline, "bare_": bare}
    best = {name: Cost(*map(min, zip(*repeats, strict=True))) for name, repeats in costs.items()}
    figures = {}
    for name, cost in best.items():
        figures[f"{name}images_per_second"] = 1 / cost.clock
        figures[f"{name}cpu_ms_per_image"] = 1e3 * cost.cpu
    return {
        "steps": batches,
        "repeats": len(pipeline),
        "images_per_step": batch_size,
        "ms_per_step": 1e3 * batch_size * best[""].clock,
        "ms_per_step_min": 1e3 * batch_size * best[""].clock,
        "ms_per_step_max": 1e3 * batch_size * max(cost.clock for cost in pipeline),
        **figures,
        "of_bare": best["bare_"].clock / best[""].clock,
        "cpu_of_bare": best["bare_"].cpu / best[""].cpu,
        "cores": cores(),
        "devices": 0,
    }
