"""Samplers over a velocity: plain functions, independent of networks.

``velocity(x, t)`` takes x [B, ...] and a scalar time t (0 noise, 1 data). Solvers of fixed steps
take the times as a grid [points] and make ``len(grid) - 1`` steps. What a network predicts is
turned into a velocity by `flow.velocity_of`, `guidance.guided` wraps one, and the score that an
SDE needs comes from the velocity in closed form: one call of the network is one call of
``velocity``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.generators import flow
from gae_jax.generators.guidance import Velocity

SDE_METHODS = ("euler", "heun")
LAST_STEPS = ("mean", "tweedie", "euler", "none", "reference")


def noise_for(keys: jax.Array, shape: tuple[int, ...], index=0) -> jax.Array:
    """Sample normal noise [B, *shape], one key per sample: devices do not matter."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def euler(
    velocity: Velocity, x: jax.Array, grid: jax.Array | np.ndarray, *, move: Callable = jnp.add
) -> jax.Array:
    """Solve the ODE to first order; one call per step.

    Args:
      move: (x, step) -> where a step from x leads; on a manifold its exponential map.
    """

    def step(x, times):
        t, end = times
        return move(x, (end - t) * velocity(x, t)), None

    return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]


def heun(velocity: Velocity, x: jax.Array, grid: jax.Array | np.ndarray) -> jax.Array:
    """Solve the ODE to second order (explicit trapezoid); two calls per step."""

    def step(x, times):
        t, end = times
        first = velocity(x, t)
        second = velocity(x + (end - t) * first, end)
        return x + (end - t) * (first + second) / 2, None

    return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]


def adams_bashforth(velocity: Velocity, x: jax.Array, grid: jax.Array | np.ndarray) -> jax.Array:
    """Solve the ODE to second order by a multistep method for uneven steps; one call per step.

    x += h (v + h / (2 h') (v - v')), where ' is the step before; the first step is Euler's.
    """

    def step(carry, times):
        x, before, ratio = carry
        t, end, ratio_after = times
        v = velocity(x, t)
        return (x + (end - t) * (v + ratio / 2 * (v - before)), v, ratio_after), None

    h = grid[1:] - grid[:-1]
    after = jnp.append(h[1:] / h[:-1], 0.0)
    start = (x, jnp.zeros_like(x), jnp.zeros((), x.dtype))
    return jax.lax.scan(step, start, (grid[:-1], grid[1:], after))[0][0]


# Of fixed steps; `dopri5` chooses its own.
SOLVERS = {"euler": euler, "heun": heun, "adams_bashforth": adams_bashforth}
ODE_METHODS = (*SOLVERS, "dopri5")

# The method of Dormand and Prince: nodes, stages, and the weights of the error and of the value
# in the middle of a step (as in torchdiffeq and jax.experimental.ode).
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (
    *(35 / 384 - 1951 / 21600, 0.0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720),
    *(-2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60),
)
_MIDDLE = (
    *(6025192743 / 30085553152 / 2, 0.0, 51252292925 / 65400821598 / 2),
    *(-2691868925 / 45128329728 / 2, 187940372067 / 1594534317056 / 2),
    *(-1776094331 / 19743644256 / 2, 11237099 / 235043384 / 2),
)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _sum(weights, arrays) -> jax.Array:
    return sum(w * a for w, a in zip(weights, arrays, strict=True) if w)


class Solution(NamedTuple):
    """A solver's result, and the number of network calls that it took."""

    x: jax.Array
    calls: jax.Array


def dopri5(
    velocity: Velocity,
    x: jax.Array,
    start: float,
    end: float,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_calls: int = 100_000,
    calls_at: Callable[[jax.Array], jax.Array] = jnp.ones_like,
) -> Solution:
    """Solve the ODE adaptively, to order 5 (Dormand and Prince).

    First step, error norm, growth of the steps and the interpolation at the end are those of
    torchdiffeq, which the released sampler calls. The step size is chosen for the complete batch,
    so a sample depends a little on the others. The last step goes beyond the end and is
    interpolated there, which no tolerance controls: with few steps (rtol above 1e-3) that error is
    the largest.

    Args:
      rtol, atol: a step is accepted if the root mean square of error / (atol + rtol |x|) over the
        batch is at most 1.
      max_calls: where it stops; the result is then NaN.
      calls_at: network calls that the velocity makes at time t, see `guidance.calls_at`.
    """
    t0, t1 = (jnp.asarray(t, x.dtype) for t in (start, end))

    def first_size(v):
        scale = atol + rtol * jnp.abs(x)
        d0, d1 = _rms(x / scale), _rms(v / scale)
        h0 = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        d2 = _rms((velocity(x + h0 * v, t0 + h0) - v) / scale) / h0
        flat = (d1 <= 1e-15) & (d2 <= 1e-15)
        h1 = jnp.where(flat, jnp.maximum(1e-6, h0 * 1e-3), (0.01 / jnp.maximum(d1, d2)) ** (1 / 5))
        asked = sum(jnp.asarray(calls_at(t), jnp.int32) for t in (t0, t0 + h0))
        return jnp.minimum(100 * h0, h1), asked

    def attempt(x, v, t, h):
        slopes = [v]
        for node, weights in zip(_NODES, _STAGES, strict=True):
            slopes.append(velocity(x + h * _sum(weights, slopes), t + node * h))
        new = x + h * _sum(_STAGES[-1], slopes[:-1])
        tolerance = atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(new))
        error = _rms(h * _sum(_ERROR, slopes) / tolerance)
        return new, slopes[-1], x + h * _sum(_MIDDLE, slopes), error

    def step(carry):
        x, v, t, h, _, calls = carry
        new, v_new, middle, error = attempt(x, v, t, h)
        accept = error <= 1
        grow = jnp.clip(0.9 * error ** (-1 / 5), jnp.where(accept, 1.0, 0.2), 10.0)
        fit = _quartic(x, middle, new, v, v_new, h)
        at_end = jnp.where(accept, _value(fit, (t1 - t) / h), x)
        where = (
            jnp.where(accept, new, x),
            jnp.where(accept, v_new, v),
            jnp.where(accept, t + h, t),
        )
        asked = sum(jnp.asarray(calls_at(t + node * h), jnp.int32) for node in _NODES)
        return *where, h * grow, at_end, calls + asked

    def unfinished(carry):
        return (carry[2] < t1) & (carry[-1] < max_calls)

    v = velocity(x, t0)
    h, asked = first_size(v)
    first = (x, v, t0, h, x, asked)
    *_, t, _, x_end, calls = jax.lax.while_loop(unfinished, step, first)
    return Solution(jnp.where(t < t1, jnp.nan, x_end), calls)


def _quartic(x, middle, new, v, v_new, h):
    """Coefficients, highest power first, of the polynomial through a step's values and slopes."""
    return (
        2 * h * (v_new - v) - 8 * (new + x) + 16 * middle,
        h * (5 * v - 3 * v_new) + 18 * x + 14 * new - 32 * middle,
        h * (v_new - 4 * v) - 11 * x - 5 * new + 16 * middle,
        h * v,
        x,
    )


def _value(coefficients, at) -> jax.Array:
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * at + coefficient
    return value


# g(t), how much noise the SDE adds and takes away again; any will do in theory.
DIFFUSIONS: dict[str, Callable[[flow.Path, jax.Array], jax.Array]] = {
    "sbdm": lambda path, t: path.drift(t),
    "sigma": lambda path, t: path.sigma(t),
    "linear": lambda path, t: 1 - t,
    "constant": lambda path, t: jnp.ones_like(t),
    "increasing-decreasing": lambda path, t: jnp.sin(math.pi * t) ** 2,
}


def diffusion(form: str, norm: float, t: jax.Array, path: flow.Path = flow.LINEAR) -> jax.Array:
    """Return g(t) of the released code: "decreasing", or ``norm`` times one of `DIFFUSIONS`."""
    if form == "decreasing":
        return 0.25 * (norm * jnp.cos(math.pi * t) + 1) ** 2
    return norm * DIFFUSIONS[form](path, t)


FORMS = (*DIFFUSIONS, "decreasing")


def sde(
    velocity: Velocity,
    x: jax.Array,
    grid: jax.Array | np.ndarray,
    *,
    noise: Callable[[jax.Array], jax.Array],
    method: str = "euler",
    form: str = "sbdm",
    norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.0,
    path: flow.Path = flow.LINEAR,
) -> jax.Array:
    """Solve dx = (v + g s) dt + sqrt(2 g) dW, whose marginals are the same for every g.

    ``len(grid) - 1`` steps of one call ("euler", after Maruyama) or two ("heun"), and one more call
    for the last step, except for "none".

    Args:
      noise: step index -> standard normal array of x's shape.
      form, norm: of g, as `diffusion`.
      last_step: from where the grid ends to t = 1 without noise: "mean" follows the SDE's drift,
        "euler" the velocity, "tweedie" jumps to the mean of the data, "none" stays. "reference" is
        the released sampler's "mean": it has the size ``last_step_size`` and evaluates the drift at
        1 - last_step_size, although a grid that was shifted ends earlier.
    """

    def drift(x, t):
        v, g = velocity(x, t), diffusion(form, norm, t, path)
        return v + g * flow.score_of_velocity(v, x, t, path)

    def euler_step(x, inputs):
        index, t, end = inputs
        h = end - t
        kick = jnp.sqrt(2 * diffusion(form, norm, t, path) * h) * noise(index)
        return x + h * drift(x, t) + kick, None

    def heun_step(x, inputs):
        index, t, end = inputs
        h = end - t
        x = x + jnp.sqrt(2 * diffusion(form, norm, t, path) * h) * noise(index)
        first = drift(x, t)
        return x + h / 2 * (first + drift(x + h * first, end)), None

    steps = (jnp.arange(len(grid) - 1), jnp.asarray(grid[:-1]), jnp.asarray(grid[1:]))
    x = jax.lax.scan({"euler": euler_step, "heun": heun_step}[method], x, steps)[0]
    end = jnp.asarray(grid[-1])
    if last_step == "none":
        return x
    if last_step == "reference":
        size = jnp.asarray(last_step_size, x.dtype)
        return x + size * drift(x, 1 - size)
    if last_step == "tweedie":
        return flow.data_of_velocity(velocity(x, end), x, end, path)
    return x + (1 - end) * (drift if last_step == "mean" else velocity)(x, end)


def times_of(method: str, grid: np.ndarray) -> np.ndarray:
    """Return the times at which a solver of fixed steps calls the velocity."""
    return np.concatenate([grid[:-1], grid[1:]]) if method == "heun" else grid[:-1]


def log_likelihood(
    velocity: Velocity, x: jax.Array, grid: jax.Array | np.ndarray, signs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return log p(x) in nats, by the flow's ODE from data to noise, and that noise.

    log p(x1) = log N(x0) - integral of div v dt along the path; the divergence is estimated by
    Hutchinson with one random sign per coordinate and sample, drawn once (FFJORD, arXiv
    1810.01367). Heun's method, two calls per step, each with its vector-Jacobian product.

    Args:
      x: [B, ...].
      grid: times from 0 to 1, as for sampling; it is followed backwards.
      signs: [B, ...], random, each +1 or -1.

    Returns:
      (log density [B], noise [B, ...]).
    """
    signs = signs.astype(x.dtype)

    def slopes(x, t):
        v, pull = jax.vjp(lambda x: velocity(x, t), x)
        return v, jnp.sum(pull(signs)[0] * signs, axis=tuple(range(1, x.ndim)))

    def step(carry, times):
        x, total = carry
        t, end = times
        v, divergence = slopes(x, t)
        v_end, divergence_end = slopes(x + (end - t) * v, end)
        h = (end - t) / 2  # negative
        return (x + h * (v + v_end), total + h * (divergence + divergence_end)), None

    backwards = jnp.asarray(grid)[::-1]
    start = (x, jnp.zeros(len(x), x.dtype))
    (noise, change), _ = jax.lax.scan(step, start, (backwards[:-1], backwards[1:]))
    square = jnp.sum(jnp.square(noise), axis=tuple(range(1, x.ndim)))
    prior = -0.5 * (square + noise[0].size * math.log(2 * math.pi))
    return prior + change, noise
