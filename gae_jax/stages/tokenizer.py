"""``tokenizer``: the autoencoder, with L1, perceptual, adversarial and semantic terms."""

import dataclasses
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gae_jax.config import bind
from gae_jax.config.precision import settings
from gae_jax.evaluation import health
from gae_jax.evaluation.probe import linear_probe, without_probe
from gae_jax.evaluation.tokenizer import summary
from gae_jax.nn.layers import linear
from gae_jax.nn.network import Loaded, Network
from gae_jax.nn.pixels import to_float
from gae_jax.objectives.discriminator import dino_network, discriminator_network, looks_through_dino
from gae_jax.objectives.objective import VIEW, Objective, Phase, Targets
from gae_jax.objectives.targets import compares_images, judges_of, targets_by
from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.run import fine_tuning
from gae_jax.run.batches import in_batches
from gae_jax.run.load import load, load_many, metric_network
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import jit_on
from gae_jax.runtime.sharding import place
from gae_jax.stages.backbone import held_out_batches
from gae_jax.stages.evaluate import tokenizer_evaluator
from gae_jax.tokenizers import kind_of, latent_shape, sections_of, tokenizer_network
from gae_jax.train.accumulate import accumulate
from gae_jax.train.fit import Stage, Step
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import TrainState, apply_gradients, ema_update, make_state, where_trainable
from gae_jax.train.warm_start import lend, start_from


class Aligner(nnx.Module):
    """A Linear between two widths, trained with the tokenizer and then dropped."""

    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs):
        self.linear = linear(features_in, features_out, bias=False, dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.linear(tokens)


def needs(config) -> tuple[str, ...]:
    """The finished stages that a section ``tokenizer`` needs."""
    # weights that exist have the encoder in them
    lent = ("backbone",) if kind_of(config).backbone and not config.init_from else ()
    started = ("teacher",) if config.from_teacher else ()
    return tuple(sorted({*judges_of(config), *lent, *started}))


def phase_of(config, step: int) -> Phase:
    """The static argument of the step after ``step`` updates."""
    every = terms = tuple(name for name, weight in config.losses.items() if weight)
    trainable, mode, end, follows = "", "", 0, bool(config.phases)
    for length, pattern, names, *modes in config.phases:
        follows = follows and "align" not in names
        end += length
        if step < end:
            terms, trainable = tuple(name for name in every if name in names), pattern
            mode = modes[0] if modes else ""
            break
    on = "gan" in terms
    return Phase(
        discriminator=on and step >= config.gan.discriminator_start,
        gan=on and step >= config.gan.start,
        terms=terms,
        trainable=trainable,
        mode=mode,
        follows=follows and has_snapshot(config),
    )


def has_snapshot(config) -> bool:
    """Whether latents are aligned with those of an earlier state of the tokenizer."""
    return config.losses.align > 0 and config.align.target == "snapshot"


def ramp(step: jax.Array, start: int, length: int) -> jax.Array:
    """Rise linearly from 0 at ``start`` to 1 over ``length`` updates; at once if that is 0."""
    return jnp.minimum((step.astype(jnp.float32) - start + 1) / max(length, 1), 1.0)


def make_networks(whole) -> dict[str, Network]:
    """Build the networks that are trained: the tokenizer, and those of its objective.

    Args:
      whole: the config, of which the sections data, backbone, precision and tokenizer are read.
    """
    config, backbone_width = whole.tokenizer, backbone_shape(whole.backbone)[1]
    compute = settings(whole, "tokenizer")
    networks = {"tokenizer": tokenizer_network(whole, **compute)}
    if config.losses.gan > 0:
        networks["discriminator"] = discriminator_network(config.discriminator, compute["dtype"])
    if config.losses.align > 0 and config.align.target == "teacher":
        point = config.align.point
        width = latent_shape(whole)[-1]
        if point == "pre":
            width = feature_width(networks["tokenizer"], whole.data.image_size)
        if point == "post" or (point == "pre" and width != backbone_width):
            networks["aligner"] = Network(lambda rngs: Aligner(width, backbone_width, rngs=rngs))
    return networks


def feature_width(network: Network, image_size: int) -> int:
    """Return the channels of a tokenizer's features; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    encoded = jax.eval_shape(
        lambda arrays, images: network(*arrays).encode_all(images), network.abstract, images
    )
    return encoded.features.shape[-1]


def make_step(
    whole, targets_of: Callable[..., Targets]
) -> tuple[dict[str, Network], Callable[[jax.Array], TrainState], Step]:
    """Make the step that updates generator (tokenizer) and discriminator together.

    Args:
      whole: the config, of which the sections data, backbone, precision and tokenizer are read.
      targets_of: as `targets_by`; it is given the rows of the batch that are computed at once.

    Returns:
      (networks that are trained, init, step), the latter as `Stage` has them; batches have image
      [B, S, S, 3], uint8, and the arrays that ``targets_of`` reads.
    """
    config, networks = whole.tokenizer, make_networks(whole)
    phases = tuple(phase[0] for phase in config.phases)
    optimizers = {
        name: make_optimizer(
            config.train.steps,
            **bind(make_optimizer, config[key], f"tokenizer.{key}"),
            phases=phases,
        )
        for name in networks
        for key in ["discriminator_optim" if name == "discriminator" else "optim"]
    }
    averaged = ("tokenizer",) if config.ema_decay > 0 else ()
    objective = Objective(
        config,
        tokenizer=networks["tokenizer"],
        discriminator=networks.get("discriminator"),
        aligner=networks.get("aligner"),
    )
    remembers = has_snapshot(config)

    def step(state: TrainState, batch, key, frozen, phase: Phase):
        share = ramp(state.step, config.gan.start, config.gan.ramp)

        def gradients(part, judge_rest, key):
            images = to_float(part["image"])
            targets = targets_of(frozen, images, part)
            if remembers and "align" in phase.terms:
                arrays = state.rest["snapshot"], state.rest["tokenizer"]
                targets = dataclasses.replace(
                    targets, aligned=tokens_of(networks["tokenizer"], arrays, images, config.align)
                )
            rest = state.rest | ({"discriminator": judge_rest} if judge_rest is not None else {})
            return objective.gradients(state.params, rest, images, targets, key, share, phase)

        grads, moved, figures = accumulate(
            gradients,
            batch,
            state.rest.get("discriminator"),
            jax.random.fold_in(key, state.step),
            config.train.accumulate,
        )
        new = state
        for name, gradient in grads.items():
            new = apply_gradients(new, name, gradient, optimizers[name], trainable=phase.trainable)
        if phase.discriminator and config.gan.fresh:
            new, moved, of_pass = learn_anew(new, batch, key, frozen, phase)
            figures |= of_pass
        rest = {**state.rest, "discriminator": moved} if phase.discriminator else state.rest
        if phase.follows:
            rest = {**rest, "snapshot": new.params["tokenizer"]}
        ema = state.ema
        if averaged:
            now = {name: new.params[name] for name in averaged}
            moved = ema_update(state.ema, now, config.ema_decay, state.step)
            # the average of frozen parts is constant too, so latents are while a decoder is refined
            ema = {
                name: where_trainable(moved[name], state.ema[name], name, phase.trainable)
                for name in averaged
            }
        return dataclasses.replace(new, step=state.step + 1, rest=rest, ema=ema), figures

    def learn_anew(state: TrainState, batch, key, frozen, phase: Phase):
        """Train the discriminator in its own pass: (state, moved statistics, figures)."""

        def gradients(part, judge_rest, key):
            images = to_float(part["image"])
            look = targets_of(frozen, images, part).look
            rest = {**state.rest, "discriminator": judge_rest}
            return objective.judge_anew(state.params, rest, images, look, key)

        grads, moved, figures = accumulate(
            gradients,
            batch,
            state.rest["discriminator"],
            jax.random.fold_in(jax.random.fold_in(key, state.step), VIEW),
            config.train.accumulate,
        )
        name = "discriminator"
        new = apply_gradients(state, name, grads, optimizers[name], trainable=phase.trainable)
        return new, moved, figures

    def init(key):
        state = make_state(key, networks, optimizers, ema=averaged)
        if remembers:
            copy = jax.tree.map(jnp.copy, state.params["tokenizer"])
            state = dataclasses.replace(state, rest={**state.rest, "snapshot": copy})
        return state

    return networks, init, step


def tokens_of(network: Network, arrays, images: jax.Array, align) -> jax.Array:
    """Encode images by an earlier tokenizer, at the point that is aligned; no gradient."""
    encoded = network(*arrays).encode_all(images)
    tokens = encoded.features if align.point == "pre" else encoded.latents
    return jax.lax.stop_gradient(rearrange(tokens, "b ... d -> b (...) d").astype(jnp.float32))


def make_stage(session: Session) -> Stage:
    """Train on the run's images, with the figures and pictures shown during training."""
    config, data = session.config.tokenizer, session.data
    source = session.source("train")
    frozen, targets_of = make_targets(session)
    networks, init, step = make_step(session.config, targets_of)
    which = "ema" if config.ema_decay > 0 else "params"

    scored = tokenizer_evaluator(session, networks["tokenizer"], required=False)

    def arrays_of(state):
        return getattr(state, which)["tokenizer"], state.rest["tokenizer"]

    @jit_on(session.mesh)
    def encode_batch(state, images):
        return networks["tokenizer"](*arrays_of(state)).encode(to_float(images))

    def encode(state, images):
        """Encode images in memory, uint8 [n, S, S, 3] -> latents [n, h * w * d]."""
        size = session.config.evaluate.batch_size
        return in_batches(encode_batch, (state,), (images,), mesh=session.mesh, batch_size=size)

    known: dict = {}  # images for the probe, read once, or why there can be no probe

    def evaluate(state):
        measured = scored(arrays_of(state), held_out_batches(session))
        figures = summary(measured, ())
        del figures["held_out_images"]
        tokens = rearrange(measured.latents, "n h w d -> (n h w) d")
        figures["latent_rank"] = float(health.effective_rank(jnp.asarray(tokens)))
        if config.health.probe:
            if not known:
                for split in ("train", "holdout"):
                    known[split] = session.images(split, config.health.probe)
                known["lacks"] = without_probe(known["train"][1], len(known["holdout"][1]))
                if known["lacks"]:
                    logging.info("tokenizer: no probe: %s", known["lacks"])
            if not known["lacks"]:
                figures["probe"] = linear_probe(
                    *((encode(state, known[x][0]), known[x][1]) for x in ("train", "holdout"))
                )
        return figures

    def pictures(state):
        batches = session.batches("holdout", config.health.pictures)
        shown = scored(arrays_of(state), batches).shown
        real, clean = (shown[name][: config.health.pictures] for name in ("real", "clean"))
        return {"reconstructions": health.pairs(real, clean)}

    def begin(state):
        if config.init_from:
            state = fine_tuning.start(session, "tokenizer", state)
            fine_tuning.warn_of_encoder(session, state)
            return state
        if kind_of(config).backbone:
            state = lend(state, *load(session.run.stage("backbone"), session.mesh)[1])
        if config.from_teacher:
            teacher = load(session.run.stage("teacher"), session.mesh)[1][0]
            state = start_from(state, teacher, config.from_teacher)
        return state

    return Stage(
        name="tokenizer",
        init=init,
        begin=begin,
        step=step,
        batches=lambda size: data.training_batches(source, size, session.config.seed),
        frozen=frozen,
        evaluate=evaluate,
        pictures=pictures if config.health.pictures else None,
        watch=health.GanWatch(
            loss=config.gan.loss,
            window=config.health.window,
            rate=config.discriminator_optim.learning_rate,
            end_rate=config.discriminator_optim.end_learning_rate,
            weight=config.losses.gan,
            start=config.gan.start,
        ),
        # the last state before the generator sees the discriminator
        milestones=(config.gan.start,) if config.losses.gan > 0 and config.gan.start else (),
        phase=lambda step: phase_of(config, step),
    )


def run(session: Session) -> StageFolder:
    """Train the tokenizer, unless the run has it."""
    config = session.config.tokenizer
    folder = session.open("tokenizer", sections=sections_of(config), inputs=needs(config))
    if not folder.done:
        which = "ema" if config.ema_decay > 0 else "params"
        session.train(folder, make_stage(session), keep=("tokenizer",), which=which)
    return folder


def check(session: Session) -> None:
    """Raise ConfigError if the tokenizer cannot start from the weights that its config names."""
    fine_tuning.check(session, "tokenizer")


def make_targets(session: Session):
    """Return (frozen arrays, `targets_by` the networks that the terms of the config compare by)."""
    config, aligned = session.config.tokenizer, settings(session.config, "align")
    how = {"lpips": settings(session.config, "perceptual"), "dino": {}}
    loaded = load_many(session, **{name: how.get(name, aligned) for name in judges_of(config)})
    if compares_images(config) and config.perceptual.name == "lpips_random":
        loaded["lpips"] = random_lpips(session, **how["lpips"])
    if looks_through_dino(config) and "dino" not in loaded:
        network = dino_network(config.discriminator)
        arrays = place(network.init(stage_key("dino", session.config.seed)), session.mesh)
        loaded["dino"] = network, arrays
    networks = {name: network for name, (network, _) in loaded.items()}
    return {name: arrays for name, (_, arrays) in loaded.items()}, targets_by(config, networks)


def random_lpips(session: Session, **how) -> Loaded:
    """Return LPIPS with random weights on the mesh; ``how``: as of `load`."""
    network = metric_network("lpips", **how)
    params, rest = network.init(stage_key("lpips", session.config.seed))
    # learned heads weigh squared differences and are never negative
    heads = {key: jax.tree.map(jnp.abs, x) for key, x in params.items() if key.startswith("lin")}
    return network, place((params | heads, rest), session.mesh)
