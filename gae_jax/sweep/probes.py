"""Linear probes of the teacher's and of the tokenizer's latents, which only sweeps measure."""

import logging

import jax
import numpy as np
from einops import rearrange

from gae_jax.evaluation.probe import linear_probe, without_probe
from gae_jax.nn.pixels import to_float
from gae_jax.run.load import load_many
from gae_jax.run.session import Session
from gae_jax.runtime.files import write_json
from gae_jax.runtime.mesh import put_batch
from gae_jax.runtime.progress import Stopwatch, duration

# Commands of sweeps, each with a folder of its name -> the stages whose latents are probed.
PROBES = {"teacher-probe": ("backbone", "teacher"), "latent-probe": ("tokenizer",)}


def probe(session: Session, command: str) -> None:
    """Measure linear probes of the tokenizer's or the teacher's latents, flat and averaged.

    The paper's appendix I has both: all positions concatenated ("flat"), and their mean. For simple
    images the flat probe is at its ceiling, while the mean still shows which latents are semantic.
    """
    folder = session.open(command, sections=("seed", "data", "evaluate"), inputs=PROBES[command])
    if folder.done:
        return
    watch, config = Stopwatch(), session.config.evaluate
    loaded = load_many(session, *PROBES[command])
    networks, arrays = zip(*loaded.values(), strict=True)

    @jax.jit
    def encode(arrays, images):
        *_, model = models = [network(*a) for network, a in zip(networks, arrays, strict=True)]
        images = to_float(images)
        if command == "teacher-probe":
            return model.downsample(models[0].features(images, **model.takes))
        return rearrange(model.encode(images), "b h w d -> b (h w) d")

    def encoded(split: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = session.images(split, config.probe_images)
        rows = []
        for first in range(0, len(images), config.batch_size):
            inside = np.minimum(np.arange(first, first + config.batch_size), len(images) - 1)
            batch = put_batch(images[inside], session.mesh)
            rows.append(jax.device_get(encode(arrays, batch)))
        return np.concatenate(rows)[: len(images)], labels

    train, test = encoded("train"), encoded("holdout")
    if lacks := without_probe(train[1], len(test[1])):
        logging.info("%s: no figures: %s", command, lacks)
        write_json(folder.path / "result.json", {})
        folder.finish(seconds=watch.seconds)
        return
    flat = linear_probe(train, test)
    mean = linear_probe(*((latents.mean(axis=1), labels) for latents, labels in (train, test)))
    write_json(folder.path / "result.json", {"flat": flat, "mean": mean})
    folder.finish(seconds=watch.seconds)
    logging.info(
        "%s: %.1f %%, of the mean %.1f %%, in %s",
        *(command, 100 * flat, 100 * mean, duration(watch.seconds)),
    )
