"""``tokenizer``: the autoencoder, with L1, perceptual, adversarial and semantic terms."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from gae_jax import losses
from gae_jax.config import bind
from gae_jax.data.images import to_float, to_uint8
from gae_jax.evaluation.reconstruction import psnr
from gae_jax.models.discriminator import PatchGAN
from gae_jax.parallel import put_batch
from gae_jax.run import StageFolder
from gae_jax.stages.backbone import held_out_batches
from gae_jax.stages.load import load, tokenizer_network
from gae_jax.stages.session import Session
from gae_jax.train.fit import Stage
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import (
    Network,
    TrainState,
    apply_gradients,
    make_state,
    variables_of,
)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Which networks see each other: what a step of this phase computes."""

    discriminator: bool  # the discriminator learns
    gan: bool  # the generator sees it


def ramp(step: jax.Array, start: int, length: int) -> jax.Array:
    """From 0 at ``start`` linearly to 1 over ``length`` updates; at once if that is 0."""
    return jnp.minimum((step.astype(jnp.float32) - start + 1) / max(length, 1), 1.0)


def make_stage(session: Session) -> Stage:
    """Generator (tokenizer) and discriminator, updated together in one step."""
    config, data = session.config.tokenizer, session.data
    source = session.source("train")
    backbone, backbone_arrays = load(session.run.stage("backbone"), session.mesh)
    teacher, teacher_arrays = load(session.run.stage("teacher"), session.mesh)
    tokenizer = tokenizer_network(config.model)
    sizes = bind(PatchGAN, config.discriminator, "tokenizer.discriminator")
    discriminator = Network(lambda rngs: PatchGAN(**sizes, rngs=rngs))
    networks = {"tokenizer": tokenizer, "discriminator": discriminator}
    sections = {"tokenizer": "optim", "discriminator": "discriminator_optim"}
    optimizers = {
        name: make_optimizer(
            config.train.steps, **bind(make_optimizer, config[key], f"tokenizer.{key}")
        )
        for name, key in sections.items()
    }
    weights = {name: weight for name, weight in config.losses.items() if weight}

    def judge(params, rest, images):
        """Logits, and the moved batch statistics (which the generator's pass leaves unused)."""
        model = discriminator(params, rest)
        logits = model(images, train=True)
        return logits, variables_of(model)[1]

    def objective(params, state: TrainState, images, targets, key, phase: Phase):
        """(weighted sum, (terms, reconstruction)); a term of weight 0 is not computed."""
        model = tokenizer(params, state.rest["tokenizer"])
        mean = model.encode(images)
        found = model.decode(model.perturb(mean, key))
        terms = {}
        if "l1" in weights:
            terms["l1"] = losses.l1(found, images)
        if "perceptual" in weights:
            _, maps = backbone(*targets["backbone"]).features_and_maps(found)
            terms["perceptual"] = losses.feature_distance(maps, targets["maps"])
        if "align" in weights:
            terms["align"] = losses.mse(rearrange(mean, "b h w d -> b (h w) d"), targets["latent"])
        scale = dict(weights)
        if phase.gan:
            scale["gan"] = weights["gan"] * ramp(state.step, config.gan.start, config.gan.ramp)
            arrays = state.params["discriminator"], state.rest["discriminator"]
            terms["gan"] = losses.hinge_generator(judge(*arrays, found)[0])
        total = sum(scale[name] * terms[name] for name in terms)
        return total, (terms, found)

    def judge_loss(params, rest, real, fake):
        on_real, rest = judge(params, rest, real)
        on_fake, rest = judge(params, rest, fake)
        right = (jnp.mean(on_real > 0) + jnp.mean(on_fake < 0)) / 2
        scalars = {
            "logits_real": jnp.mean(on_real),
            "logits_fake": jnp.mean(on_fake),
            "accuracy": right,
        }
        return losses.hinge_discriminator(on_real, on_fake), (rest, scalars)

    def step(state: TrainState, batch, key, frozen, phase: Phase):
        images = to_float(batch["image"])
        features, maps = backbone(*frozen["backbone"]).features_and_maps(images)
        targets = {
            "backbone": frozen["backbone"],
            "maps": maps,
            "latent": teacher(*frozen["teacher"]).downsample(features),
        }
        noise_key = jax.random.fold_in(key, state.step)
        grad_fn = jax.value_and_grad(objective, has_aux=True)
        (total, (terms, found)), grads = grad_fn(
            state.params["tokenizer"], state, images, targets, noise_key, phase
        )
        metrics = {"total": total, **terms, "grad_norm": optax.tree.norm(grads)}
        new = apply_gradients(state, "tokenizer", grads, optimizers["tokenizer"])
        if phase.discriminator:
            name = "discriminator"
            fake = jax.lax.stop_gradient(found)
            grad_fn = jax.value_and_grad(judge_loss, has_aux=True)
            (loss, (moved, scalars)), grads = grad_fn(
                state.params[name], state.rest[name], images, fake
            )
            new = apply_gradients(new, name, grads, optimizers[name])
            new = dataclasses.replace(new, rest={**state.rest, name: moved})
            scalars["loss"] = loss
            metrics |= {f"{name}/{key}": value for key, value in scalars.items()}
        return dataclasses.replace(new, step=state.step + 1), metrics

    def phase(step: int) -> Phase:
        on = "gan" in weights
        return Phase(
            discriminator=on and step >= config.gan.discriminator_start,
            gan=on and step >= config.gan.start,
        )

    @jax.jit
    def held_out_psnr(state, batch):
        model = tokenizer(state.params["tokenizer"], state.rest["tokenizer"])
        found = to_uint8(model.decode(model.encode(to_float(batch["image"]))))
        return psnr(found, batch["image"])

    def evaluate(state):
        found = []
        for batch in held_out_batches(session):
            values = held_out_psnr(state, put_batch(batch, session.mesh))
            found.append(jax.device_get(values)[batch["valid"]])
        return {"psnr": float(sum(map(sum, found)) / sum(map(len, found)))}

    return Stage(
        name="tokenizer",
        init=lambda key: make_state(key, networks, optimizers),
        step=step,
        batches=lambda size: data.training_batches(source, size, session.config.seed),
        frozen={"backbone": backbone_arrays, "teacher": teacher_arrays},
        evaluate=evaluate,
        phase=phase,
    )


def run(session: Session) -> StageFolder:
    """Trains the tokenizer, unless the run has it."""
    folder = session.open(
        "tokenizer", sections=("seed", "data", "tokenizer"), inputs=("backbone", "teacher")
    )
    if not folder.done:
        session.train(folder, make_stage(session), keep=("tokenizer",), which="params")
    return folder
