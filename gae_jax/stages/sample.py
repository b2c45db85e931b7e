"""``sample``: images of given classes, by an SDE and by an ODE, with or without guidance."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gae_jax.config import bind
from gae_jax.evaluation.sample_files import clear_parts, digest, finish_set, finished_parts, part_of
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.generators.sampling import MAKERS, Networks, make_draw, velocity_of
from gae_jax.nn.network import frozen_compute
from gae_jax.nn.quantized import multiplying, with_products
from gae_jax.run import amendments
from gae_jax.run.load import load
from gae_jax.run.run import Run, StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import read_npy, write_npz
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import check_batch, jit_on, put_batch, to_host
from gae_jax.runtime.progress import Progress, Stopwatch, duration
from gae_jax.tokenizers import latent_shape, tokenizer_network


def load_networks(
    session: Session,
    weaker: str = "",
    *,
    dtype: str = "float32",
    products: str = "same",
    decode_products: str = "same",
    attention: str = "auto",
) -> Networks:
    """The run's networks, each with its arrays on the mesh.

    Args:
      weaker: directory of a run with another diffusion model, for autoguidance.
      dtype: that they compute in.
      products, decode_products: of diffusion models and of the decoder, as
        `quantized.multiplying`.
      attention: of the diffusion models, as `attention.ATTENTIONS`.

    Raises:
      ConfigError: for products that cannot be had.
      DataError: if they do not belong together.
    """
    done = session.run.stage("diffusion").require_done()
    if done["tokenizer"] != session.fingerprint_of("tokenizer"):
        raise DataError(
            f"the diffusion model was trained on latents of tokenizer {done['tokenizer']}, this "
            f"run's is {session.fingerprint_of('tokenizer')}; make both again with: "
            "python -m gae_jax latents --fresh, then python -m gae_jax diffusion --fresh (and the "
            "same --config and --workdir)"
        )
    compute = frozen_compute(dtype, attention)
    found = [
        load(session.run.stage("diffusion"), session.mesh, **compute),
        load(session.run.stage("tokenizer"), session.mesh, **frozen_compute(dtype)),
    ]
    if weaker:
        other = Run(Path(weaker)).stage("diffusion")
        if (theirs := other.require_done()["tokenizer"]) != done["tokenizer"]:
            raise DataError(
                f"sample.weaker: {other.path} was trained on latents of tokenizer {theirs}, this "
                f"run's is {done['tokenizer']}; a weaker model must know the same latents"
            )
        found.append(load(other, session.mesh, **compute))
        scales = [arrays[1] for _, arrays in (found[0], found[2])]
        for name in ("latent_mean", "latent_std"):
            if not np.array_equal(*(np.asarray(scale[name]) for scale in scales)):
                raise DataError(
                    f"sample.weaker: {other.path} has another {name} than this run's model; train "
                    "it on this run's latents"
                )

    diffusion, tokenizer, *others = found
    return Networks(
        with_products(diffusion, products, session.mesh),
        with_products(tokenizer, decode_products, session.mesh),
        *(with_products(other, products, session.mesh) for other in others),
    )


def batches_of_images(
    session: Session, draw: Callable, arrays: tuple, labels: np.ndarray, size: int
) -> Iterator[tuple[range, Callable]]:
    """(ids, function that draws them) batch by batch; nothing is computed before it is called.

    The function gives uint8 images [n, S, S, 3] and the calls of networks per image. Image i
    depends on the seed, label i and i alone: noise is keyed by i, the last batch is filled up with
    images that are thrown away.

    Args:
      draw: of `make_draw`, with the arrays that it takes.
    """
    check_batch(size, session.mesh, "sample.batch_size")
    key = stage_key("sample", session.config.seed)

    def one(first: int):
        ids = np.arange(first, first + size)
        inside = np.minimum(ids, len(labels) - 1)
        batch = put_batch((ids.astype(np.uint32), labels[inside]), session.mesh)
        images, calls = to_host(draw(arrays, key, *batch))
        return images[: len(labels) - first], int(calls)

    for first in range(0, len(labels), size):
        yield range(first, min(first + size, len(labels))), partial(one, first)


def draw_set(
    session: Session,
    networks: Networks,
    folder: Path,
    labels: np.ndarray,
    sampler: Callable,
    what: str,
) -> int:
    """Writes every batch of a set to a part of its own, but for those that are there.

    Returns:
      The calls of networks per image, the largest of all batches.
    """
    size, most = session.config.sample.batch_size, 0
    there = distributed.agree(lambda: finished_parts(folder, labels, size))
    with Progress(what, len(labels), unit="image") as progress:
        draw = jit_on(session.mesh)(make_draw(networks, sampler))
        for ids, one in batches_of_images(session, draw, networks.arrays, labels, size):
            calls = there.get(str(ids.start))
            if calls is None:
                images, calls = one()
                own = labels[ids.start : ids.stop]
                write_npz(part_of(folder, ids), images=images, calls=calls, labels=own)
            most = max(most, calls)
            progress.update(len(ids))
    return most


def read_labels(path: Path, classes: int) -> np.ndarray:
    """int32 labels of a file with one per line, or of an ``.npy`` file, in their order.

    Raises:
      DataError: naming the file and what is wrong with it.
    """
    try:
        found = read_npy(path) if path.suffix == ".npy" else np.loadtxt(path, ndmin=1)
    except Exception as error:  # of damaged files numpy raises more than ValueError
        raise DataError(f"sample.labels_file: {path} cannot be read: {error}") from None
    if found.dtype.kind not in "iuf":
        raise DataError(
            f"sample.labels_file: {path} holds {found.dtype}, no numbers; give one class per image"
        )
    if found.ndim != 1 or not len(found):
        raise DataError(
            f"sample.labels_file: {path} has shape {list(found.shape)}; give one class per image"
        )
    odd = found[(found != np.round(found)) | (found < 0) | (found >= classes)]
    if len(odd):
        raise DataError(
            f"sample.labels_file: {path} has the class {odd[0]:g}; the model knows 0 to "
            f"{classes - 1}"
        )
    return found.astype(np.int32)


def make_labels(config, classes: int, seed: int) -> np.ndarray:
    """int32 labels, ``per_class`` times as many as there are classes to draw from, or a file's.

    "uniform" ones are shuffled: metrics that read samples in file order must not see them sorted
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
    """Raises ConfigError if sets are to be drawn with products that this machine does not have."""
    config = session.config
    if session.fresh or not session.run.stage("samples").done:
        network = diffusion_network(config.diffusion, latent_shape(config))
        multiplying(network, config.sample.products)
        multiplying(tokenizer_network(config), config.sample.decode_products)


def run(session: Session) -> StageFolder:
    """Draws the sets that the config names, unless the run has them.

    A finished set is not drawn again, and neither is a finished batch of an interrupted one.
    """
    folder = session.open("samples", sections=("seed", "sample"), inputs=("tokenizer", "diffusion"))
    if folder.done:
        return folder
    watch, config = Stopwatch(), session.config.sample
    networks = load_networks(
        session,
        config.weaker,
        dtype=config.dtype,
        products=config.products,
        decode_products=config.decode_products,
        attention=config.attention,
    )
    stage = session.run.stage("diffusion")
    weights, model = stage.require_done()["weights"], stage.config.diffusion.model
    labels = make_labels(config, model.num_classes, session.config.seed)
    for name in config.sets:
        there = folder.path / name
        if not distributed.agree((there / "manifest.json").exists):
            section = bind_sampler(name, config[name])
            sampler = MAKERS[name](**section)
            calls = draw_set(session, networks, there, labels, sampler, f"sample {name}")
            facts = {
                **section,
                "sampler": name,
                "network_calls": calls,
                "labels": config.labels,
                "weights": weights,
                "weaker": config.weaker,
                "dtype": config.dtype,
                "products": config.products,
                "decode_products": config.decode_products,
                "seed": session.config.seed,
                **amendments.under_its_name([stage.done]),
            }
            distributed.agree(partial(finish_set, there, labels, facts, png=config.png))
        distributed.agree(partial(clear_parts, there))
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


def bind_sampler(name: str, section) -> dict[str, Any]:
    """The arguments of a sampler; those of the guidance are passed on by name."""
    guidance = {key: section[key] for key in section if key.startswith("guidance")}
    own = {key: section[key] for key in section if key not in guidance}
    bind(velocity_of, guidance, f"sample.{name}")
    return bind(MAKERS[name], own, f"sample.{name}") | guidance
