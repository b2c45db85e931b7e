"""Device meshes and where every array of a run lies on them.

The mesh has the axes data, fsdp and tensor; one device is a mesh of one. Modules carry no
annotations: `RULES` maps the path of each leaf of the training state to its axes, for
parameters, optimizer moments and EMA alike, and a leaf that no rule names is an error.
"""

import logging
import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# First match wins. Kernels are (in, out), convolutions (height, width, in, out).
RULES: tuple[tuple[str, P], ...] = (
    (r"attn/qkv/kernel$", P("fsdp", "tensor")),
    (r"mlp/(fc1|gate|w12)/kernel$", P("fsdp", "tensor")),
    (r"(attn/proj|mlp/(fc2|w3))/kernel$", P("tensor", "fsdp")),
    (r"adaLN_modulation/linear/kernel$", P("fsdp", None)),  # outputs are split six ways
    (r"t_embedder/mlp/\d/kernel$", P("fsdp", None)),
    (r"(z_proj|recon_head)/kernel$", P(None, "fsdp")),
    (r"(proj_out|adapter/model|linear_out|to_latent|linear|head)/kernel$", P("fsdp", None)),
    (r"embedding_table/embedding$", P(None, "fsdp")),  # the look-up stays local
    (r"patch_embed/kernel$", P(None, None, None, "fsdp")),
    (r"(x_embedder/proj|main/\d+)/kernel$", P(None, None, None, "fsdp")),
    (r"pos_embed(_pro|_dec)?$", P(None, None, "fsdp")),
    (r"(cls_token|mask_token|register_tokens|gamma)$", P()),
    (r"(^|/)projection$", P()),  # of the SVD teacher
    # convolutional networks of the metrics are small and stay whole
    (r"((Conv2d|Mixed)_\w+(/\w+)?/conv|net/slice\d/\d+|lin\d/model/1)/kernel$", P()),
    (r"(^|/)fc/kernel$", P()),
    (r"(bias|weight|running_mean|running_var|latent_mean|latent_std|step|count)$", P()),
)
# Below this many elements a leaf is kept whole on every device: sharding it costs more than it
# saves.
SMALL = 2**14


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """A mesh of the given shape; one axis may be -1 and takes the devices that are left.

    Raises:
      ConfigError: if the shape does not use all devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    if shape.count(-1) == 1:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, (data, fsdp, tensor), strict=True))} does not fit "
            f"{len(devices)} devices; set mesh.data, mesh.fsdp and mesh.tensor so that their "
            "product is the number of devices (-1 takes what is left)"
        )
    # Auto: the default (Explicit) refuses ordinary code such as a merging reshape.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def path_of(key_path) -> str:
    """A pytree path as ``params/tokenizer/blocks/0/attn/qkv/kernel``."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
    )


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> P:
    """The axes of one leaf.

    Raises:
      ConfigError: if no rule matches the path.
    """
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
    if spec is None:
        raise ConfigError(
            f"no sharding rule matches {path} {list(shape)}; add one to parallel.RULES"
        )
    if math.prod(shape) < SMALL:
        return P()
    axes = []
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            logging.info("%s: %d does not divide over %s; kept whole", path, size, axis)
            axis = None
        axes.append(axis)
    return P(*axes)


def shard(tree, mesh: Mesh, rules=RULES):
    """The NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_of(path), leaf.shape, mesh, rules)),
        tree,
    )


def place(tree, mesh: Mesh):
    """Host arrays on the devices, as the rules say."""
    return jax.device_put(tree, shard(tree, mesh))


def check_batch(batch_size: int, mesh: Mesh, what: str) -> None:
    """Raises ConfigError unless a global batch divides over the devices that share it."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ConfigError(
            f"{what} {batch_size} does not divide over {ways} devices (mesh.data x mesh.fsdp); "
            f"use a multiple of {ways}"
        )


def put_batch(batch, mesh: Mesh):
    """This process's rows of a batch (numpy) as global arrays, split over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )
