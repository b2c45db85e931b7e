"""The compiled parts of the linear probe: an epoch of SGD and the scores of a linear layer."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gae_jax.runtime.mesh import BATCH

SHARED = BATCH[0]  # mesh axes that rows are split over
CHUNK = 2048  # rows that are read from the host, or scored on a device, at once


class Layer(NamedTuple):
    """The probe's weights, float32, and the momentum of each."""

    kernel: jax.Array  # [D, classes]
    bias: jax.Array  # [classes]
    kernel_velocity: jax.Array
    bias_velocity: jax.Array


def initial_layer(key: jax.Array, dimensions: int, classes: int) -> Layer:
    """Sample weights and biases from U(-1 / sqrt(D), 1 / sqrt(D)), as torch's nn.Linear."""
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
    """Shuffle an epoch: (image, view), both int32 [steps, rows].

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
    """Compile ``epoch(layer, features, labels, order, view) -> (layer, mean loss)``.

    It donates the layer. ``features`` [n, views, D] are split over data and fsdp, ``labels`` [n]
    are replicated, ``order`` and ``view`` [steps, rows] are those of `draw_batches`. SGD as in
    torch: velocity = momentum * velocity + gradient, weight -= learning_rate * velocity.
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
    """Compile ``score(layer, features, labels) -> [top-1, top-5, loss]``, means over labels >= 0.

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
    """Return the number of devices that rows are split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
