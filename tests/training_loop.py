"""How fast the training loop of the diffusion model is with its data, logging and host in it.

    PYTHONPATH=. python tests/training_loop.py dit_xl_d32_80ep --batch=256 --steps=100

Trains on random latents from disk by the loop that `diffusion` has, and prints milliseconds a step
and images a second over the second half of the steps, to hold against `dit-train` of `bench`, whose
batches lie on the device. The checkpoint at the end is written and thrown away.
"""

import argparse
import dataclasses
import logging
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from gae_jax.benchmark.data import random_latents
from gae_jax.commands.cli import quiet_libraries
from gae_jax.config import load_config
from gae_jax.config.validate import validate
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.files import write_json
from gae_jax.stages import diffusion
from gae_jax.tokenizers import latent_shape
from gae_jax.train.fit import fit

CONFIGS = Path(__file__).parent.parent / "configs"


def main() -> None:
    """Prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a file of configs/, without .py")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/training_loop.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    quiet_libraries()
    config, clock = load_config(CONFIGS, options.config), []
    validate(config)
    config.evaluate.online.images = 0  # the evaluation below takes the time instead

    def evaluate(state):
        jax.block_until_ready(state)
        clock.append(time.perf_counter())
        return {}

    half = options.steps // 2
    with tempfile.TemporaryDirectory(prefix="gae_jax-loop-") as folder:
        session = Session(config, Run(Path(folder) / "run"))
        (shards := Path(folder) / "latents").mkdir()
        latents = random_latents(shards, latent_shape(config), np.random.default_rng(0))
        stage = dataclasses.replace(diffusion.make_stage(session, latents), evaluate=evaluate)
        fit(
            stage, Path(folder) / "fit", session.mesh, seed=0, steps=2 * half,
            batch_size=options.batch, log_every=config.diffusion.train.log_every, eval_every=half,
            save_every=2 * half, keep=1,
        )  # fmt: skip
    seconds = (clock[1] - clock[0]) / half
    found = {
        "batch": options.batch,
        "device": jax.devices()[0].device_kind,
        "steps": half,
        "ms_per_step": 1e3 * seconds,
        "images_per_second": options.batch / seconds,
    }
    print(found)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(options.out), found)


if __name__ == "__main__":
    main()
