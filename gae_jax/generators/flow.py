"""Flow matching: paths between noise and data, what a network predicts on them, and its loss.

t = 0 is noise, t = 1 is data; x_t = alpha(t) x1 + sigma(t) x0 with x0 ~ N(0, I). Paths, predictions
and weightings are those of the released code, which has them from SiT (arXiv 2401.08740); GAE
trains velocities on the linear path.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.nn.losses import cosine_distance, mse

Coefficient = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Path:
    """x_t = alpha(t) x1 + sigma(t) x0, and its velocity d_alpha(t) x1 + d_sigma(t) x0.

    Attributes:
      log_slope: d_alpha / alpha.
      drift: g(t) = log_slope sigma^2 - sigma d_sigma, the diffusion for which the SDE has the
        score alone in its drift ("SBDM").
    """

    alpha: Coefficient
    d_alpha: Coefficient
    sigma: Coefficient
    d_sigma: Coefficient
    log_slope: Coefficient
    drift: Coefficient


def _linear() -> Path:
    return Path(
        alpha=lambda t: t,
        d_alpha=jnp.ones_like,
        sigma=lambda t: 1 - t,
        d_sigma=lambda t: -jnp.ones_like(t),
        log_slope=lambda t: 1 / t,
        drift=lambda t: (1 - t) / t,
    )


def _gvp() -> Path:
    """Make the GVP path: alpha^2 + sigma^2 = 1 along a quarter of a circle."""
    half = jnp.pi / 2
    return Path(
        alpha=lambda t: jnp.sin(half * t),
        d_alpha=lambda t: half * jnp.cos(half * t),
        sigma=lambda t: jnp.cos(half * t),
        d_sigma=lambda t: -half * jnp.sin(half * t),
        log_slope=lambda t: half / jnp.tan(half * t),
        drift=lambda t: half / jnp.tan(half * t),
    )


def _vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """Make the variance-preserving path with a linear beta, DDPM's in continuous time."""

    def log_alpha(t):
        return -0.25 * (1 - t) ** 2 * (beta_max - beta_min) - 0.5 * (1 - t) * beta_min

    def half_beta(t):
        return 0.5 * (beta_min + (1 - t) * (beta_max - beta_min))

    def sigma(t):
        return jnp.sqrt(-jnp.expm1(2 * log_alpha(t)))

    return Path(
        alpha=lambda t: jnp.exp(log_alpha(t)),
        d_alpha=lambda t: jnp.exp(log_alpha(t)) * half_beta(t),
        sigma=sigma,
        d_sigma=lambda t: -jnp.exp(2 * log_alpha(t)) * half_beta(t) / sigma(t),
        log_slope=half_beta,
        drift=half_beta,
    )


PATHS = {"linear": _linear(), "gvp": _gvp(), "vp": _vp()}
LINEAR = PATHS["linear"]
PREDICTIONS = ("velocity", "noise", "score")
WEIGHTINGS = ("none", "velocity", "likelihood")
TIMES = ("logit_normal", "uniform")


def expand(t: jax.Array, x: jax.Array) -> jax.Array:
    """Reshape times [B], or one for all, so that they multiply x [B, ...]."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (x.ndim - 1))


def shift_time(t, shift: float):
    """Return shift * t / (1 + (shift - 1) t); below 1 it moves times towards noise, 1 is none."""
    return (shift * t) / (1 + (shift - 1) * t)


def time_range(path: str, prediction: str) -> tuple[float, float]:
    """Return the times of training and ODE: [0, 1] without ends that divide by zero.

    The released code trains with these; its samplers were given no bounds for anything but the
    velocity of the linear and GVP paths and stop with an error there.
    """
    if path == "vp":
        return 0.0, 1 - 1e-5
    return (0.0, 1.0) if prediction == "velocity" else (1e-3, 1 - 1e-3)


def sample_time(
    key: jax.Array,
    batch: int,
    *,
    mean: float,
    std: float,
    shift: float,
    kind: str = "logit_normal",
    bounds: tuple[float, float] = (0.0, 1.0),
    least: float = 0.0,
) -> jax.Array:
    """Sample training times, [batch].

    Args:
      mean, std: of the logit, with "logit_normal".
      shift: as `shift_time`, applied last.
      kind: "logit_normal" or "uniform".
      bounds: that the times are scaled to before they are shifted.
      least: where "logit_normal" is cut off below, as RAE (arXiv 2510.11690, released code) does
        at 1e-3: the distribution given that t is more, before bounds and shift.
    """
    if kind == "uniform":
        t = jax.random.uniform(key, (batch,))
    elif least:
        below = jax.scipy.stats.norm.cdf((np.log(least / (1 - least)) - mean) / std)
        # 1 - quantile: near 1, where most of the data is, fp32 would round the quantile itself
        above = jax.random.uniform(key, (batch,), minval=1e-7, maxval=1 - below)
        t = jnp.maximum(jax.nn.sigmoid(mean - std * jax.scipy.special.ndtri(above)), least)
    else:
        t = jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,)))
    low, high = bounds
    return shift_time(low + (high - low) * t, shift)


def interpolate(noise: jax.Array, data: jax.Array, t: jax.Array, path: Path = LINEAR) -> jax.Array:
    """Compute x_t for times t [B]."""
    t = expand(t, data)
    return path.alpha(t) * data + path.sigma(t) * noise


def target_velocity(
    noise: jax.Array, data: jax.Array, t: jax.Array, path: Path = LINEAR
) -> jax.Array:
    """Compute d x_t / d t for times t [B]."""
    t = expand(t, data)
    return path.d_alpha(t) * data + path.d_sigma(t) * noise


def velocity_loss(
    velocity: jax.Array, target: jax.Array, *, cosine_weight: float = 1.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return mean squared error plus weighted cosine distance over channels, and both terms."""
    terms = {"mse": mse(velocity, target), "cosine": cosine_distance(velocity, target)}
    return terms["mse"] + cosine_weight * terms["cosine"], terms


def flow_loss(
    output: jax.Array,
    noise: jax.Array,
    data: jax.Array,
    t: jax.Array,
    *,
    path: Path = LINEAR,
    prediction: str = "velocity",
    weighting: str = "none",
    cosine_weight: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the training loss and its terms; all are means.

    Of a velocity it is `velocity_loss` against x_t's own. A noise e has
    w(t) (e - x0)^2 and a score s has w(t) (sigma s + x0)^2, where w is 1, (g / sigma)^2 with
    "velocity" or g / sigma^2 with "likelihood", and g is `Path.drift`.

    Args:
      output: of the network at x_t, [B, ..., C].
      noise, data: x0 and x1.
      t: [B].
    """
    if prediction == "velocity":
        target = target_velocity(noise, data, t, path)
        return velocity_loss(output, target, cosine_weight=cosine_weight)
    t = expand(t, data)
    sigma, g = path.sigma(t), path.drift(t)
    weight = {"none": jnp.ones_like(t), "velocity": (g / sigma) ** 2, "likelihood": g / sigma**2}
    miss = output - noise if prediction == "noise" else output * sigma + noise
    terms = {"mse": jnp.mean(jnp.square(miss))}
    return jnp.mean(weight[weighting] * jnp.square(miss)), terms


def score_of_velocity(
    velocity: jax.Array, x: jax.Array, t: jax.Array, path: Path = LINEAR
) -> jax.Array:
    """Compute the score of x_t: (r v - x) / (sigma^2 - r sigma d_sigma), r = alpha/d_alpha.

    On the linear path (t v - x) / (1 - t).
    """
    t = expand(t, x)
    ratio, sigma = 1 / path.log_slope(t), path.sigma(t)
    return (ratio * velocity - x) / (sigma**2 - ratio * path.d_sigma(t) * sigma)


def velocity_of_score(
    score: jax.Array, x: jax.Array, t: jax.Array, path: Path = LINEAR
) -> jax.Array:
    """Invert `score_of_velocity`: log_slope x + g score."""
    t = expand(t, x)
    return path.log_slope(t) * x + path.drift(t) * score


def data_of_velocity(
    velocity: jax.Array, x: jax.Array, t: jax.Array, path: Path = LINEAR
) -> jax.Array:
    """Estimate the mean of x1 given x_t (Tweedie): (x + sigma^2 score) / alpha."""
    sigma = path.sigma(expand(t, x))
    return (x + sigma**2 * score_of_velocity(velocity, x, t, path)) / path.alpha(expand(t, x))


def velocity_of(
    output: jax.Array, x: jax.Array, t: jax.Array, *, path: Path = LINEAR, prediction: str
) -> jax.Array:
    """Convert what the network predicts to a velocity."""
    if prediction == "velocity":
        return output
    score = output if prediction == "score" else -output / path.sigma(expand(t, x))
    return velocity_of_score(score, x, t, path)


def time_grid(
    points: int, *, shift: float = 1.0, start: float = 0.0, end: float = 1.0
) -> np.ndarray:
    """Return ``points`` times from start to end, then shifted; fp32 [points].

    In the arithmetic of the released sampler, so that its grids are reproduced bit for bit. As
    there, the shift is applied to the complete grid: a grid that ends before 1 ends even earlier
    after a shift below 1 (0.996 becomes 0.990 at shift 0.4).
    """
    f = np.float32
    first, last = f(start), f(end)
    # torch.linspace goes from either end to the middle, each value rounded once (multiply-add)
    step, index = np.float64((last - first) / f(points - 1)), np.arange(points)
    up, down = first + step * index, last - step * (points - 1 - index)
    grid = np.where(index < points // 2, up, down).astype(f)
    return grid if shift == 1 else (f(shift) * grid) / (f(1) + f(shift - 1) * grid)
