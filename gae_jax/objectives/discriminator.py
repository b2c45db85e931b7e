"""Discriminators by name: the network that learns, and its view of an image."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from gae_jax.nn.network import Network
from gae_jax.objectives.diff_augment import augment
from gae_jax.objectives.dino_discriminator import DinoDisc, DinoFeatures
from gae_jax.objectives.patchgan import PatchGAN

# (images [B, S, S, 3] in [-1, 1], key) -> what the discriminator is called with.
View = Callable[[jax.Array, jax.Array], Any]
_PATCH = ("ndf", "n_layers", "stat_groups")  # arguments of `PatchGAN`
_HEADS = ("embed_dim", "key_depths", "ks", "norm_eps")  # arguments of `DinoDisc`


def module_of(section: Mapping) -> tuple[type, dict]:
    """Return the class that learns, and its arguments, of ``tokenizer.discriminator``."""
    if section["name"] == "patch":
        return PatchGAN, {name: section[name] for name in _PATCH}
    return DinoDisc, {name: section["dino"][name] for name in _HEADS}


def discriminator_network(section: Mapping, dtype: str) -> Network:
    """Return the network of `module_of` a section."""
    make, sizes = module_of(section)
    return Network(lambda rngs: make(**sizes, dtype=dtype, rngs=rngs))


def looks_through_dino(config) -> bool:
    """Return whether the discriminator of a section ``tokenizer`` sees a DINO's features."""
    return config.losses.gan > 0 and config.discriminator.name == "dino"


def dino_network(section: Mapping) -> Network:
    """Return the frozen DINO of a section ``tokenizer.discriminator``."""
    sizes = {key: value for key, value in section["dino"].items() if key not in ("weights", "ks")}
    return Network(lambda rngs: DinoFeatures(**sizes, rngs=rngs))


def view(section: Mapping, dino: DinoFeatures | None) -> View:
    """Return the view of a discriminator: augmented images, or DINO's features of those."""

    def look(images: jax.Array, key: jax.Array):
        images = augment(images, key, section["augment"])
        return images if dino is None else dino.maps(images)

    return look
