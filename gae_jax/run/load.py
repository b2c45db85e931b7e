"""Networks of finished stages, built from nothing but the stage's folder.

`load` gives the network and its (parameters, rest), laid out on the mesh by the rules.
"""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gae_jax import tokenizers
from gae_jax.config import backbone_shape
from gae_jax.generators.latent_diffusion import LatentDiffusion
from gae_jax.nn.quantized import PRODUCTS, fp8_obstacle, with_fp8_products
from gae_jax.objectives.dino_discriminator import DinoFeatures
from gae_jax.pretrained.backbone import ViTClassifier, frozen_backbone
from gae_jax.pretrained.efficientnet import EfficientNetLite0
from gae_jax.pretrained.inception import FIDInception
from gae_jax.pretrained.lpips import LPIPS
from gae_jax.run.run import StageFolder
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.mesh import path_of, place, shard
from gae_jax.tokenizers.gae_networks import PatchEmbed
from gae_jax.tokenizers.gae_teacher import SemanticTeacher, SVDTeacher
from gae_jax.tokenizers.pae_prior import PriorTeacher
from gae_jax.train.checkpoint import load_weights
from gae_jax.train.state import Network, Params, variables_of

# What a section ``compute`` says of a network, not of its step.
COMPUTED = ("dtype", "remat", "attention", "kernels")
Loaded = tuple[Network, tuple[dict, dict]]


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


def backbone_network(backbone, num_classes: int | None = None, **compute) -> Network:
    """Of a backbone section; the classifier that stands in for DINOv2 needs ``num_classes``.

    ``compute``: its dtype and attention.
    """
    kind = backbone["name"]
    if kind == "vit":
        more = dict(num_classes=num_classes, **compute)
        return Network(lambda rngs: ViTClassifier(**backbone["vit"], **more, rngs=rngs))
    return Network(lambda rngs: frozen_backbone(kind, backbone[kind], **compute, rngs=rngs))


def teacher_sizes(model, backbone) -> dict:
    """All arguments of `SemanticTeacher` on top of the backbone of a section."""
    grid, width = backbone_shape(backbone)
    return dict(**model, feature_dim=width, num_patches=grid**2)


def teacher_network(model, backbone, kind: str = "learned", **compute) -> Network:
    """``kind``: "learned"; "svd", which has no argument of its own but ``latent_dim``; "prior".

    ``compute``: the fields `COMPUTED` of one that learned; the others have none.
    """
    sizes = teacher_sizes(model, backbone)
    if kind == "prior":
        others = ("downsampler", "window_size")
        sizes = {key: value for key, value in sizes.items() if key not in others}
        return Network(lambda rngs: PriorTeacher(**sizes, rngs=rngs))
    if kind == "svd":
        sizes = {key: sizes[key] for key in ("feature_dim", "latent_dim", "num_patches")}
        return Network(lambda rngs: SVDTeacher(**sizes, rngs=rngs))
    return Network(lambda rngs: SemanticTeacher(**sizes, **compute, rngs=rngs))


def tokenizer_network(config, **compute) -> Network:
    """Of a config, or of what the tokenizer's folder records of it.

    ``compute``: the fields `COMPUTED`, which a training has and what is trained has not.
    """
    return Network(tokenizers.builder(config, **compute))


def frozen_compute(dtype: str, attention: str = "auto") -> dict[str, str]:
    """``compute`` of a network that is only called: the fastest way in this dtype."""
    return dict(dtype=dtype, attention=attention, kernels="auto")


def diffusion_network(section, latent_shape, *, mean=None, std=None, **compute) -> Network:
    """Of the section ``diffusion``, of this version's or an older run's config.

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


def multiplying(network: Network, products: str) -> Network:
    """A frozen network with Linear layers that multiply numbers as ``products`` says.

    Args:
      products: of `PRODUCTS`.

    Raises:
      ConfigError: where "fp8" cannot be had.
    """
    if products == "same":
        return network
    if obstacle := fp8_obstacle():
        raise ConfigError(f"products are {products!r}, but {obstacle}: use {PRODUCTS[0]!r}")
    try:
        return network.changed(with_fp8_products)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def rounding(network: Network, changed: Network, mesh: Mesh) -> Callable[[tuple], tuple]:
    """Of a network's arrays -> those of what `multiplying` made of it, on the mesh."""
    if changed is network:
        return lambda arrays: arrays

    def convert(arrays):
        return variables_of(with_fp8_products(network(*arrays)))

    return jax.jit(convert, out_shardings=shard(changed.abstract, mesh))


def with_products(loaded: Loaded, products: str, mesh: Mesh) -> Loaded:
    """As `multiplying`, with the arrays, on the mesh; raises as it does."""
    network = multiplying(loaded[0], products)
    return network, rounding(loaded[0], network, mesh)(loaded[1])


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

    ``more`` are arguments of the network that do not change what it is, such as ``precision`` or
    those of `frozen_compute`.
    """
    return load_stage(folder, mesh, folder.require_done(), **more)
