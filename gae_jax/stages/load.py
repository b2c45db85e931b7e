"""Networks of finished stages, built from nothing but the stage's folder.

`load` gives the network and its (parameters, rest), laid out on the mesh by the rules.
"""

import numpy as np
from jax.sharding import Mesh

from gae_jax.config import backbone_shape
from gae_jax.models.backbone import VisionBackbone, ViTClassifier
from gae_jax.models.gae import GAE
from gae_jax.models.latent_diffusion import LatentDiffusion
from gae_jax.models.teacher import SemanticTeacher
from gae_jax.parallel import place
from gae_jax.run import StageFolder
from gae_jax.train.checkpoint import load_weights
from gae_jax.train.state import Network

Loaded = tuple[Network, tuple[dict, dict]]


def backbone_network(backbone, num_classes: int | None = None) -> Network:
    """Of a backbone section; the classifier that stands in for DINOv2 needs ``num_classes``."""
    kind = backbone["name"]
    if kind == "vit":
        more = dict(num_classes=num_classes)
        return Network(lambda rngs: ViTClassifier(**backbone["vit"], **more, rngs=rngs))
    return Network(lambda rngs: VisionBackbone(kind=kind, **backbone[kind], rngs=rngs))


def teacher_sizes(model, backbone) -> dict:
    """All arguments of `SemanticTeacher` on top of the backbone of a section."""
    grid, width = backbone_shape(backbone)
    return dict(**model, feature_dim=width, num_patches=grid**2)


def teacher_network(model, backbone) -> Network:
    return Network(lambda rngs: SemanticTeacher(**teacher_sizes(model, backbone), rngs=rngs))


def tokenizer_network(model) -> Network:
    return Network(lambda rngs: GAE(**model, rngs=rngs))


def diffusion_network(model, latent_shape, *, mean, std, latent_multiplier: float) -> Network:
    grid, _, channels = latent_shape
    return Network(
        lambda rngs: LatentDiffusion(
            mean=mean,
            std=std,
            latent_multiplier=latent_multiplier,
            input_size=grid,
            in_channels=channels,
            **model,
            rngs=rngs,
        )
    )


def network_of(folder: StageFolder, done: dict) -> Network:
    """The network of a stage; ``done`` is what its folder records, or will record."""
    config = folder.config
    if folder.name == "backbone":
        return backbone_network(config.backbone, done.get("num_classes"))
    if folder.name == "teacher":
        return teacher_network(config.teacher.model, config.backbone)
    if folder.name == "tokenizer":
        return tokenizer_network(config.tokenizer.model)
    # the statistics come back with the weights; only their shape is needed to build
    channels = done["latent_shape"][-1]
    return diffusion_network(
        config.diffusion.model,
        done["latent_shape"],
        mean=np.zeros(channels),
        std=np.ones(channels),
        latent_multiplier=config.diffusion.latent_multiplier,
    )


def load_stage(folder: StageFolder, mesh: Mesh, done: dict) -> Loaded:
    """As `load`, of a stage that will record ``done``."""
    weights = load_weights(folder.path, done["weights"], folder.name)
    return network_of(folder, done), place(weights, mesh)


def load(folder: StageFolder, mesh: Mesh) -> Loaded:
    """The network of a finished stage: backbone, teacher, tokenizer or diffusion."""
    return load_stage(folder, mesh, folder.require_done())
