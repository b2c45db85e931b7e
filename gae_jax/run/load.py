"""Load the networks of finished stages; the folders of the stages are all that is needed."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gae_jax.generators.latent_diffusion import diffusion_network
from gae_jax.nn.network import Loaded, Network, Params
from gae_jax.nn.quantized import weight_quantizer, with_matmuls
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


def metric_network(name: str, **how) -> Network:
    """Build one of `METRIC_NETWORKS`; ``how``: as of `load`."""
    return Network(lambda rngs: METRIC_NETWORKS[name](**how, rngs=rngs))


def network_of(folder: StageFolder, done: dict, **how) -> Network:
    """Build the network of a stage that records ``done``, or will; ``how``: as of `load`."""
    config = folder.config
    if folder.name in METRIC_NETWORKS:
        return metric_network(folder.name, **how)
    if folder.name == "backbone":
        return backbone_network(config.backbone, done.get("num_classes"), **how)
    if folder.name == "teacher":
        kind = config.teacher.get("kind", "learned")  # absent in runs of older versions
        return teacher_network(config.teacher.model, config.backbone, kind, **how)
    if folder.name == "tokenizer":
        return tokenizer_network(config, **how)
    # the statistics are loaded with the weights; only their shape is needed here
    shape = done["latent_shape"]
    of = shape if done.get("statistics") == "element" else shape[-1:]
    return diffusion_network(config.diffusion, shape, mean=np.zeros(of), std=np.ones(of), **how)


def as_computed(network: Network, params: Params) -> Params:
    """Cast the matrices of an inference-only network to the dtypes of their layers.

    Outputs are the same, but no call has to cast them; for LightningDiT-XL that moves 4 GB.
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


def load_stage(
    folder: StageFolder, mesh: Mesh, done: dict, *, matmuls: str = "same", **how
) -> Loaded:
    """As `load`, of a stage that will record ``done``."""
    params, rest = load_weights(folder.path, done["weights"], folder.name, done.get("step"))
    network = network_of(folder, done, **how)
    arrays = place((as_computed(network, params), rest), mesh)
    changed = with_matmuls(network, matmuls)
    return changed, weight_quantizer(network, changed, mesh)(arrays)


def load(folder: StageFolder, mesh: Mesh, **how) -> Loaded:
    """Load the network of a finished stage, or one of `METRIC_NETWORKS`, on the mesh.

    Args:
      how: ``matmuls`` as of `nn.quantized.with_matmuls`, and arguments of the network that do not
        change what it is, such as its `precision.settings`.

    Returns:
      The network and its (parameters, rest), sharded by the rules; of trained weights the moving
      average, if the stage has one.

    Raises:
      UserError: if the stage is not finished.
      ConfigError: for matmuls that this device or network does not have.
    """
    return load_stage(folder, mesh, folder.require_done(), **how)


def load_many(session, *names: str, **how: Mapping[str, Any]) -> dict[str, Loaded]:
    """Load networks of a session's run on its mesh: name -> as `load`.

    Args:
      names: of stages or of `METRIC_NETWORKS`, loaded without further arguments.
      how: name -> further arguments of `load`.
    """
    how = {name: {} for name in names} | how
    return {name: load(session.run.stage(name), session.mesh, **how[name]) for name in how}
