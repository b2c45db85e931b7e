"""``teacher``: the semantic downsampler, trained by cosine distillation of the backbone."""

import dataclasses

import jax
import jax.numpy as jnp

from gae_jax import losses
from gae_jax.config import bind
from gae_jax.data.images import to_float
from gae_jax.models.layers import rms_norm
from gae_jax.parallel import put_batch
from gae_jax.run import StageFolder
from gae_jax.stages.backbone import held_out_batches
from gae_jax.stages.load import load, teacher_network
from gae_jax.stages.session import Session
from gae_jax.train.fit import Stage
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import TrainState, apply_gradients, make_state


def make_stage(session: Session) -> Stage:
    """The decoder's features against the backbone's, by cosine distance."""
    config, data = session.config.teacher, session.data
    source = session.source("train")
    backbone, backbone_arrays = load(session.run.stage("backbone"), session.mesh)
    network = teacher_network(config.model, session.config.backbone)
    optimizer = make_optimizer(
        config.train.steps, **bind(make_optimizer, config.optim, "teacher.optim")
    )

    def distance(params, rest, images, frozen):
        features = backbone(*frozen).features(images)
        target = jax.lax.stop_gradient(rms_norm(features))
        teacher = network(params, rest)
        found = teacher.reconstruct(teacher.downsample(features))
        return losses.cosine_distance(found, target)

    def step(state: TrainState, batch, key, frozen, phase):
        del key, phase
        params, rest = state.params["teacher"], state.rest["teacher"]
        loss, grads = jax.value_and_grad(distance)(params, rest, to_float(batch["image"]), frozen)
        state = apply_gradients(state, "teacher", grads, optimizer)
        state = dataclasses.replace(state, step=state.step + 1)
        return state, {"cosine_distance": loss}

    @jax.jit
    def held_out_distance(state, image, frozen):
        params, rest = state.params["teacher"], state.rest["teacher"]
        return distance(params, rest, to_float(image), frozen)

    def evaluate(state):
        # padding repeats the last image: good enough for a figure shown during training
        found = [
            held_out_distance(state, put_batch(batch["image"], session.mesh), backbone_arrays)
            for batch in held_out_batches(session)
        ]
        return {"cosine_distance": float(jnp.mean(jnp.stack(found)))}

    return Stage(
        name="teacher",
        init=lambda key: make_state(key, {"teacher": network}, {"teacher": optimizer}),
        step=step,
        batches=lambda size: data.training_batches(source, size, session.config.seed),
        frozen=backbone_arrays,
        evaluate=evaluate,
    )


def run(session: Session) -> StageFolder:
    """Trains the teacher, unless the run has it."""
    folder = session.open(
        "teacher", sections=("seed", "data", "backbone", "teacher"), inputs=("backbone",)
    )
    if not folder.done:
        session.train(folder, make_stage(session), keep=("teacher",), which="params")
    return folder
