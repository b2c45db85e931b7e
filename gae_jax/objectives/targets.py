"""Targets of the tokenizer's loss terms, computed by the run's frozen networks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gae_jax.nn import losses
from gae_jax.nn.network import Network
from gae_jax.objectives.discriminator import looks_through_dino, view
from gae_jax.objectives.objective import Targets
from gae_jax.tokenizers import aligns


def judges_of(config) -> tuple[str, ...]:
    """Return the finished stages whose networks the tokenizer's terms use in every step."""
    perceptual = compares_images(config)
    aligned, teacher = aligns(config)
    lpips = perceptual and config.perceptual.name == "lpips"
    backbone = aligned or (perceptual and config.perceptual.name == "backbone")
    dino = looks_through_dino(config) and config.discriminator.dino.weights == "dino"
    wanted = {"lpips": lpips, "backbone": backbone, "teacher": teacher, "dino": dino}
    return tuple(name for name, use in wanted.items() if use)


def compares_images(config) -> bool:
    """Return whether a term needs a perceptual distance."""
    return config.losses.perceptual > 0 or config.losses.continuity > 0


def _perceptual_parts(name: str, models: dict[str, Any]) -> tuple[Callable, Callable]:
    """Return (images -> their feature maps, two lists of feature maps -> mean distance)."""
    if name == "backbone":
        return lambda x: models["backbone"].features_and_maps(x)[1], losses.feature_distance
    lpips = models["lpips"]
    return lpips.features, lambda a, b: jnp.mean(lpips.compare(a, b))


def targets_by(config, networks: dict[str, Network]) -> Callable[..., Targets]:
    """Return (frozen arrays by name, images in [-1, 1], their batch) -> `Targets`.

    Args:
      config: the section ``tokenizer``.
      networks: those of lpips, backbone, teacher and dino that its terms ask for.
    """
    perceptual = config.perceptual.name if compares_images(config) else None
    aligned_with, by_teacher = aligns(config)

    def make(frozen, images: jax.Array, batch) -> Targets:
        del batch  # the networks see images alone
        models: dict[str, Any] = {
            name: network(*frozen[name]) for name, network in networks.items()
        }
        aligned = features = distance = apart = None
        if perceptual:
            maps_of, compare = _perceptual_parts(perceptual, models)
            if perceptual == "backbone":
                features, real = models["backbone"].features_and_maps(images)
            else:
                real = maps_of(images)

            def distance_from_real(x):
                return compare(maps_of(x), real)

            def distance_between(a, b):
                return compare(maps_of(a), maps_of(b))

            distance, apart = distance_from_real, distance_between
        if aligned_with:
            takes = models["teacher"].takes if by_teacher else {}
            if features is None or takes:
                features = models["backbone"].features(images, **takes)
            aligned = models["teacher"].downsample(features) if by_teacher else features
            aligned = jax.lax.stop_gradient(aligned).astype(jnp.float32)
        look = view(config.discriminator, models.get("dino"))
        return Targets(aligned=aligned, perceptual=distance, apart=apart, look=look)

    return make
