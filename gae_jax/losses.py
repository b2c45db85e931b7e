"""Terms of the training objectives, as pure functions of arrays. All are means."""

import jax
import jax.numpy as jnp


def l1(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """mean |prediction - target|."""
    return jnp.mean(jnp.abs(prediction - target))


def mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """mean (prediction - target)^2."""
    return jnp.mean(jnp.square(prediction - target))


def cosine_distance(prediction: jax.Array, target: jax.Array, eps: float = 1e-8) -> jax.Array:
    """mean of 1 - cos over the last axis; each norm is at least ``eps``, as in PyTorch."""
    return jnp.mean(1 - cosine(prediction, target, eps))


def cosine(a: jax.Array, b: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Cosine similarity over the last axis, with a finite gradient at zero vectors."""

    def norm(x):
        return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1), eps**2))

    return jnp.sum(a * b, axis=-1) / (norm(a) * norm(b))


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy with integer labels and label smoothing."""
    log_p = jax.nn.log_softmax(logits)
    target = jax.nn.one_hot(labels, logits.shape[-1])
    target = (1 - smoothing) * target + smoothing / logits.shape[-1]
    return -jnp.mean(jnp.sum(target * log_p, axis=-1))


def hinge_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: jax.Array) -> jax.Array:
    """-mean fake."""
    return -jnp.mean(fake)


def feature_distance(prediction: list[jax.Array], target: list[jax.Array]) -> jax.Array:
    """A perceptual distance in the manner of LPIPS, without learned weights.

    Each feature map [B, N, C] is normalised to unit length per token; the squared differences
    are summed over channels, averaged over tokens and images, and averaged over the maps.
    """

    def unit(x):
        # eps inside the root: the gradient at a zero vector is finite
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-10)

    distances = [
        jnp.mean(jnp.sum(jnp.square(unit(p) - unit(t)), axis=-1))
        for p, t in zip(prediction, target, strict=True)
    ]
    return sum(distances) / len(distances)
