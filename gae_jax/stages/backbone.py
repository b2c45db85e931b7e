"""``backbone``: a small supervised ViT instead of DINOv2."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gae_jax.config import bind
from gae_jax.nn import losses
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import to_float
from gae_jax.pretrained.backbone import backbone_network
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.mesh import put_batch
from gae_jax.train.fit import Stage, Step
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import TrainState, apply_gradients, make_state

EVAL_BATCHES = 8


def random_shift(images: jax.Array, key: jax.Array, most: int) -> jax.Array:
    """Shift each image of a batch [B, S, S, C] by up to ``most`` pixels; edges are repeated."""
    if not most:
        return images
    size = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    starts = jax.random.randint(key, (images.shape[0], 2), 0, 2 * most + 1)

    def cut(image, start):
        return jax.lax.dynamic_slice(image, (*start, 0), (size, size, image.shape[-1]))

    return jax.vmap(cut)(padded, starts)


def make_step(config, num_classes: int) -> tuple[Network, Callable[[jax.Array], TrainState], Step]:
    """Make the training step of a ViT classifier.

    Args:
      config: the section ``backbone``, with name "vit".

    Returns:
      (network, init, step), the latter as `Stage` has them; batches have image [B, S, S, 3], uint8,
      and label [B].
    """
    network = backbone_network(config, num_classes)
    optimizer = make_optimizer(
        config.train.steps, **bind(make_optimizer, config.optim, "backbone.optim")
    )

    def step(state: TrainState, batch, key, frozen, phase):
        del frozen, phase
        images = to_float(batch["image"])
        images = random_shift(images, jax.random.fold_in(key, state.step), config.shift)

        def loss_fn(params):
            logits = network(params, state.rest["backbone"])(images)
            loss = losses.cross_entropy(logits, batch["label"], config.label_smoothing)
            return loss, jnp.mean(jnp.argmax(logits, -1) == batch["label"])

        params = state.params["backbone"]
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        state = apply_gradients(state, "backbone", grads, optimizer)
        state = dataclasses.replace(state, step=state.step + 1)
        return state, {"loss": loss, "accuracy": accuracy}

    def init(key):
        return make_state(key, {"backbone": network}, {"backbone": optimizer})

    return network, init, step


def make_stage(session: Session) -> Stage:
    """Train on the run's images; evaluate accuracy on held-out ones."""
    config, data = session.config.backbone, session.data
    source = session.source("train")
    network, init, step = make_step(config, len(source.class_names))

    @jax.jit
    def hits(state, batch):
        logits = network(state.params["backbone"], state.rest["backbone"])(to_float(batch["image"]))
        right = (jnp.argmax(logits, -1) == batch["label"]) & batch["valid"]
        return jnp.sum(right), jnp.sum(batch["valid"])

    def evaluate(state):
        counts = [hits(state, put_batch(b, session.mesh)) for b in held_out_batches(session)]
        right, total = (sum(map(int, column)) for column in zip(*counts, strict=True))
        return {"accuracy": right / total}

    return Stage(
        name="backbone",
        init=init,
        step=step,
        batches=lambda size: data.training_batches(source, size, session.config.seed),
        evaluate=evaluate,
    )


def held_out_batches(session: Session):
    """Yield a few batches of held-out images, for the figures shown during training."""
    return session.batches("holdout", EVAL_BATCHES * session.config.evaluate.batch_size)


def run(session: Session) -> StageFolder:
    """Train the backbone, unless the run has it.

    Raises:
      ConfigError: if the config asks for a released network that the run does not have yet.
    """
    kind = session.config.backbone.name
    if kind != "vit" and (session.fresh or not session.run.stage("backbone").done):
        raise ConfigError(
            f"backbone.name is {kind!r}, whose weights are released and not trained here; import "
            "them with: "
            + session.run.command("import-torch", "--config.import_torch.backbone=FILE")
            + ", or train a small ViT instead with --config.backbone.name=vit"
        )
    folder = session.open("backbone", sections=("seed", "data", "backbone"), inputs=())
    if not folder.done:
        classes = session.source("train").class_names
        session.train(
            folder,
            make_stage(session),
            keep=("backbone",),
            which="params",
            num_classes=len(classes),
            class_names=classes,
        )
    return folder
