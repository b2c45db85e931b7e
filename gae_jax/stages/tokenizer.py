"""``tokenizer``: the autoencoder, with L1, perceptual, adversarial and semantic terms."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from gae_jax import losses
from gae_jax.config import backbone_shape, bind
from gae_jax.data.images import to_float
from gae_jax.evaluation.probe import linear_probe
from gae_jax.evaluation.tokenizer import summary
from gae_jax.models.discriminator import PatchGAN
from gae_jax.models.layers import linear
from gae_jax.models.lpips import LPIPS
from gae_jax.parallel import jit_on, place, put_batch, to_host
from gae_jax.run import StageFolder
from gae_jax.stages import health
from gae_jax.stages.backbone import held_out_batches
from gae_jax.stages.evaluate import tokenizer_evaluator
from gae_jax.stages.load import COMPUTED, load, tokenizer_network
from gae_jax.stages.objective import Objective, Phase, Targets
from gae_jax.stages.session import Session
from gae_jax.train.accumulate import accumulate
from gae_jax.train.fit import Stage, Step, stage_key
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import Network, TrainState, apply_gradients, ema_update, make_state


class Aligner(nnx.Module):
    """A Linear between two widths, trained with the tokenizer and then dropped."""

    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs):
        self.linear = linear(features_in, features_out, bias=False, dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.linear(tokens)


def needs(config) -> tuple[str, ...]:
    """The finished stages that a tokenizer's section asks for."""
    aligned, perceptual = config.losses.align > 0, config.losses.perceptual > 0
    lpips = perceptual and config.perceptual.name == "lpips"
    backbone = aligned or (perceptual and config.perceptual.name == "backbone")
    teacher = aligned and config.align.point == "latent"
    wanted = {"lpips": lpips, "backbone": backbone, "teacher": teacher}
    return tuple(name for name, use in wanted.items() if use)


def phase_of(config, step: int) -> Phase:
    """What is static about the step after ``step`` updates."""
    terms, trainable = tuple(name for name, weight in config.losses.items() if weight), ""
    end = 0
    for length, pattern, names in config.phases:
        end += length
        if step < end:
            terms, trainable = tuple(name for name in terms if name in names), pattern
            break
    on = "gan" in terms
    return Phase(
        discriminator=on and step >= config.gan.discriminator_start,
        gan=on and step >= config.gan.start,
        terms=terms,
        trainable=trainable,
    )


def ramp(step: jax.Array, start: int, length: int) -> jax.Array:
    """From 0 at ``start`` linearly to 1 over ``length`` updates; at once if that is 0."""
    return jnp.minimum((step.astype(jnp.float32) - start + 1) / max(length, 1), 1.0)


def make_networks(config, backbone_width: int) -> dict[str, Network]:
    """Everything that learns: the tokenizer, and what its objective needs."""
    compute = {name: config.compute[name] for name in COMPUTED}
    networks = {"tokenizer": tokenizer_network(config.model, **compute)}
    if config.losses.gan > 0:
        sizes = bind(PatchGAN, config.discriminator, "tokenizer.discriminator")
        sizes["dtype"] = config.compute.dtype
        networks["discriminator"] = Network(lambda rngs: PatchGAN(**sizes, rngs=rngs))
    if config.losses.align > 0:
        point, width = config.align.point, config.model.embed_dim
        if point == "post":
            width = config.model.latent_dim
        if point == "post" or (point == "pre" and width != backbone_width):
            networks["aligner"] = Network(lambda rngs: Aligner(width, backbone_width, rngs=rngs))
    return networks


def load_lpips(session: Session) -> tuple[Network, tuple[dict, dict]]:
    """LPIPS of the run, or one with random weights where the config asks for that."""
    config = session.config.tokenizer.perceptual
    how = {name: config[name] for name in ("precision", "dtype")}
    if config.name == "lpips":
        return load(session.run.stage("lpips"), session.mesh, **how)
    network = Network(lambda rngs: LPIPS(**how, rngs=rngs))
    params, rest = network.init(stage_key("lpips", session.config.seed))
    heads = {name: part for name, part in params.items() if name.startswith("lin")}
    # learned heads weigh squared differences and are never negative
    return network, place((params | jax.tree.map(jnp.abs, heads), rest), session.mesh)


def make_targets(session: Session):
    """(frozen arrays, `targets_by` the run's finished networks)."""
    config = session.config.tokenizer
    found = {
        name: load(session.run.stage(name), session.mesh)
        for name in needs(config)
        if name != "lpips"
    }
    if config.losses.perceptual > 0 and config.perceptual.name in ("lpips", "lpips_random"):
        found["lpips"] = load_lpips(session)
    networks = {name: network for name, (network, _) in found.items()}
    return {name: arrays for name, (_, arrays) in found.items()}, targets_by(config, networks)


def targets_by(config, networks: dict[str, Network]) -> Callable[..., Targets]:
    """Function of (frozen arrays by name, images in [-1, 1], their batch) that makes `Targets`.

    Args:
      config: the section ``tokenizer``.
      networks: those of lpips, backbone and teacher that its terms ask for.
    """
    perceptual = config.perceptual.name if config.losses.perceptual > 0 else None

    def make(frozen, images: jax.Array, batch) -> Targets:
        del batch  # the networks see images alone
        models = {name: network(*frozen[name]) for name, network in networks.items()}
        aligned = features = distance = None
        if perceptual == "backbone":
            features, maps = models["backbone"].features_and_maps(images)

            def distance(found):
                _, own = models["backbone"].features_and_maps(found)
                return losses.feature_distance(own, maps)
        elif perceptual:
            real = models["lpips"].features(images)

            def distance(found):
                return jnp.mean(models["lpips"].compare(models["lpips"].features(found), real))

        if config.losses.align > 0:
            features = models["backbone"].features(images) if features is None else features
            aligned = features
            if config.align.point == "latent":
                aligned = models["teacher"].downsample(features)
            aligned = jax.lax.stop_gradient(aligned).astype(jnp.float32)
        return Targets(aligned=aligned, perceptual=distance)

    return make


def make_step(
    config, backbone_width: int, targets_of: Callable[..., Targets]
) -> tuple[dict[str, Network], Callable[[jax.Array], TrainState], Step]:
    """Generator (tokenizer) and discriminator, updated together in one step.

    Args:
      config: the section ``tokenizer``.
      backbone_width: channels of the backbone's tokens.
      targets_of: as `targets_by`; it is given the rows of the batch that are computed at once.

    Returns:
      (networks that learn, init, step), the latter as `Stage` has them; batches have image
      [B, S, S, 3], uint8, and what ``targets_of`` reads.
    """
    networks = make_networks(config, backbone_width)
    optimizers = {
        name: make_optimizer(
            config.train.steps, **bind(make_optimizer, config[key], f"tokenizer.{key}")
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
        patch_size=config.model.patch_size,
    )

    def step(state: TrainState, batch, key, frozen, phase: Phase):
        share = ramp(state.step, config.gan.start, config.gan.ramp)

        def gradients(part, judge_rest, key):
            images = to_float(part["image"])
            targets = targets_of(frozen, images, part)
            rest = state.rest | ({"discriminator": judge_rest} if judge_rest is not None else {})
            return objective.gradients(state.params, rest, images, targets, key, share, phase)

        grads, moved, figures = accumulate(
            gradients,
            batch,
            state.rest.get("discriminator"),
            jax.random.fold_in(key, state.step),
            config.compute.accumulate,
        )
        new = state
        for name, gradient in grads.items():
            new = apply_gradients(new, name, gradient, optimizers[name], trainable=phase.trainable)
        rest = {**state.rest, "discriminator": moved} if phase.discriminator else state.rest
        ema = state.ema
        if averaged:
            now = {name: new.params[name] for name in averaged}
            ema = ema_update(state.ema, now, config.ema_decay, state.step)
        return dataclasses.replace(new, step=state.step + 1, rest=rest, ema=ema), figures

    return networks, lambda key: make_state(key, networks, optimizers, ema=averaged), step


def make_stage(session: Session) -> Stage:
    """`make_step` on the run's images, and what is shown while it trains."""
    config, data = session.config.tokenizer, session.data
    source = session.source("train")
    frozen, targets_of = make_targets(session)
    width = backbone_shape(session.config.backbone)[1]
    networks, init, step = make_step(config, width, targets_of)
    which = "ema" if config.ema_decay > 0 else "params"

    scored = tokenizer_evaluator(session, networks["tokenizer"], required=False)

    def arrays_of(state):
        return getattr(state, which)["tokenizer"], state.rest["tokenizer"]

    @jit_on(session.mesh)
    def encode_batch(state, images):
        return networks["tokenizer"](*arrays_of(state)).encode(to_float(images))

    def encode(state, images):
        """Latents [n, h * w * d] of images in memory."""
        size = session.config.evaluate.batch_size
        rows = []
        for first in range(0, len(images), size):
            inside = np.minimum(np.arange(first, first + size), len(images) - 1)
            latents = encode_batch(state, put_batch(images[inside], session.mesh))
            rows.append(to_host(latents)[: len(images) - first])
        return np.concatenate(rows)

    known = {}  # images for the probe, read once

    def evaluate(state):
        found = scored(arrays_of(state), held_out_batches(session))
        figures = summary(found, ())
        del figures["held_out_images"]
        tokens = rearrange(found.latents, "n h w d -> (n h w) d")
        figures["latent_rank"] = float(health.effective_rank(jnp.asarray(tokens)))
        if config.health.probe:
            if not known:
                for split in ("train", "holdout"):
                    known[split] = session.images(split, config.health.probe)
            sets = [(encode(state, images), labels) for images, labels in known.values()]
            figures["probe"] = linear_probe(*sets)
        return figures

    def pictures(state):
        found = scored(arrays_of(state), itertools.islice(held_out_batches(session), 1))
        shown = (found.shown[name][: config.health.pictures] for name in ("real", "clean"))
        return {"reconstructions": health.pairs(*shown)}

    return Stage(
        name="tokenizer",
        init=init,
        step=step,
        batches=lambda size: data.training_batches(source, size, session.config.seed),
        frozen=frozen,
        evaluate=evaluate,
        pictures=pictures if config.health.pictures else None,
        watch=health.GanWatch(loss=config.gan.loss, window=config.health.window),
        # the last state before the generator sees the discriminator
        milestones=(config.gan.start,) if config.losses.gan > 0 and config.gan.start else (),
        phase=lambda step: phase_of(config, step),
    )


def run(session: Session) -> StageFolder:
    """Trains the tokenizer, unless the run has it."""
    config = session.config.tokenizer
    folder = session.open("tokenizer", sections=("seed", "data", "tokenizer"), inputs=needs(config))
    if not folder.done:
        which = "ema" if config.ema_decay > 0 else "params"
        session.train(folder, make_stage(session), keep=("tokenizer",), which=which)
    return folder
