"""The linear probe of the paper (Appendix I): one linear layer on frozen latents, by plain SGD.

Latents are encoded once and stay on the devices, split by rows over data and fsdp: an epoch is one
compiled scan over its steps. A step gathers its rows on the devices that hold them, sends each
device an equal share of the batch and applies the gradient X^T (softmax - onehot) / B, which
needs no differentiation through the layer.

What the paper does not state (momentum, standardisation, mirrored images, initial weights, the
last batch) is ours, and marked so in `ProbeSettings`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax.data.latent_shards import Moments, varying
from gae_jax.evaluation.sgd_epoch import (
    CHUNK,
    draw_batches,
    initial_layer,
    make_epoch,
    make_score,
    ways_of,
)
from gae_jax.runtime.errors import ConfigError, DataError, NonFiniteError
from gae_jax.runtime.mesh import BATCH

HEADS = ("flatten", "mean")


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How the probe is trained; the defaults are the paper's where it states them.

    Args:
      head: "flatten" sees all h * w * d numbers, "mean" their mean over positions, d numbers.
      flips: draw one of an image's views (itself, its mirror image) in each epoch, where the
        latents have both; else the image itself.
      standardise: subtract the channels' mean and divide by their std, over all training
        latents that are drawn from.
      drop_last: leave out the images that do not fill a batch; each epoch others.
      dtype: of the latents on the devices; "bfloat16" takes half the memory. Weights, gradients
        and sums are float32.
      precision: of matmuls, a `jax.lax.Precision`; below "highest" a GPU or TPU rounds
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


def channel_moments(latents, views: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Compute (mean, std) [d] of latents [n, views, ...], streamed in float64.

    The std is 1 where a channel is constant.
    """
    moments = Moments(latents.shape[-1])
    for first in range(0, len(latents), CHUNK):
        moments.add(np.asarray(latents[first : first + CHUNK][:, :views]))
    return moments.mean, np.where(varying(moments.mean, moments.std), moments.std, 1)


def put_features(
    latents, mesh: Mesh, settings: ProbeSettings, affine=(0.0, 1.0), *, views: int | None = None
) -> jax.Array:
    """Put latents on the devices as the head sees them, [rows, views, D], split by rows.

    Each process reads only the rows of its own devices. Rows beyond n, of zeros, make them divide.

    Args:
      affine: (mean, std), per channel.
      views: number to use, the first ones; None: all.
    """
    count, stored_views, height, width, channels = latents.shape
    views = views or stored_views
    mean, std = affine
    dimensions = channels * (height * width if settings.head == "flatten" else 1)
    rows = count + -count % ways_of(mesh)

    def read(index):
        first, stop, _ = index[0].indices(rows)
        rows_read = np.zeros((stop - first, views, dimensions), jnp.dtype(settings.dtype))
        for at in range(first, min(stop, count), CHUNK):
            x = np.asarray(latents[at : min(at + CHUNK, stop, count)][:, :views], np.float32)
            x = ((x - mean) / std).astype(np.float32)
            if settings.head == "mean":
                x = x.mean(axis=(2, 3), dtype=np.float64)
            rows_read[at - first : at - first + len(x)] = x.reshape(*x.shape[:2], -1)
        return rows_read

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
    """Train a linear layer on ``train`` and score it on ``test`` after every epoch.

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
    (latents, labels), (test_latents, test_labels) = (
        _checked(*pair, classes=classes, name=name)
        for pair, name in ((train, "training"), (test, "test"))
    )
    if latents.shape[2:] != test_latents.shape[2:]:
        raise DataError(
            f"the probe's training latents are {list(latents.shape[2:])} and its test latents "
            f"{list(test_latents.shape[2:])}; encode both with the same tokenizer"
        )
    views = latents.shape[1] if settings.flips else 1
    batch_size = min(settings.batch_size, len(labels))
    if batch_size < settings.batch_size:
        logging.warning(
            "probe: only %d training images, so batches of %d instead of %d: fewer, noisier "
            "steps than the protocol's",
            *(len(labels), batch_size, settings.batch_size),
        )
    affine = channel_moments(latents, views) if settings.standardise else (0.0, 1.0)
    features = put_features(latents, mesh, settings, affine, views=views)
    test_features = put_features(test_latents, mesh, settings, affine, views=1)
    padding = (0, len(test_features) - len(test_labels))
    padded_labels = np.pad(test_labels, padding, constant_values=-1)
    replicated = NamedSharding(mesh, P())
    train_labels = jax.device_put(labels, replicated)
    sharded_test_labels = jax.make_array_from_callback(
        padded_labels.shape, NamedSharding(mesh, BATCH), padded_labels.__getitem__
    )

    init_key, key = jax.random.split(jax.random.key(settings.seed))
    draw_epoch = functools.partial(
        draw_batches, images=len(labels), views=views, batch_size=batch_size,
        drop_last=settings.drop_last, ways=ways_of(mesh),
    )  # fmt: skip
    draw = jax.jit(draw_epoch, out_shardings=replicated)
    epoch = make_epoch(
        mesh, learning_rate=settings.learning_rate, momentum=settings.momentum,
        precision=settings.precision,
    )  # fmt: skip
    score = make_score(mesh, precision=settings.precision)
    dimensions = features.shape[-1]
    layer = jax.jit(initial_layer, static_argnums=(1, 2), out_shardings=replicated)(
        init_key, dimensions, classes
    )
    curve = []
    for number in range(1, settings.epochs + 1):
        order, view = draw(jax.random.fold_in(key, number))
        layer, train_loss = epoch(layer, features, train_labels, order, view)
        scores = score(layer, test_features, sharded_test_labels)
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
    """Return (latents with views [n, views, h, w, d], labels int32 [n]), checked."""
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
