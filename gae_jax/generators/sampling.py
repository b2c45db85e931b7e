"""Samplers made of a config's fields, and images drawn with them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.generators import flow, samplers
from gae_jax.generators.latent_diffusion import LatentDiffusion
from gae_jax.nn import sphere
from gae_jax.nn.pixels import to_uint8

SETS = ("sde", "ode")
DECODER = 2**32 - 1  # index of the decoder's noise, which no step of a sampler has


class Networks(NamedTuple):
    """What draws: a diffusion model, its tokenizer, and for autoguidance a weaker model."""

    diffusion: Any
    tokenizer: Any
    weaker: Any = None

    @property
    def arrays(self) -> tuple:
        """Of each, in this order."""
        return tuple(loaded and loaded[1] for loaded in self)


def velocity_of(
    model: LatentDiffusion,
    weaker: LatentDiffusion | None,
    labels: jax.Array,
    *,
    guidance: float,
    guidance_start: float,
    guidance_end: float,
    guidance_channels: int,
    guidance_parts: tuple = (),
) -> samplers.Velocity:
    """The velocity that a sampler follows; a guidance of 1 is none and asks for one model only.

    ``guidance_parts``, as of `samplers.guided_in_parts`, take the place of one scale in an
    interval.
    """

    def conditional(x, t):
        return model.velocity(x, t, labels)

    def both(x, t):
        if weaker is not None:
            return conditional(x, t), weaker.velocity(x, t, labels)
        twice = jnp.concatenate([labels, jnp.full_like(labels, model.dit.num_classes)])
        return jnp.split(model.velocity(jnp.concatenate([x, x]), t, twice), 2)

    if guidance_parts:
        return samplers.guided_in_parts(
            conditional, both, parts=guidance_parts, channels=guidance_channels
        )
    if guidance == 1:
        return conditional
    return samplers.guided(
        conditional,
        both,
        scale=guidance,
        start=guidance_start,
        end=guidance_end,
        channels=guidance_channels,
    )


def calls_at(guidance: Mapping[str, Any]) -> Callable:
    """Times -> the calls of networks that `velocity_of` with this guidance makes there."""
    if parts := guidance.get("guidance_parts"):
        return lambda t: 1 + (samplers.scale_at(t, parts) != 1).astype(np.int32)
    if guidance["guidance"] == 1:
        return lambda t: np.ones(np.shape(t), np.int32)
    return partial(
        samplers.calls_at, start=guidance["guidance_start"], end=guidance["guidance_end"]
    )


def sde_sampler(
    *,
    method: str,
    steps: int,
    start: float,
    time_shift: float,
    form: str,
    norm: float,
    last_step: str,
    last_step_size: float,
    **guidance,
) -> Callable:
    """Stochastic sampling on ``steps`` points, of which the last is that of the last step.

    The grid ends at 1 - last_step_size before it is shifted, and the last step leads from where it
    really ends to 1; with "reference" it stops short of 1, as the released sampler does.
    """
    grid = flow.time_grid(steps, start=start, end=1 - last_step_size, shift=time_shift)
    times = samplers.times_of(method, grid)
    if last_step == "reference":
        times = np.append(times, np.float32(1 - last_step_size))
    elif last_step != "none":
        times = np.append(times, grid[-1])
    calls = jnp.asarray(np.sum(calls_at(guidance)(times)))

    def sample(model, weaker, x, labels, keys):
        found = samplers.sde(
            velocity_of(model, weaker, labels, **guidance),
            x,
            grid,
            noise=lambda index: samplers.noise_for(keys, x.shape[1:], index + 1),
            method=method,
            form=form,
            norm=norm,
            last_step=last_step,
            last_step_size=last_step_size,
            path=model.path,
        )
        return samplers.Solution(found, calls)

    return sample


def ode_sampler(
    *,
    method: str,
    steps: int,
    end: float = 1.0,
    time_shift: float,
    rtol: float,
    atol: float,
    **guidance,
) -> Callable:
    """Deterministic sampling on ``steps`` points, or with steps of its own choice ("dopri5").

    It ends at ``end``, which the grid is shifted from, or sooner where the model ends.
    """
    asked, last = calls_at(guidance), end

    def sample(model, weaker, x, labels, keys):
        del keys
        velocity, (start, end) = velocity_of(model, weaker, labels, **guidance), model.time_range
        end = min(end, last)
        if method == "dopri5":
            return samplers.dopri5(velocity, x, start, end, rtol=rtol, atol=atol, calls_at=asked)
        grid = flow.time_grid(steps, shift=time_shift, start=start, end=end)
        calls = jnp.asarray(np.sum(asked(samplers.times_of(method, grid))))
        if model.geometry == "sphere":
            found = samplers.euler(velocity, x, grid, move=sphere.exponential)
            return samplers.Solution(found, calls)
        return samplers.Solution(samplers.SOLVERS[method](velocity, x, grid), calls)

    return sample


MAKERS = {"sde": sde_sampler, "ode": ode_sampler}


def make_draw(networks: Networks, sampler: Callable) -> Callable:
    """Of (arrays, key, ids, labels) -> (uint8 images, calls of networks per image), to be jitted.

    ``arrays`` are those of the networks, in their order.
    """

    def draw(arrays, key, ids, labels):
        model, decoder, weaker = (
            loaded and loaded[0](*own) for loaded, own in zip(networks, arrays, strict=True)
        )
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
        noise = samplers.noise_for(keys, decoder.latent_shape)
        found = sampler(model, weaker, model.prior(noise), labels, keys)
        # a decoder that draws noise must not draw the sampler's
        own = jax.vmap(lambda k: jax.random.fold_in(k, DECODER))(keys)
        return to_uint8(decoder.decode(model.denormalize(found.x), own)), found.calls

    return draw
