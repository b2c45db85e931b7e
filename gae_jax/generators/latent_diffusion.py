"""A diffusion model together with the statistics of the latents that it was trained on."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.generators import flow
from gae_jax.generators.ddt import DiTwDDTHead
from gae_jax.generators.dit import LightningDiT
from gae_jax.nn import sphere
from gae_jax.nn.layers import Buffer
from gae_jax.nn.network import Network

# The network that predicts: LightningDiT alone, or as the backbone of RAE's DiT-DH.
NETWORKS = ("lightningdit", "ddt")


class LatentDiffusion(nnx.Module):
    """LightningDiT or DiT-DH plus latent statistics, so that a checkpoint knows how to undo them.

    DiT-DH counts time from data to noise, and its velocity points to the noise; `output` turns
    both around, so that weights are those of the released module.

    Args:
      mean, std: per latent channel, [d], or per element, [h, w, d].
      name: of `NETWORKS`.
      head: with "ddt" the width, depth and heads of its head: ``hidden_size``, ``depth``,
        ``num_heads``.
      latent_multiplier: factor after normalisation.
      path, prediction: what the DiT's output means, names in `flow.PATHS` and `flow.PREDICTIONS`.
      geometry: "flat", or "sphere": the DiT sees latents as they are, without statistics, and its
        velocity is tangential (`sphere`).
      dit: arguments of `LightningDiT`; with "ddt" the three of the head's names are those of the
        backbone.

    Raises:
      ValueError: for an unknown name, or "ddt" without a head or with another prediction than the
        velocity.
    """

    def __init__(
        self,
        *,
        mean: np.ndarray,
        std: np.ndarray,
        latent_multiplier: float = 1.0,
        path: str = "linear",
        prediction: str = "velocity",
        geometry: str = "flat",
        name: str = "lightningdit",
        head: Mapping[str, int] | None = None,
        rngs: nnx.Rngs,
        **dit,
    ):
        if name not in NETWORKS:
            raise ValueError(f"name is {name!r}; use one of {', '.join(NETWORKS)}")
        if name == "ddt" and prediction != "velocity":
            raise ValueError(f"prediction is {prediction!r}, but 'ddt' predicts the velocity")
        self.from_data = name == "ddt"  # its time begins there
        self.dit: DiTwDDTHead | LightningDiT
        if name == "ddt":
            if head is None:
                raise ValueError("head is None, but 'ddt' needs the sizes of its head")
            sizes = ddt_sizes(dit, head)
            self.dit = DiTwDDTHead(rngs=rngs, **sizes)
        else:
            self.dit = LightningDiT(rngs=rngs, **dit)
        grid = dit["input_size"]
        self.latent_shape = (grid, grid, dit["in_channels"])
        self.latent_multiplier = latent_multiplier
        self.path, self.prediction = flow.PATHS[path], prediction
        self.geometry = geometry
        self.time_range = flow.time_range(path, prediction)
        self.latent_mean = Buffer(jnp.asarray(mean, jnp.float32))
        self.latent_std = Buffer(jnp.asarray(std, jnp.float32))

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Normalise the tokenizer's latents for the diffusion model."""
        if self.geometry == "sphere":
            return sphere.onto(latents)
        scaled = (latents - self.latent_mean[...]) / self.latent_std[...]
        return scaled * self.latent_multiplier

    def denormalize(self, x: jax.Array) -> jax.Array:
        """Invert `normalize`; in flat geometry latents are not projected back on the sphere."""
        if self.geometry == "sphere":
            return x
        return x / self.latent_multiplier * self.latent_std[...] + self.latent_mean[...]

    def prior(self, noise: jax.Array) -> jax.Array:
        """Turn normal noise [B, h, w, d] into the start of the flow."""
        return sphere.onto(noise) if self.geometry == "sphere" else noise

    def output(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """Predict from x [B, h, w, d] at times t [B], which begin at noise."""
        if self.from_data:
            return -self.dit(x, 1 - t, labels)
        return self.dit(x, t, labels)

    def velocity(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """Compute the velocity of x [B, h, w, d] at time t, one for all or [B]."""
        output = self.output(x, jnp.full(len(x), t), labels)
        if self.geometry == "sphere":
            return sphere.project(x, output)
        return flow.velocity_of(output, x, t, path=self.path, prediction=self.prediction)


def ddt_sizes(dit: Mapping, head: Mapping[str, int]) -> dict:
    """Return the arguments of `DiTwDDTHead` from those of its backbone, a `LightningDiT`."""
    both = {name: (dit[name], head[name]) for name in ("hidden_size", "depth", "num_heads")}
    rest = {name: value for name, value in dit.items() if name not in both}
    if (kernels := rest.pop("kernels", "xla")) not in ("xla", "auto"):
        raise ValueError(f"kernels is {kernels!r}, but 'ddt' has none; use 'auto' or 'xla'")
    if "use_abs_pos" in rest:
        rest["use_pos_embed"] = rest.pop("use_abs_pos")
    return rest | both


def diffusion_network(section, latent_shape, *, mean=None, std=None, **compute) -> Network:
    """Return the network of a section ``diffusion``.

    Args:
      latent_shape: (h, w, d).
      mean, std: of the latents, [d] or [h, w, d]; None: 0 and 1 for every channel.
      compute: as of `tokenizer_network`.
    """
    grid, _, channels = latent_shape
    flow = section.get("flow", {})
    of = {name: flow[name] for name in ("path", "prediction", "geometry") if name in flow}
    of |= {name: section[name] for name in ("name", "head") if name in section}
    return Network(
        lambda rngs: LatentDiffusion(
            **of,
            mean=np.zeros(channels) if mean is None else mean,
            std=np.ones(channels) if std is None else std,
            latent_multiplier=section["latent_multiplier"],
            input_size=grid,
            in_channels=channels,
            **section["model"],
            **compute,
            rngs=rngs,
        )
    )
