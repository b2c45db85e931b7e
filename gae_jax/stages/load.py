"""Networks of finished stages, built from nothing but the stage's folder.

Each `load_*` gives the network and its (parameters, rest), laid out on the mesh by the rules.
"""

import numpy as np
from jax.sharding import Mesh

from gae_jax.models.backbone import ViTClassifier
from gae_jax.models.gae import GAE
from gae_jax.models.latent_diffusion import LatentDiffusion
from gae_jax.models.teacher import SemanticTeacher
from gae_jax.parallel import place
from gae_jax.run import StageFolder
from gae_jax.train.checkpoint import load_weights
from gae_jax.train.state import Network

Loaded = tuple[Network, tuple[dict, dict]]


def backbone_network(model, num_classes: int) -> Network:
    return Network(lambda rngs: ViTClassifier(**model, num_classes=num_classes, rngs=rngs))


def teacher_network(model, backbone_model) -> Network:
    """The teacher on top of a backbone of this config."""
    patches = (backbone_model["image_size"] // backbone_model["patch_size"]) ** 2
    sizes = dict(feature_dim=backbone_model["embed_dim"], num_patches=patches)
    return Network(lambda rngs: SemanticTeacher(**model, **sizes, rngs=rngs))


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


def load_backbone(folder: StageFolder, mesh: Mesh) -> Loaded:
    done = folder.require_done()
    network = backbone_network(folder.config.backbone.model, done["num_classes"])
    return network, place(load_weights(folder.path, done["weights"], "backbone"), mesh)


def load_teacher(folder: StageFolder, mesh: Mesh) -> Loaded:
    done, config = folder.require_done(), folder.config
    network = teacher_network(config.teacher.model, config.backbone.model)
    return network, place(load_weights(folder.path, done["weights"], "teacher"), mesh)


def load_tokenizer(folder: StageFolder, mesh: Mesh) -> Loaded:
    done = folder.require_done()
    network = tokenizer_network(folder.config.tokenizer.model)
    return network, place(load_weights(folder.path, done["weights"], "tokenizer"), mesh)


def load_diffusion(folder: StageFolder, mesh: Mesh) -> Loaded:
    """The statistics come back with the weights; only their shape is needed to build."""
    done, config = folder.require_done(), folder.config
    channels = done["latent_shape"][-1]
    network = diffusion_network(
        config.diffusion.model,
        done["latent_shape"],
        mean=np.zeros(channels),
        std=np.ones(channels),
        latent_multiplier=config.diffusion.latent_multiplier,
    )
    return network, place(load_weights(folder.path, done["weights"], "diffusion"), mesh)
