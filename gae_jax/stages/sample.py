"""``sample``: images of given classes, by an SDE and by an ODE, with or without guidance."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from gae_jax.config.precision import settings
from gae_jax.evaluation.sample_files import clear_parts, digest, finish_set, finished_parts, part_of
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.generators.sampling import MAKERS, Networks, make_draw
from gae_jax.nn.quantized import with_matmuls
from gae_jax.run import amendments
from gae_jax.run.run import StageFolder
from gae_jax.run.sampling import batches_of_images, bind_sampler, load_networks
from gae_jax.run.session import Session
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import read_npy, write_npz
from gae_jax.runtime.mesh import jit_on
from gae_jax.runtime.progress import Progress, Stopwatch, duration
from gae_jax.tokenizers import latent_shape, tokenizer_network


def draw_set(
    session: Session,
    networks: Networks,
    folder: Path,
    labels: np.ndarray,
    sampler: Callable,
    what: str,
) -> int:
    """Draw the batches of a set that are not finished; each is written to a file of its own.

    Returns:
      The network calls per image, the most of all batches.
    """
    size, most = session.config.sample.batch_size, 0
    finished = distributed.agree(lambda: finished_parts(folder, labels, size))
    with Progress(what, len(labels), unit="image") as progress:
        draw = jit_on(session.mesh)(make_draw(networks, sampler))
        for ids, draw_batch in batches_of_images(session, draw, networks.arrays, labels, size):
            calls = finished.get(str(ids.start))
            if calls is None:
                images, calls = draw_batch()
                drawn = labels[ids.start : ids.stop]
                arrays = {"images": images, "calls": np.asarray(calls), "labels": drawn}
                write_npz(part_of(folder, ids), arrays)
            most = max(most, calls)
            progress.update(len(ids))
    return most


def read_labels(path: Path, classes: int) -> np.ndarray:
    """Read int32 labels [n] of a file with one per line, or of an ``.npy`` file, in their order.

    Raises:
      DataError: naming the file and what is wrong with it.
    """
    try:
        labels = read_npy(path) if path.suffix == ".npy" else np.loadtxt(path, ndmin=1)
    except Exception as error:  # of damaged files numpy raises more than ValueError
        raise DataError(f"sample.labels_file: {path} cannot be read: {error}") from None
    if labels.dtype.kind not in "iuf":
        raise DataError(
            f"sample.labels_file: {path} holds {labels.dtype}, no numbers; give one class per image"
        )
    if labels.ndim != 1 or not len(labels):
        raise DataError(
            f"sample.labels_file: {path} has shape {list(labels.shape)}; give one class per image"
        )
    odd = labels[(labels != np.round(labels)) | (labels < 0) | (labels >= classes)]
    if len(odd):
        raise DataError(
            f"sample.labels_file: {path} has the class {odd[0]:g}; the model knows 0 to "
            f"{classes - 1}"
        )
    return labels.astype(np.int32)


def make_labels(config, classes: int, seed: int) -> np.ndarray:
    """Make int32 labels [n]: those of a file, or ``per_class`` for every class to draw.

    "uniform" labels are shuffled: metrics that read samples in file order must not see them sorted
    by class.
    """
    if config.labels == "file":
        return read_labels(Path(config.labels_file), classes)
    chosen = np.array(config.classes or range(classes), np.int32)
    random = np.random.default_rng(seed)
    if config.labels == "random":
        return random.choice(chosen, config.per_class * len(chosen))
    return random.permutation(np.repeat(chosen, config.per_class))


def check(session: Session) -> None:
    """Raises ConfigError if sets are to be drawn with matmuls that this machine does not have."""
    config = session.config
    if session.fresh or not session.run.stage("sample").done:
        network = diffusion_network(config.diffusion, latent_shape(config))
        with_matmuls(network, settings(config, "sampler")["matmuls"])
        with_matmuls(tokenizer_network(config), settings(config, "decoder")["matmuls"])


def run(session: Session) -> StageFolder:
    """Draw the sets that the config names, except finished sets and finished batches."""
    folder = session.open("sample", sections=("seed", "sample"), inputs=("tokenizer", "diffusion"))
    if folder.done:
        return folder
    watch, config = Stopwatch(), session.config.sample
    sampler, decoder = (settings(session.config, name) for name in ("sampler", "decoder"))
    networks = load_networks(session, config.weaker, sampler=sampler, decoder=decoder)
    stage = session.run.stage("diffusion")
    weights, model = stage.require_done()["weights"], stage.config.diffusion.model
    labels = make_labels(config, model.num_classes, session.config.seed)
    for name in config.sets:
        path = folder.path / name
        if not distributed.agree((path / "manifest.json").exists):
            section = bind_sampler(name, config[name])
            draw = MAKERS[name](**section)
            calls = draw_set(session, networks, path, labels, draw, f"sample {name}")
            facts = {
                **section,
                "sampler": name,
                "network_calls": calls,
                "labels": config.labels,
                "weights": weights,
                "weaker": config.weaker,
                "dtype": sampler["dtype"],
                "matmuls": sampler["matmuls"],
                "decoder_dtype": decoder["dtype"],
                "decoder_matmuls": decoder["matmuls"],
                "seed": session.config.seed,
                **amendments.history({"diffusion": stage.done}),
            }
            distributed.agree(partial(finish_set, path, labels, facts, png=config.png))
        distributed.agree(partial(clear_parts, path))
    files = [folder.path / name / "samples.npz" for name in config.sets]
    folder.finish(
        seconds=watch.seconds,
        count=len(labels),
        sets=list(config.sets),
        fingerprint=distributed.agree(lambda: digest(files)),
    )
    logging.info(
        "sample: %d images, %s, in %s",
        *(len(labels), " and ".join(config.sets), duration(watch.seconds)),
    )
    return folder
