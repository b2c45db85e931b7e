"""``teacher``: the semantic downsampler, trained by cosine distillation of the backbone.

With ``teacher.kind=svd`` nothing is trained: one pass over images gives the projection. With
``teacher.kind=prior`` it is the prior refinement of PAE.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.config import bind
from gae_jax.config.precision import settings
from gae_jax.nn import losses
from gae_jax.nn.layers import rms_norm
from gae_jax.nn.network import Arrays, Loaded, Network, fingerprint
from gae_jax.nn.pixels import to_float
from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.mesh import check_batch, put_batch
from gae_jax.runtime.progress import Progress, Stopwatch, duration
from gae_jax.runtime.sharding import place
from gae_jax.stages.backbone import held_out_batches
from gae_jax.tokenizers import pae_losses
from gae_jax.tokenizers.gae_teacher import SecondMoment, svd_projection, teacher_network
from gae_jax.tokenizers.pae_target import structural_target
from gae_jax.train.accumulate import accumulate
from gae_jax.train.checkpoint import save_weights
from gae_jax.train.feed import Feed
from gae_jax.train.fit import Stage, Step
from gae_jax.train.log import Metrics
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import TrainState, apply_gradients, make_state

# Term of the prior refinement -> its weight's field.
PRIOR_WEIGHTS = {"representation": "representation_weight", "gram": "gram_weight"}


def terms(config, backbone: Network, teacher: Network) -> Callable:
    """Function of (arrays of the backbone, arrays of the teacher, images) -> {term: value}.

    Images are uint8 [B, S, S, 3]. No gradient reaches the backbone. The terms are

    - of a learned teacher and of the SVD's: ``cosine_distance`` of the features that the teacher
      gives back from the backbone's;
    - of PAE's prior refinement: ``representation``, the mean square of the same difference, and
      ``gram``, that of the cosines between the latents' tokens and those of the structural target.

    Args:
      config: the section ``teacher``.
    """

    def cosine(frozen, arrays, images):
        features = backbone(*frozen).features(to_float(images))
        target = jax.lax.stop_gradient(rms_norm(features.astype(jnp.float32)))
        model = teacher(*arrays)
        back = model.reconstruct(model.downsample(features)).astype(jnp.float32)
        return {"cosine_distance": losses.cosine_distance(back, target)}

    def prior(frozen, arrays, images):
        images, model = to_float(images), teacher(*arrays)
        features = backbone(*frozen).features(images, **model.takes)
        features = jax.lax.stop_gradient(features).astype(jnp.float32)
        latents = model.downsample(features)
        structure = {k: v for k, v in config.prior.items() if k not in PRIOR_WEIGHTS.values()}
        target = structural_target(features, images, **structure)
        return {
            "representation": losses.mse(model.reconstruct(latents), features),
            "gram": pae_losses.structure(latents, target),
        }

    return prior if config.kind == "prior" else cosine


def weights_of(config) -> dict[str, float]:
    """Weights of the `terms` in the objective."""
    if config.kind == "prior":
        return {name: config.prior[field] for name, field in PRIOR_WEIGHTS.items()}
    return {"cosine_distance": 1.0}


def on_held_out(session: Session, backbone: Network, teacher: Network) -> Callable:
    """Make the evaluation: (frozen, arrays) -> means of `terms` over a few held-out batches."""
    of_batch = jax.jit(terms(session.config.teacher, backbone, teacher))

    def evaluate(frozen, arrays) -> dict[str, float]:
        # padding repeats the last image: good enough for a figure shown during training
        values = [
            of_batch(frozen, arrays, put_batch(batch["image"], session.mesh))
            for batch in held_out_batches(session)
        ]
        return {name: float(np.mean([float(x[name]) for x in values])) for name in values[0]}

    return evaluate


def make_network(config) -> Network:
    """Build the network that is trained.

    Args:
      config: of which the sections backbone, precision and teacher are read.
    """
    section, compute = config.teacher, settings(config, "teacher")
    return teacher_network(section.model, config.backbone, section.kind, **compute)


def make_step(
    config, backbone: Network, teacher: Network
) -> tuple[Callable[[jax.Array], TrainState], Step]:
    """Make the training step on the weighted sum of the teacher's `terms`.

    Args:
      config: the section ``teacher``.

    Returns:
      (init, step), as `Stage` has them; batches have image [B, S, S, 3], uint8, and ``frozen`` is
      (parameters, rest) of the backbone.
    """
    optimizer = make_optimizer(
        config.train.steps, **bind(make_optimizer, config.optim, "teacher.optim")
    )
    terms_of, share = terms(config, backbone, teacher), weights_of(config)

    def step(state: TrainState, batch, key, frozen, phase):
        del phase

        def gradients(part, nothing, key):
            del key

            def loss_fn(params):
                values = terms_of(frozen, (params, state.rest["teacher"]), part["image"])
                return sum(share[name] * value for name, value in values.items()), values

            grads, figures = jax.grad(loss_fn, has_aux=True)(state.params["teacher"])
            return grads, nothing, figures

        parts = config.train.accumulate
        grads, _, figures = accumulate(gradients, batch, None, key, parts)
        state = apply_gradients(state, "teacher", grads, optimizer)
        return dataclasses.replace(state, step=state.step + 1), figures

    return lambda key: make_state(key, {"teacher": teacher}, {"teacher": optimizer}), step


def load_backbone(session: Session) -> Loaded:
    """The run's backbone as this stage computes it."""
    how = settings(session.config, "backbone")
    return load(session.run.stage("backbone"), session.mesh, **how)


def make_stage(session: Session) -> Stage:
    """Train on the run's images."""
    config, data = session.config.teacher, session.data
    source = session.source("train")
    backbone, arrays = load_backbone(session)
    network = make_network(session.config)
    init, step = make_step(config, backbone, network)
    held_out = on_held_out(session, backbone, network)

    def evaluate(state):
        return held_out(arrays, (state.params["teacher"], state.rest["teacher"]))

    return Stage(
        name="teacher",
        init=init,
        step=step,
        batches=lambda size: data.training_batches(source, size, session.config.seed),
        frozen=arrays,
        evaluate=evaluate,
    )


def second_moment(session: Session, backbone: Network, frozen) -> SecondMoment:
    """Sum the second moment of the tokens of ``teacher.svd.images`` training images, at most."""
    config, source = session.config.teacher, session.source("train")
    count, batch_size = min(config.svd.images, len(source)), config.train.batch_size
    features = jax.jit(lambda frozen, images: backbone(*frozen).features(to_float(images)))
    moment = SecondMoment(backbone_shape(session.config.backbone)[1])
    # shuffled by the seed: the first images of the first epoch are of all classes, without repeats
    batches = session.data.training_batches(source, batch_size, session.config.seed)
    feed = Feed(batches, session.mesh)
    with Progress("teacher", count, unit="image") as progress, contextlib.closing(feed):
        for batch in itertools.islice(feed, -(-count // batch_size)):
            valid = np.arange(batch_size) < count - moment.images
            moment.add(features(frozen, batch["image"]), valid)
            progress.update(int(valid.sum()))
    return moment


def project(session: Session, folder: StageFolder) -> None:
    """Fit the SVD teacher in one pass and mark its folder as finished."""
    config, watch = session.config.teacher, Stopwatch()
    check_batch(config.train.batch_size, session.mesh, "teacher.train.batch_size")
    backbone, frozen = load_backbone(session)
    moment = second_moment(session, backbone, frozen)
    vectors = svd_projection(moment.total, config.model.latent_dim)
    weights: dict[str, Arrays] = {"teacher": ({}, {"projection": vectors.astype(np.float32)})}
    save_weights(folder.path, "params", weights)
    network = make_network(session.config)
    arrays = place(weights["teacher"], session.mesh)
    held_out = on_held_out(session, backbone, network)(frozen, arrays)
    figures = {
        # of the tokens' squared length
        "kept_share": float(np.sum(vectors * (moment.total @ vectors)) / np.trace(moment.total)),
        **{f"eval/{name}": value for name, value in held_out.items()},
    }
    metrics = Metrics(folder.path, 0)
    metrics.write(1, figures)
    metrics.close()
    folder.finish(
        seconds=watch.seconds,
        fingerprint=fingerprint(weights),
        weights="params",
        parameters={"teacher": vectors.size},
        images=moment.images,
    )
    text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    logging.info("teacher: %d images in %s  %s", moment.images, duration(watch.seconds), text)


def run(session: Session) -> StageFolder:
    """Train or fit the teacher, unless the run has it."""
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
