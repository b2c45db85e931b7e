"""The linear probe of the paper (Appendix I): one linear layer on frozen latents, by plain SGD.

Latents are encoded once, lie on the devices, split by rows over data and fsdp, and are read from
there: an epoch is one compiled scan over its steps. A step gathers its rows where they lie, sends
each device an equal share of the batch and applies the gradient X^T (softmax - onehot) / B, which
needs no differentiation through the layer.

What the paper does not state (momentum, standardisation, mirrored images, initial weights, the
last batch) is ours, and marked so in `ProbeSettings`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax.data.latent_shards import Moments, varying
from gae_jax.runtime.errors import ConfigError, DataError, NonFiniteError
from gae_jax.runtime.mesh import BATCH

HEADS = ("flatten", "mean")
SHARED = BATCH[0]  # mesh axes that rows are split over
CHUNK = 2048  # rows that are read from the host, or scored on a device, at once


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How the probe is trained; the defaults are the paper's where it states them.

    Args:
      head: "flatten" sees all h * w * d numbers, "mean" their mean over positions, d numbers.
      flips: draw one of an image's views (itself, its mirror image) in each epoch, where the
        latents have both; else the image itself.
      standardise: subtract the channels' mean and divide by their deviation, over all training
        latents that are drawn from.
      drop_last: leave out the images that do not fill a batch; each epoch others.
      dtype: of the latents on the devices; "bfloat16" takes half the memory. Weights, gradients
        and sums are float32.
      precision: of matrix products, a `jax.lax.Precision`; below "highest" a GPU or TPU rounds
        its factors.
    """

    head: str = "flatten"  # [paper] both are in Table 14
    learning_rate: float = 0.008  # [paper] constant
    batch_size: int = 2048  # [paper] of all devices together
    epochs: int = 100  # [paper] without weight decay
    momentum: float = 0.0  # [ours]
    standardise: bool = False  # [ours]
    flips: bool = True  # [ours] as the latents of the diffusion model are drawn
    drop_last: bool = True  # [ours] 625 steps per epoch of ImageNet
    dtype: str = "float32"  # [ours]
    precision: str = "highest"  # [ours]
    seed: int = 0

    def __post_init__(self):
        if self.head not in HEADS:
            raise ConfigError(f"there is no head {self.head!r} of a probe; use one of {HEADS}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(
                f"a probe of {self.epochs} epochs with batches of {self.batch_size} learns "
                "nothing; both must be at least 1"
            )


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Accuracies in [0, 1] on the test images, after every epoch; the last is the paper's figure.

    Attributes:
      top1, top5, loss, train_loss: one figure per epoch; losses are mean cross-entropies in nats,
        ``train_loss`` while it learnt.
      batch_size: as used, which is less than the settings' where there are fewer images.
      dimensions: how many numbers of an image the layer sees.
    """

    top1: tuple[float, ...]
    top5: tuple[float, ...]
    loss: tuple[float, ...]
    train_loss: tuple[float, ...]
    batch_size: int
    dimensions: int

    @property
    def last_top1(self) -> float:
        return self.top1[-1]

    @property
    def last_top5(self) -> float:
        return self.top5[-1]

    @property
    def best_top1(self) -> float:
        return max(self.top1)

    @property
    def best_epoch(self) -> int:
        """The first epoch, from 1, that reached `best_top1`."""
        return self.top1.index(self.best_top1) + 1


class Layer(NamedTuple):
    """The probe's weights, float32, and the momentum of each."""

    kernel: jax.Array  # [D, classes]
    bias: jax.Array  # [classes]
    kernel_velocity: jax.Array
    bias_velocity: jax.Array


def initial_layer(key: jax.Array, dimensions: int, classes: int) -> Layer:
    """Weights and biases from U(-1 / sqrt(D), 1 / sqrt(D)), as torch's nn.Linear draws them."""
    bound = dimensions**-0.5
    shapes = (dimensions, classes), (classes,)
    kernel, bias = (
        jax.random.uniform(k, shape, minval=-bound, maxval=bound)
        for k, shape in zip(jax.random.split(key), shapes, strict=True)
    )
    return Layer(kernel, bias, jnp.zeros_like(kernel), jnp.zeros_like(bias))


def draw_batches(
    key: jax.Array, *, images: int, views: int, batch_size: int, drop_last: bool, ways: int
) -> tuple[jax.Array, jax.Array]:
    """The order of an epoch: (image, view), both int32 [steps, rows].

    Rows are the batch size, rounded up to a multiple of ``ways``; a row without an image is -1.
    """
    order_key, view_key = jax.random.split(key)
    order = jax.random.permutation(order_key, images)
    steps = images // batch_size if drop_last else -(-images // batch_size)
    used = min(images, steps * batch_size)
    order = jnp.pad(order[:used], (0, steps * batch_size - used), constant_values=-1)
    order = order.reshape(steps, batch_size).astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, -batch_size % ways)), constant_values=-1)
    # drawn for the image, so that it does not depend on how rows are padded
    view = jax.random.randint(view_key, (images,), 0, views, jnp.int32)
    return order, view[order]


def make_epoch(mesh: Mesh, *, learning_rate: float, momentum: float, precision: str) -> Callable:
    """``epoch(layer, features, labels, order, view) -> (layer, mean loss)``; donates the layer.

    ``features`` [n, views, D] are split over data and fsdp, ``labels`` [n] are whole on every
    device, ``order`` and ``view`` [steps, rows] are those of `draw_batches`. SGD as torch has it:
    velocity = momentum * velocity + gradient, weight -= learning_rate * velocity.
    """
    ways = ways_of(mesh)
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

    def steps(layer, features, labels, order, view):
        first = jax.lax.axis_index(SHARED) * len(features)
        share = order.shape[1] // ways

        def step(layer, draw):
            image, view = draw
            local = image - first
            mine = (image >= 0) & (local >= 0) & (local < len(features))
            rows = features[jnp.where(mine, local, 0), view]
            # every row is on one device, so that the sum only moves it, without rounding
            rows = jnp.where(mine[:, None], rows, 0)
            rows = jax.lax.psum_scatter(rows, SHARED, scatter_dimension=0, tiled=True)
            rows = rows.astype(jnp.float32)
            image = jax.lax.dynamic_slice_in_dim(image, jax.lax.axis_index(SHARED) * share, share)
            weight = (image >= 0) / jax.lax.psum(jnp.sum(image >= 0), SHARED)
            label = labels[jnp.maximum(image, 0)]
            logits = dot(rows, layer.kernel) + layer.bias
            log_p = jax.nn.log_softmax(logits)
            hot = jax.nn.one_hot(label, logits.shape[-1])
            error = (jnp.exp(log_p) - hot) * weight[:, None]
            loss = -jnp.sum(jnp.sum(log_p * hot, axis=-1) * weight)
            kernel, bias, loss = jax.lax.psum(
                (dot(rows.T, error), jnp.sum(error, axis=0), loss), SHARED
            )
            kernel = momentum * layer.kernel_velocity + kernel
            bias = momentum * layer.bias_velocity + bias
            layer = Layer(
                layer.kernel - learning_rate * kernel,
                layer.bias - learning_rate * bias,
                kernel,
                bias,
            )
            return layer, loss

        layer, losses = jax.lax.scan(step, layer, (order, view))
        return layer, jnp.mean(losses)

    run = jax.shard_map(
        steps, mesh=mesh, in_specs=(P(), BATCH, P(), P(), P()), out_specs=(P(), P())
    )
    return jax.jit(run, donate_argnums=0)


def make_score(mesh: Mesh, *, precision: str) -> Callable:
    """``score(layer, features, labels) -> [top-1, top-5, loss]``, means over labels >= 0.

    ``features`` [n, 1, D] and ``labels`` [n] are split over data and fsdp. A class counts as
    ranked before the true one if its logit is larger, or equal and its index lower.
    """

    def sums(layer, features, labels):
        def chunk(rows):
            x, label = rows
            logits = jnp.dot(
                x[:, 0].astype(jnp.float32), layer.kernel,
                precision=precision, preferred_element_type=jnp.float32,
            ) + layer.bias  # fmt: skip
            counts = label >= 0
            label = jnp.maximum(label, 0)[:, None]
            true = jnp.take_along_axis(logits, label, axis=1)
            before = (logits > true) | ((logits == true) & (jnp.arange(logits.shape[1]) < label))
            rank = jnp.sum(before, axis=1)
            loss = jax.nn.logsumexp(logits, axis=1) - true[:, 0]
            return jnp.stack([jnp.sum(x * counts) for x in (rank < 1, rank < 5, loss, 1)])

        total = jnp.sum(jax.lax.map(chunk, (features, labels)), axis=0)
        total = jax.lax.psum(total, SHARED)
        return total[:3] / total[3]

    def split(features, labels):
        size = min(CHUNK, len(labels))
        pad = -len(labels) % size
        features = jnp.pad(features, ((0, pad), (0, 0), (0, 0)))
        labels = jnp.pad(labels, (0, pad), constant_values=-1)
        return features.reshape(-1, size, *features.shape[1:]), labels.reshape(-1, size)

    run = jax.shard_map(
        lambda layer, features, labels: sums(layer, *split(features, labels)),
        mesh=mesh, in_specs=(P(), BATCH, BATCH), out_specs=P(),
    )  # fmt: skip
    return jax.jit(run)


def ways_of(mesh: Mesh) -> int:
    """Over how many devices rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def channel_moments(latents, views: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) [d] of latents [n, views, ...], streamed in float64.

    The deviation is 1 where a channel is constant.
    """
    moments = Moments(latents.shape[-1])
    for first in range(0, len(latents), CHUNK):
        moments.add(np.asarray(latents[first : first + CHUNK][:, :views]))
    return moments.mean, np.where(varying(moments.mean, moments.std), moments.std, 1)


def put_features(
    latents, mesh: Mesh, settings: ProbeSettings, affine=(0.0, 1.0), *, views: int | None = None
) -> jax.Array:
    """Latents [n, views, h, w, d] as the head sees them, [rows, views, D], split over the devices.

    Each process reads only the rows of its own devices. Rows beyond n, of zeros, make them divide.

    Args:
      affine: (mean, deviation), per channel.
      views: take the first so many; None: all.
    """
    count, there, height, width, channels = latents.shape
    views = views or there
    mean, std = affine
    dimensions = channels * (height * width if settings.head == "flatten" else 1)
    rows = count + -count % ways_of(mesh)

    def read(index):
        first, stop, _ = index[0].indices(rows)
        found = np.zeros((stop - first, views, dimensions), jnp.dtype(settings.dtype))
        for at in range(first, min(stop, count), CHUNK):
            x = np.asarray(latents[at : min(at + CHUNK, stop, count)][:, :views], np.float32)
            x = ((x - mean) / std).astype(np.float32)
            if settings.head == "mean":
                x = x.mean(axis=(2, 3), dtype=np.float64)
            found[at - first : at - first + len(x)] = x.reshape(*x.shape[:2], -1)
        return found

    return jax.make_array_from_callback((rows, views, dimensions), NamedSharding(mesh, BATCH), read)


def sgd_probe(
    train: tuple,
    test: tuple,
    *,
    classes: int,
    mesh: Mesh,
    settings: ProbeSettings = ProbeSettings(),
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> ProbeResult:
    """Trains a linear layer on ``train`` and scores it on ``test`` after every epoch.

    The figures depend on neither the devices nor the processes, up to the rounding of sums.

    Args:
      train, test: (latents [n, h, w, d] or [n, views, h, w, d], labels [n]) on the host, the same
        in every process; memory-mapped arrays are read piece by piece. Views are those of
        `data.latents`; the test set's first is used.
      progress: called after each epoch with its number, from 1, and its figures.

    Raises:
      DataError: if latents or labels do not fit each other, the test set or ``classes``.
      NonFiniteError: if a loss is not finite.
    """
    (latents, labels), (others, other_labels) = (
        _checked(*pair, classes=classes, name=name)
        for pair, name in ((train, "training"), (test, "test"))
    )
    if latents.shape[2:] != others.shape[2:]:
        raise DataError(
            f"the probe's training latents are {list(latents.shape[2:])} and its test latents "
            f"{list(others.shape[2:])}; encode both with the same tokenizer"
        )
    views = latents.shape[1] if settings.flips else 1
    batch_size = min(settings.batch_size, len(labels))
    if batch_size < settings.batch_size:
        logging.warning(
            "probe: only %d training images, so batches of %d in the place of %d: fewer, noisier "
            "steps than the protocol's",
            *(len(labels), batch_size, settings.batch_size),
        )
    affine = channel_moments(latents, views) if settings.standardise else (0.0, 1.0)
    features = put_features(latents, mesh, settings, affine, views=views)
    held_out = put_features(others, mesh, settings, affine, views=1)
    held_out_labels = np.pad(
        other_labels, (0, len(held_out) - len(other_labels)), constant_values=-1
    )
    whole = NamedSharding(mesh, P())
    labels = jax.device_put(labels, whole)
    held_out_labels = jax.make_array_from_callback(
        held_out_labels.shape, NamedSharding(mesh, BATCH), held_out_labels.__getitem__
    )

    init_key, key = jax.random.split(jax.random.key(settings.seed))
    draw = functools.partial(
        draw_batches, images=len(labels), views=views, batch_size=batch_size,
        drop_last=settings.drop_last, ways=ways_of(mesh),
    )  # fmt: skip
    draw = jax.jit(draw, out_shardings=whole)
    epoch = make_epoch(
        mesh, learning_rate=settings.learning_rate, momentum=settings.momentum,
        precision=settings.precision,
    )  # fmt: skip
    score = make_score(mesh, precision=settings.precision)
    dimensions = features.shape[-1]
    layer = jax.jit(initial_layer, static_argnums=(1, 2), out_shardings=whole)(
        init_key, dimensions, classes
    )
    curve = []
    for number in range(1, settings.epochs + 1):
        order, view = draw(jax.random.fold_in(key, number))
        layer, train_loss = epoch(layer, features, labels, order, view)
        scores = score(layer, held_out, held_out_labels)
        figures = [*map(float, jax.device_get(scores)), float(train_loss)]
        names = ("top1", "top5", "loss", "train_loss")
        curve.append(dict(zip(names, figures, strict=True)))
        if not np.all(np.isfinite(figures)):
            raise NonFiniteError(
                f"the probe's losses are not finite in epoch {number} ({curve[-1]}); lower its "
                f"learning_rate {settings.learning_rate} or set standardise=True"
            )
        if progress:
            progress(number, curve[-1])
    columns = {name: tuple(row[name] for row in curve) for name in curve[0]}
    return ProbeResult(**columns, batch_size=batch_size, dimensions=dimensions)


def _checked(latents, labels, *, classes: int, name: str) -> tuple:
    """(latents with views [n, views, h, w, d], labels int32 [n])."""
    labels = np.asarray(labels)
    if latents.ndim not in (4, 5) or labels.shape != latents.shape[:1] or not len(labels):
        raise DataError(
            f"{name} latents {list(latents.shape)} and labels {list(labels.shape)} do not fit a "
            "probe; give [n, h, w, d] or [n, views, h, w, d], and [n]"
        )
    if latents.ndim == 4:
        latents = rearrange(latents, "n h w d -> n 1 h w d")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise DataError(
            f"{name} labels are between {low} and {high}, but the probe has {classes} classes, "
            "numbered from 0"
        )
    return latents, labels.astype(np.int32)
