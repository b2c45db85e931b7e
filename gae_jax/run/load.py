"""Networks of finished stages, built from nothing but the stage's folder.

`load` gives the network and its (parameters, rest), laid out on the mesh by the rules.
"""

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.nn.network import Loaded, Network, Params
from gae_jax.nn.quantized import loaded_with_matmuls
from gae_jax.nn.vit import PatchEmbed
from gae_jax.objectives.dino_discriminator import DinoFeatures
from gae_jax.pretrained.backbone import backbone_network
from gae_jax.pretrained.efficientnet import EfficientNetLite0
from gae_jax.pretrained.inception import FIDInception
from gae_jax.pretrained.lpips import LPIPS
from gae_jax.run.run import StageFolder
from gae_jax.runtime.sharding import path_of, place
from gae_jax.tokenizers import tokenizer_network
from gae_jax.tokenizers.gae_teacher import teacher_network
from gae_jax.train.checkpoint import load_weights

# Layers that cast their matrix to their own dtype in every call, and those matrices' names.
CASTING, MATRICES = (nnx.Linear, nnx.Embed, PatchEmbed), ("kernel", "embedding")

METRIC_NETWORKS = {
    "lpips": LPIPS,
    "inception": FIDInception,
    "efficientnet": EfficientNetLite0,
    "dino": DinoFeatures,
}


def metric_network(name: str, **more) -> Network:
    """``more``: as of `load`."""
    return Network(lambda rngs: METRIC_NETWORKS[name](**more, rngs=rngs))


def network_of(folder: StageFolder, done: dict, **more) -> Network:
    """The network of a stage; ``done`` is what its folder records, or will record."""
    config = folder.config
    if folder.name in METRIC_NETWORKS:
        return metric_network(folder.name, **more)
    if folder.name == "backbone":
        return backbone_network(config.backbone, done.get("num_classes"), **more)
    if folder.name == "teacher":
        kind = config.teacher.get("kind", "learned")  # absent in runs of older versions
        return teacher_network(config.teacher.model, config.backbone, kind, **more)
    if folder.name == "tokenizer":
        return tokenizer_network(config, **more)
    # the statistics come back with the weights; only their shape is needed to build
    shape = done["latent_shape"]
    of = shape if done.get("statistics") == "element" else shape[-1:]
    return diffusion_network(config.diffusion, shape, mean=np.zeros(of), std=np.ones(of), **more)


def as_computed(network: Network, params: Params) -> Params:
    """Parameters of a network that is only called: matrices in the dtypes of their layers.

    What it gives is the same, but no call has to cast them: of LightningDiT-XL that moves 4 GB.
    """
    layers = {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(network(*network.abstract))
        if isinstance(layer, CASTING) and layer.dtype is not None
    }

    def cast(key_path, leaf):
        path, _, name = path_of(key_path).rpartition("/")
        if name not in MATRICES or path not in layers:
            return leaf
        return leaf.astype(layers[path].dtype, copy=False)

    return jax.tree_util.tree_map_with_path(cast, params)


def load_stage(folder: StageFolder, mesh: Mesh, done: dict, **more) -> Loaded:
    """As `load`, of a stage that will record ``done``."""
    params, rest = load_weights(folder.path, done["weights"], folder.name, done.get("step"))
    network = network_of(folder, done, **more)
    return network, place((as_computed(network, params), rest), mesh)


def load(folder: StageFolder, mesh: Mesh, **more) -> Loaded:
    """The network of a finished stage: of the pipeline, or one of `METRIC_NETWORKS`.

    ``more`` are arguments of the network that do not change what it is, such as its
    `precision.settings`.
    """
    return load_stage(folder, mesh, folder.require_done(), **more)


def load_for_inference(folder: StageFolder, mesh: Mesh, *, matmuls: str, **more) -> Loaded:
    """Load a network as `load`, with the matmuls of `with_matmuls`, and raise as these do."""
    return loaded_with_matmuls(load(folder, mesh, **more), matmuls, mesh)
