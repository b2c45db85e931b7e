"""What docs/performance.md says of feeding an accelerator from JPEG files; a few minutes.

    PYTHONPATH=. python tests/feeding.py --out=docs/performance/h200

Makes its files in a temporary folder and writes ``feeding.json``: the pipeline over numbers of
worker processes beside bare processes, and from the cache; the training loop of GAE-L at batch 64
and of configs/folder.py's stages from files, beside the same loop on one repeated batch;
``latents`` of GAE-L from files to shards, beside the encoder alone. Weights are random. With
``--tiny`` small networks take the place of all of them, to try the program.
"""

import argparse
import logging
import os
import platform
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from small import get_config

from gae_jax.benchmark import feeding
from gae_jax.benchmark.data import cores
from gae_jax.benchmark.rows import attempt
from gae_jax.benchmark.timing import random_arrays, time_workload
from gae_jax.benchmark.workloads import timed_workload
from gae_jax.commands import bench
from gae_jax.commands.cli import quiet_libraries
from gae_jax.config import load_config
from gae_jax.config.validate import validate
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.files import write_json
from gae_jax.stages import latents
from gae_jax.tokenizers import tokenizer_network
from gae_jax.train.checkpoint import save_weights

CONFIGS = Path(__file__).parent.parent / "configs"


def config_of(file: str, tiny: bool, **changes):
    """A config of the repository, for one class of images and without released weights."""
    config = get_config() if tiny else load_config(CONFIGS, file)
    config.diffusion.model.num_classes = 1
    config.data.update(changes)
    if config.tokenizer.perceptual.name == "lpips":
        config.tokenizer.perceptual.name = "lpips_random"
    if file == "gae_d32" and not tiny:
        config.tokenizer.train.batch_size = 64
        config.precision.override += (
            *("tokenizer.dtype=bfloat16", "align.dtype=bfloat16"),
            *("perceptual.dtype=bfloat16", "perceptual.precision=default"),
        )
    validate(config)
    return config


def workers_rows(folder: Path, options) -> list[dict]:
    """The rows that ``bench`` has of `data` over numbers of workers."""
    config = config_of("folder", options.tiny)
    config.bench.feeding.update(seconds=options.seconds, images=options.images)
    if options.tiny:
        config.bench.feeding.update(sizes=(64,), workers=(1, 2))
    rows = bench.rows_of_workers(Session(config, Run(folder / "run")))
    return [attempt("bench", name, make) for name, make in rows]


def training_row(folder: Path, name: str, stage: str, options, **changes) -> dict:
    """The training loop of a stage of a config, from files."""
    (inside := folder / "train").mkdir()
    config = config_of(name, options.tiny, **changes)
    session = Session(config, Run(folder / "run"))

    def make():
        sizes = dict(images=options.images, steps=options.steps)
        return feeding.train_from_disk(session, stage, inside, **sizes)

    return attempt("bench", f"train-from-disk/{name}/{stage}/{config.data.cache}", make)


def latents_row(folder: Path, options) -> dict:
    """``latents`` of GAE-L at 256 pixels: whole stage, and the encoder on one resident batch."""
    (root := folder / "images").mkdir()
    feeding.write_files(root, 256, options.latents, 0)
    where = dict(name="folder", root=str(root), holdout=0.01)
    # one view of each image, in the dtype that the encoder alone is timed in
    config = config_of("gae_d32", options.tiny, mirror=False, **where)
    config.precision.override += ("encoder.dtype=bfloat16",)
    config.bench.encode.batch_size = config.latents.batch_size
    config.bench.repeats = 5
    session = Session(config, Run(folder / "run"))
    claimed = session.open("tokenizer", sections=("seed", "data", "tokenizer"), inputs=())
    weights = random_arrays(tokenizer_network(config), np.random.default_rng(0))
    save_weights(claimed.path, "params", {"tokenizer": weights})
    claimed.finish(seconds=0.0, fingerprint="random", weights="params")
    clock = []

    class Timed(latents.ShardWriter):
        """Notes when batches are handed over: the first one ends the compilation."""

        def add(self, batch, rows):
            clock.append((int(batch["index"][0]), time.perf_counter()))
            super().add(batch, rows)

    latents.ShardWriter = Timed
    start = time.perf_counter()
    latents.run(session)
    end = time.perf_counter()
    # of the steady state: from the fourth batch to the end of the stage
    first, since = clock[min(3, len(clock) - 1)]
    count = len(session.source("train")) - first
    encode = time_workload(session, timed_workload(config, "encode"), None, steps=10)
    return {
        "images": count,
        "stage_seconds": end - start,
        "images_per_second": count / (end - since),
        "encoder_images_per_second": encode["images_per_second"],
        "batch_size": config.latents.batch_size,
    }


def main() -> None:
    """Prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of feeding.json")
    parser.add_argument("--parts", default="workers,gae,folder,latents")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--latents", type=int, default=16_384, help="images of the latents")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each loop over workers")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    quiet_libraries()
    found = {
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "cores": cores(),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load_before": os.getloadavg(),
        "seconds": {},
    }
    parts = {
        "workers": lambda folder: workers_rows(folder, options),
        "gae": lambda folder: [training_row(folder, "gae_d32", "tokenizer", options)],
        "folder": lambda folder: [
            training_row(make_folder(folder, at), "folder", stage, options, cache=cache)
            for at, (stage, cache) in enumerate(
                (stage, cache) for stage in ("backbone", "tokenizer") for cache in ("none", "disk")
            )
        ],
        "latents": lambda folder: [
            attempt("bench", "latents", lambda: latents_row(folder, options))
        ],
    }
    for name in options.parts.split(","):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="gae_jax-feeding-") as folder:
            found[name] = parts[name](Path(folder))
        found["seconds"][name] = time.perf_counter() - start
        for row in found[name]:
            logging.info("%s", row)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "feeding.json", found)  # what is measured stays


def cpu_name() -> str:
    """What the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def make_folder(folder: Path, number: int) -> Path:
    (path := folder / str(number)).mkdir()
    return path


if __name__ == "__main__":
    main()
