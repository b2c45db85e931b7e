"""``teacher``: the semantic downsampler, trained by cosine distillation of the backbone.

With ``teacher.kind=svd`` nothing is trained: one pass over images gives the projection.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax import losses
from gae_jax.config import backbone_shape, bind
from gae_jax.data.images import to_float
from gae_jax.models.layers import rms_norm
from gae_jax.models.teacher import SecondMoment, svd_projection
from gae_jax.parallel import check_batch, place, put_batch
from gae_jax.run import StageFolder, Stopwatch
from gae_jax.stages.backbone import held_out_batches
from gae_jax.stages.load import load, teacher_network
from gae_jax.stages.session import Session
from gae_jax.train.checkpoint import save_weights
from gae_jax.train.fit import Stage, Step, batch_iterator
from gae_jax.train.log import Metrics, Progress, duration
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import (
    Network,
    TrainState,
    apply_gradients,
    fingerprint,
    make_state,
)


def distance(backbone: Network, teacher: Network, frozen, arrays, images: jax.Array) -> jax.Array:
    """Cosine distance of the features that the teacher gives back from the backbone's.

    Args:
      frozen, arrays: of backbone and teacher.
      images: uint8 [B, S, S, 3].
    """
    features = backbone(*frozen).features(to_float(images))
    target = jax.lax.stop_gradient(rms_norm(features))
    model = teacher(*arrays)
    return losses.cosine_distance(model.reconstruct(model.downsample(features)), target)


def held_out_distance(session: Session, backbone: Network, teacher: Network):
    """(frozen, arrays) -> `distance` on a few held-out batches."""
    of_batch = jax.jit(partial(distance, backbone, teacher))

    def evaluate(frozen, arrays) -> float:
        # padding repeats the last image: good enough for a figure shown during training
        found = [
            of_batch(frozen, arrays, put_batch(batch["image"], session.mesh))
            for batch in held_out_batches(session)
        ]
        return float(jnp.mean(jnp.stack(found)))

    return evaluate


def make_step(
    config, backbone: Network, teacher: Network
) -> tuple[Callable[[jax.Array], TrainState], Step]:
    """The decoder's features against the backbone's, by cosine distance.

    Args:
      config: the section ``teacher``.

    Returns:
      (init, step), as `Stage` has them; batches have image [B, S, S, 3], uint8, and ``frozen`` is
      (parameters, rest) of the backbone.
    """
    optimizer = make_optimizer(
        config.train.steps, **bind(make_optimizer, config.optim, "teacher.optim")
    )

    def step(state: TrainState, batch, key, frozen, phase):
        del key, phase

        def loss_fn(params):
            arrays = params, state.rest["teacher"]
            return distance(backbone, teacher, frozen, arrays, batch["image"])

        loss, grads = jax.value_and_grad(loss_fn)(state.params["teacher"])
        state = apply_gradients(state, "teacher", grads, optimizer)
        state = dataclasses.replace(state, step=state.step + 1)
        return state, {"cosine_distance": loss}

    return lambda key: make_state(key, {"teacher": teacher}, {"teacher": optimizer}), step


def make_stage(session: Session) -> Stage:
    """`make_step` on the run's images."""
    config, data = session.config.teacher, session.data
    source = session.source("train")
    backbone, backbone_arrays = load(session.run.stage("backbone"), session.mesh)
    network = teacher_network(config.model, session.config.backbone)
    init, step = make_step(config, backbone, network)
    on_held_out = held_out_distance(session, backbone, network)

    def evaluate(state):
        arrays = state.params["teacher"], state.rest["teacher"]
        return {"cosine_distance": on_held_out(backbone_arrays, arrays)}

    return Stage(
        name="teacher",
        init=init,
        step=step,
        batches=lambda size: data.training_batches(source, size, session.config.seed),
        frozen=backbone_arrays,
        evaluate=evaluate,
    )


def second_moment(session: Session, backbone: Network, frozen) -> SecondMoment:
    """Of the tokens of ``teacher.svd.images`` training images, or all if there are fewer."""
    config, source = session.config.teacher, session.source("train")
    count, batch_size = min(config.svd.images, len(source)), config.train.batch_size
    features = jax.jit(lambda frozen, images: backbone(*frozen).features(to_float(images)))
    found = SecondMoment(backbone_shape(session.config.backbone)[1])
    # shuffled by the seed: the first images of the first epoch are of all classes, none is twice
    batches = session.data.training_batches(source, batch_size, session.config.seed)
    batches = batch_iterator(batches, session.mesh)
    with Progress("teacher", count, unit="image") as progress, contextlib.closing(batches):
        for batch in itertools.islice(batches, -(-count // batch_size)):
            valid = np.arange(batch_size) < count - found.images
            found.add(features(frozen, batch["image"]), valid)
            progress.update(int(valid.sum()))
    return found


def project(session: Session, folder: StageFolder) -> None:
    """Fits the SVD teacher in one pass and marks its folder as finished."""
    config, watch = session.config.teacher, Stopwatch()
    check_batch(config.train.batch_size, session.mesh, "teacher.train.batch_size")
    backbone, frozen = load(session.run.stage("backbone"), session.mesh)
    found = second_moment(session, backbone, frozen)
    vectors = svd_projection(found.total, config.model.latent_dim)
    weights = {"teacher": ({}, {"projection": vectors.astype(np.float32)})}
    save_weights(folder.path, "params", weights)
    network = teacher_network(config.model, session.config.backbone, config.kind)
    arrays = place(weights["teacher"], session.mesh)
    figures = {
        # of the tokens' squared length
        "kept_share": float(np.sum(vectors * (found.total @ vectors)) / np.trace(found.total)),
        "eval/cosine_distance": held_out_distance(session, backbone, network)(frozen, arrays),
    }
    metrics = Metrics(folder.path, 0)
    metrics.write(1, figures)
    metrics.close()
    folder.finish(
        seconds=watch.seconds,
        fingerprint=fingerprint(weights),
        weights="params",
        parameters={"teacher": vectors.size},
        images=found.images,
    )
    text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    logging.info("teacher: %d images in %s  %s", found.images, duration(watch.seconds), text)


def run(session: Session) -> StageFolder:
    """Trains or fits the teacher, unless the run has it."""
    folder = session.open(
        "teacher", sections=("seed", "data", "backbone", "teacher"), inputs=("backbone",)
    )
    if folder.done:
        return folder
    if session.config.teacher.kind == "svd":
        project(session, folder)
    else:
        session.train(folder, make_stage(session), keep=("teacher",), which="params")
    return folder
