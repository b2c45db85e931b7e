"""``diffusion``: LightningDiT with flow matching on the normalised latents."""

import dataclasses
import logging
from collections.abc import Callable

import jax
import numpy as np
import optax

from gae_jax.config import bind
from gae_jax.config.precision import settings
from gae_jax.data.latents import LatentSet
from gae_jax.generators import flow
from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.generators.sampling import MAKERS, Networks, make_draw
from gae_jax.nn import sphere
from gae_jax.nn.quantized import weight_quantizer, with_matmuls
from gae_jax.run import fine_tuning
from gae_jax.run.contents import check_number_of_classes, read_contents
from gae_jax.run.generation_judge import GenerationJudge
from gae_jax.run.judges import without_judge
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.run.sampling import batches_of_images, bind_sampler, sampling_facts
from gae_jax.run.session import Session
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.mesh import jit_on
from gae_jax.train.accumulate import accumulate
from gae_jax.train.fit import Stage, Step
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import TrainState, apply_gradients, ema_update, make_state


def make_step(
    whole, latent_shape: tuple[int, ...], mean: np.ndarray, std: np.ndarray
) -> tuple[Callable[[jax.Array], TrainState], Step]:
    """Make the step of flow matching, with label dropout and a moving average of the weights.

    Args:
      whole: the config; the sections diffusion and precision are read.
      latent_shape: (h, w, d).
      mean, std: of the latents, [d] or [h, w, d].

    Returns:
      (init, step), as `Stage` has them; batches have latent [B, h, w, d] and label [B].
    """
    config, compute = whole.diffusion, settings(whole, "diffusion")
    network = diffusion_network(config, latent_shape, mean=mean, std=std, **compute)
    optimizer = make_optimizer(
        config.train.steps, **bind(make_optimizer, config.optim, "diffusion.optim")
    )
    section = config.flow
    path, bounds = flow.PATHS[section.path], flow.time_range(section.path, section.prediction)

    def gradients(params, rest, batch, key):
        """Gradients of the loss on a batch, and the figures to show."""
        keys = jax.random.split(key, 3)

        def loss_fn(params):
            model = network(params, rest)
            data = model.normalize(batch["latent"])
            noise = model.prior(jax.random.normal(keys[0], data.shape))
            t = flow.sample_time(
                keys[1],
                data.shape[0],
                mean=section.time_mean,
                std=section.time_std,
                shift=section.time_shift,
                kind=section.time,
                bounds=bounds,
                least=section.time_least,
            )
            labels = model.dit.drop_labels(batch["label"], keys[2])
            if section.geometry == "sphere":
                x, target = sphere.geodesic(noise, data, t)
                velocity = sphere.project(x, model.output(x, t, labels))
                return flow.velocity_loss(velocity, target, cosine_weight=section.cosine_weight)
            return flow.flow_loss(
                model.output(flow.interpolate(noise, data, t, path), t, labels),
                noise,
                data,
                t,
                path=path,
                prediction=section.prediction,
                weighting=section.weighting,
                cosine_weight=section.cosine_weight,
            )

        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, {"loss": loss, **terms}

    def step(state: TrainState, batch, key, frozen, phase):
        del frozen, phase
        params, rest = state.params["diffusion"], state.rest["diffusion"]

        def of_part(part, nothing, key):
            grads, figures = gradients(params, rest, part, key)
            return grads, nothing, figures

        key = jax.random.fold_in(key, state.step)
        grads, _, figures = accumulate(of_part, batch, None, key, config.train.accumulate)
        new = apply_gradients(state, "diffusion", grads, optimizer)
        ema = ema_update(state.ema, new.params, config.ema_decay, state.step)
        state = dataclasses.replace(new, step=state.step + 1, ema=ema)
        return state, {**figures, "grad_norm": optax.tree.norm(grads)}

    def init(key):
        return make_state(key, {"diffusion": network}, {"diffusion": optimizer}, ema=("diffusion",))

    return init, step


# Metrics during training by the Inception network: few images give no split Inception Score.
ONLINE = ("fid",)


def make_stage(session: Session, latents: LatentSet) -> Stage:
    """Train on the run's latents."""
    shape = latents[0]["latent"].shape[1:]
    if constant := latents.constant_channels:
        logging.warning(
            "diffusion: %d of %d channels of the latents are constant (the first is channel %d): "
            "they carry nothing of the images, the tokenizer has collapsed in them",
            *(len(constant), shape[-1], constant[0]),
        )
    init, step = make_step(session.config, shape, latents.mean, latents.std)

    def begin(state):
        if session.config.diffusion.init_from:
            fine_tuning.warn_of_tokenizer(session, latents.manifest["tokenizer"])
            return fine_tuning.start(session, "diffusion", state)
        return state

    return Stage(
        name="diffusion",
        init=init,
        begin=begin,
        step=step,
        evaluate=make_evaluation(session, latents),
        batches=lambda size: latents.training_batches(
            size, session.config.seed, session.data.threads
        ),
    )


def make_evaluation(session: Session, latents: LatentSet) -> Callable | None:
    """Make the evaluation of images drawn from the moving average; None if not asked for.

    They are scored as ``evaluate`` scores finished samples; noise and labels are always the same.
    """
    config, online = session.config.diffusion, session.config.evaluate.online
    if not online.images or session.config.evaluate.features == "none":
        return None
    if lacks := without_judge(session):
        logging.info("diffusion: no evaluations while it trains: %s", lacks)
        return None
    asked, compute = session.config.sample, settings(session.config, "sampler")
    matmuls = compute.pop("matmuls")
    shape = latents[0]["latent"].shape[1:]
    trained = diffusion_network(config, shape, mean=latents.mean, std=latents.std, **compute)
    network = with_matmuls(trained, matmuls)
    rounded = weight_quantizer(trained, network, session.mesh)
    section = asked[online.sampler].to_dict() | {"steps": online.steps}
    sampler = MAKERS[online.sampler](**bind_sampler(online.sampler, section))
    decoding = settings(session.config, "decoder")
    tokenizer = load(session.run.stage("tokenizer"), session.mesh, **decoding)
    draw = jit_on(session.mesh)(make_draw(Networks((network, None), tokenizer), sampler))
    labels = online_labels(online.images, config.model.num_classes, session.config.seed)
    ways = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    size = -(-min(session.config.sample.batch_size, len(labels)) // ways) * ways
    judge: list = []  # made on first use, since it reads the training images

    def evaluate(state: TrainState) -> dict[str, float]:
        if not judge:
            judge.append(GenerationJudge(session))
        arrays = rounded((state.ema["diffusion"], state.rest["diffusion"])), tokenizer[1], None
        batches = batches_of_images(session, draw, arrays, labels, size)
        images = [draw_batch()[0] for _, draw_batch in batches]
        metrics = ONLINE if session.config.evaluate.features == "inception" else None
        figures = judge[0](np.concatenate(images), labels, metrics=metrics, allow_few=True)
        return {name: value for name, value in figures.items() if isinstance(value, float)}

    return evaluate


def online_labels(count: int, classes: int, seed: int) -> np.ndarray:
    """Make labels, int32 [count], in random order: every class equally often, up to one."""
    random = np.random.default_rng(seed)
    rounds, rest = divmod(count, classes)
    labels = np.tile(np.arange(classes, dtype=np.int32), rounds)
    if rest:
        labels = np.append(labels, random.choice(classes, rest, replace=False).astype(np.int32))
    return random.permutation(labels)


def run(session: Session) -> StageFolder:
    """Train the diffusion model, unless the run has it.

    Raises:
      DataError: if the latents were encoded by a different tokenizer than the run's.
    """
    if session.fresh or not session.run.stage("diffusion").done:
        check_number_of_classes(session)
    folder = session.open("diffusion", sections=("seed", "diffusion"), inputs=("latents",))
    if not folder.done:
        latents = LatentSet.open(session.run.stage("latents").path)
        made_by, tokenizer = latents.manifest["tokenizer"], session.fingerprint_of("tokenizer")
        if made_by != tokenizer:
            raise DataError(
                f"the latents in {latents.folder} were made by tokenizer {made_by}, this run uses "
                f"{tokenizer}; make them again with: {session.run.command('latents', '--fresh')}"
            )
        counts, classes = latents.label_counts, session.config.diffusion.model.num_classes
        largest = len(counts) - 1
        if largest >= classes:
            raise DataError(
                f"the latents have labels up to {largest}, but diffusion.model.num_classes is "
                f"{classes}; set it to {largest + 1}"
            )
        warn_of_unseen_classes(session, counts)
        session.train(
            folder,
            make_stage(session, latents),
            keep=("diffusion",),
            which="ema",
            latent_shape=list(latents[0]["latent"].shape[1:]),
            statistics=latents.per,
            tokenizer=latents.manifest["tokenizer"],
            **sampling_facts(session.config),
        )
    return folder


def check(session: Session) -> None:
    """Raise ConfigError if the model cannot start from the weights that its config names."""
    fine_tuning.check(session, "diffusion")


def warn_of_unseen_classes(session: Session, counts: np.ndarray) -> None:
    """Warn of classes without latents, for example because none of their images can be read.

    Args:
      counts: number of latents of each label up to the largest.
    """
    classes = session.config.diffusion.model.num_classes
    unseen = np.flatnonzero(np.pad(counts, (0, classes - len(counts))) == 0)
    if not len(unseen):
        return
    recorded = read_contents(session.run.stage("latents")).get("train")
    names = recorded.class_names if recorded else []
    shown = ", ".join(repr(names[i]) if i < len(names) else str(i) for i in unseen[:5])
    logging.warning(
        "diffusion: %d of %d classes have no latents (%s%s), so nothing is learned of them, and "
        "their samples are meaningless",
        *(len(unseen), classes, shown, ", ..." if len(unseen) > 5 else ""),
    )
