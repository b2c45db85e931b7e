"""Terms of the training objectives, as pure functions of arrays. All are means."""

import jax
import jax.numpy as jnp

from gae_jax.nn.gaussian import LOGVAR_RANGE


def l1(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Compute mean |prediction - target|; arrays of any one shape."""
    return jnp.mean(jnp.abs(prediction - target))


def mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Compute mean (prediction - target)^2; arrays of any one shape."""
    return jnp.mean(jnp.square(prediction - target))


def cosine_distance(prediction: jax.Array, target: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Compute the mean of 1 - cos over the last axis; norms are at least ``eps``, as in PyTorch."""
    return jnp.mean(1 - cosine(prediction, target, eps))


def cosine(a: jax.Array, b: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Compute cosines over the last axis, [..., C] -> [...]; gradients at zeros are finite."""
    return jnp.sum(a * b, axis=-1) / (_norm(a, eps) * _norm(b, eps))


def _norm(x: jax.Array, eps: float) -> jax.Array:
    """Compute the length over the last axis, at least ``eps``."""
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1), eps**2))


def vf_loss(
    prediction: jax.Array,
    target: jax.Array,
    *,
    cos_margin: float = 0.5,
    distance_margin: float = 0.25,
    cos_weight: float = 1.0,
    distance_weight: float = 1.0,
) -> jax.Array:
    """Compute the alignment loss of VA-VAE (arXiv 2501.01423) between tokens [B, N, C].

    cos_weight * mean relu(1 - cos_margin - cos) token by token, plus
    distance_weight * mean relu(|S(prediction) - S(target)| - distance_margin), where S [B, N, N]
    holds the cosines of an image's tokens with each other.
    """
    apart = jax.nn.relu(1 - cos_margin - cosine(prediction, target))
    unlike = jax.nn.relu(jnp.abs(cosines(prediction) - cosines(target)) - distance_margin)
    return cos_weight * jnp.mean(apart) + distance_weight * jnp.mean(unlike)


def cosines(tokens: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Compute the cosines [B, N, N] of tokens [B, N, C]; norms as in PyTorch's ``normalize``."""
    unit = tokens / _norm(tokens, eps)[..., None]
    # the margins need fp32: by default accelerators would round the operands of the matmul
    return jnp.einsum("bnc,bmc->bnm", unit, unit, precision=jax.lax.Precision.HIGHEST)


def gaussian_kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Compute the KL divergence from N(0, 1): mean of (mean^2 + exp(logvar) - 1 - logvar) / 2.

    The logarithms of the variances are clamped as in the released DiagonalGaussianDistribution,
    which sums over the elements of an image instead.
    """
    logvar = jnp.clip(logvar, *LOGVAR_RANGE)
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Compute the mean softmax cross-entropy of logits [B, classes] and integer labels [B]."""
    log_p = jax.nn.log_softmax(logits)
    target = jax.nn.one_hot(labels, logits.shape[-1])
    target = (1 - smoothing) * target + smoothing / logits.shape[-1]
    return -jnp.mean(jnp.sum(target * log_p, axis=-1))


def hinge_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Compute (mean relu(1 - real) + mean relu(1 + fake)) / 2 of logits of any shape."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def vanilla_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Compute (mean softplus(-real) + mean softplus(fake)) / 2 of logits of any shape."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


def hinge_generator(fake: jax.Array) -> jax.Array:
    """Compute -mean fake of logits of any shape."""
    return -jnp.mean(fake)


def adaptive_weight(
    reference_norm: jax.Array, norm: jax.Array, *, eps: float = 1e-4, largest: float = 1e4
) -> jax.Array:
    """Compute reference_norm / (norm + eps), at most ``largest``; a constant to the gradient.

    The weight of VQGAN (arXiv 2012.09841) that gives a term the gradient of the reference at the
    decoder's last layer, from the norms of both gradients there. VA-VAE's training gives the
    alignment the same at the encoder's last layer, with 1e8 as the largest.
    """
    return jax.lax.stop_gradient(jnp.clip(reference_norm / (norm + eps), 0.0, largest))


def feature_distance(prediction: list[jax.Array], target: list[jax.Array]) -> jax.Array:
    """Compute a perceptual distance in the manner of LPIPS, without learned weights.

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
    return sum(distances, jnp.zeros(())) / len(distances)
