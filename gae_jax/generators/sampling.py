"""Samplers from a config's fields, and sampling of images with them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.generators import flow, samplers
from gae_jax.generators.guidance import Excess, Velocity, calls_at, guided, in_interval, in_parts
from gae_jax.generators.latent_diffusion import LatentDiffusion
from gae_jax.nn import sphere
from gae_jax.nn.pixels import to_uint8

SETS = ("sde", "ode")
DECODER = 2**32 - 1  # index of the decoder's noise, which no step of a sampler has


class Networks(NamedTuple):
    """Networks that sample: a diffusion model, its tokenizer, and a weaker model or None."""

    diffusion: Any
    tokenizer: Any
    weaker: Any = None

    @property
    def arrays(self) -> tuple:
        """Return the arrays of each network, in this order."""
        return tuple(loaded and loaded[1] for loaded in self)


def excess_of(
    *,
    guidance: float,
    guidance_start: float,
    guidance_end: float,
    guidance_parts: tuple = (),
) -> Excess | None:
    """Return the guidance scale over time, as `generators.guidance` has it; None: no guidance.

    Args:
      guidance: scale for guidance_start <= t <= guidance_end; 1 is none.
      guidance_parts: if any, (last time, scale) of every part of the time, instead of one scale.
    """
    if guidance_parts:
        return in_parts(guidance_parts)
    return None if guidance == 1 else in_interval(guidance, guidance_start, guidance_end)


def velocity_of(
    model: LatentDiffusion,
    weaker: LatentDiffusion | None,
    labels: jax.Array,
    *,
    guidance_channels: int = 0,
    **guidance,
) -> Velocity:
    """Return the velocity that a sampler follows; without guidance it calls one model only.

    Args:
      weaker: model to guide away from; None: the model itself, without a class.
      labels: [B], int32.
      guidance_channels: as `guided`.
      guidance: as `excess_of`.
    """

    def conditional(x, t):
        return model.velocity(x, t, labels)

    def both(x, t):
        if weaker is not None:
            return conditional(x, t), weaker.velocity(x, t, labels)
        twice = jnp.concatenate([labels, jnp.full_like(labels, model.dit.num_classes)])
        return jnp.split(model.velocity(jnp.concatenate([x, x]), t, twice), 2)

    excess = excess_of(**guidance)
    return guided(conditional, both, excess, channels=guidance_channels) if excess else conditional


def calls_of(guidance: Mapping[str, Any]) -> Callable:
    """Return times -> the network calls that `velocity_of` with this guidance makes there."""
    excess = excess_of(**{k: v for k, v in guidance.items() if k != "guidance_channels"})
    return calls_at(excess) if excess else jnp.ones_like


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
    """Make a stochastic sampler on ``steps`` points; the last is where the last step begins.

    The grid ends at 1 - last_step_size before it is shifted, and the last step leads from where it
    really ends to 1; with "reference" it stops short of 1, as the released sampler does.
    """
    grid = flow.time_grid(steps, start=start, end=1 - last_step_size, shift=time_shift)
    times = samplers.times_of(method, grid)
    if last_step == "reference":
        times = np.append(times, np.float32(1 - last_step_size))
    elif last_step != "none":
        times = np.append(times, grid[-1])
    calls = jnp.sum(calls_of(guidance)(times)).astype(jnp.int32)

    def sample(model, weaker, x, labels, keys):
        x_end = samplers.sde(
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
        return samplers.Solution(x_end, calls)

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
    """Make a deterministic sampler on ``steps`` points, or with adaptive steps ("dopri5").

    It ends at ``end``, from which the grid is shifted, or earlier where the model ends.
    """
    network_calls, last = calls_of(guidance), end

    def sample(model, weaker, x, labels, keys):
        del keys
        velocity, (start, end) = velocity_of(model, weaker, labels, **guidance), model.time_range
        end = min(end, last)
        if method == "dopri5":
            return samplers.dopri5(
                velocity, x, start, end, rtol=rtol, atol=atol, calls_at=network_calls
            )
        grid = flow.time_grid(steps, shift=time_shift, start=start, end=end)
        calls = jnp.sum(network_calls(samplers.times_of(method, grid))).astype(jnp.int32)
        if model.geometry == "sphere":
            x_end = samplers.euler(velocity, x, grid, move=sphere.exponential)
            return samplers.Solution(x_end, calls)
        return samplers.Solution(samplers.SOLVERS[method](velocity, x, grid), calls)

    return sample


MAKERS: dict[str, Callable] = {"sde": sde_sampler, "ode": ode_sampler}


def make_draw(networks: Networks, sampler: Callable) -> Callable:
    """Return (arrays, key, ids, labels) -> (uint8 images, network calls per image), to be jitted.

    Args:
      networks: that sample; ``arrays`` are theirs, in their order.
      sampler: of `MAKERS`.
    """

    def draw(arrays, key, ids, labels):
        model, decoder, weaker = (
            loaded and loaded[0](*decoder_keys)
            for loaded, decoder_keys in zip(networks, arrays, strict=True)
        )
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
        noise = samplers.noise_for(keys, decoder.latent_shape)
        solution = sampler(model, weaker, model.prior(noise), labels, keys)
        # the decoder's noise must differ from the sampler's
        decoder_keys = jax.vmap(lambda k: jax.random.fold_in(k, DECODER))(keys)
        return to_uint8(decoder.decode(model.denormalize(solution.x), decoder_keys)), solution.calls

    return draw
