"""How a training state is sharded: rules from the path of an array to axes of the mesh.

Modules carry no annotations. `RULES` holds for parameters, optimizer moments and EMA alike, and a
leaf that no rule matches is an error.
"""

import logging
import math
import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.mesh import put_whole
from gae_jax.runtime.sharding_rules import added_rules

# First match wins; rules that tokenizers add (`sharding_rules`) come first. Kernels are (in, out),
# convolutions (height, width, in, out).
RULES: tuple[tuple[str, P], ...] = (
    (r"attn/qkv/kernel$", P("fsdp", "tensor")),
    # low-rank updates: sharded like the kernel of their layer, never along the rank
    (r"(attn/proj|mlp/(fc2|w3))/lora/lora_a$", P("tensor", None)),
    (r"(attn/proj|mlp/(fc2|w3))/lora/lora_b$", P(None, "fsdp")),
    (r"lora/lora_a$", P("fsdp", None)),
    (r"lora/lora_b$", P(None, "tensor")),
    # fp8 kernels are (out, in)
    (r"(attn/qkv|mlp/(fc1|gate|w12))/quantized$", P("tensor", "fsdp")),
    (r"mlp/(fc2|w3)/quantized$", P("fsdp", "tensor")),
    (r"mlp/(fc1|gate|w12)/kernel$", P("fsdp", "tensor")),
    (r"(attn/proj|mlp/(fc2|w3))/kernel$", P("tensor", "fsdp")),
    (r"adaLN_modulation/linear/kernel$", P("fsdp", None)),  # outputs are split six ways
    (r"t_embedder/mlp/\d/kernel$", P("fsdp", None)),
    (r"(z_proj|recon_head)/kernel$", P(None, "fsdp")),
    (r"/scale$", P()),
    (r"(proj_out|adapter/model|linear_out|to_latent|linear|head)/kernel$", P("fsdp", None)),
    (r"embedding_table/embedding$", P(None, "fsdp")),  # the look-up stays local
    (r"patch_embed/kernel$", P(None, None, None, "fsdp")),
    (r"(x_embedder/proj|main/\d+)/kernel$", P(None, None, None, "fsdp")),
    (r"pos_embed(_pro|_dec)?$", P(None, None, "fsdp")),
    (r"s_embedder/proj/kernel$", P(None, None, None, "fsdp")),
    (r"s_projector/kernel$", P("fsdp", None)),
    (r"heads/\d+/(embed|mix|out)/(kernel|u|v)$", P()),  # of the DINO discriminator, small
    (r"t_embedder/W$", P()),
    (r"(cls_token|mask_token|register_tokens|gamma)$", P()),
    (r"(^|/)projection$", P()),  # of the SVD teacher
    # convolutional networks of the metrics are small: replicated
    (r"((Conv2d|Mixed)_\w+(/\w+)?/conv|net/slice\d/\d+|lin\d/model/1)/kernel$", P()),
    (r"(stem|head|blocks/\d+/(expand|depthwise|project))/conv/kernel$", P()),  # EfficientNet's
    (r"(^|/)fc/kernel$", P()),
    (r"(bias|weight|running_mean|running_var|latent_mean|latent_std|step|count)$", P()),
)
# Leaves of fewer elements are replicated: sharding them costs more than it saves.
SMALL = 2**14


def path_of(key_path) -> str:
    """A pytree path as ``params/tokenizer/blocks/0/attn/qkv/kernel``."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
    )


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the axes that split one leaf; an axis that does not divide its size is left out.

    Args:
      path: of the leaf, as `path_of` gives it.

    Raises:
      ConfigError: if no rule matches the path.
    """
    rules: tuple[tuple[str, P | tuple[str | None, ...]], ...] = (*added_rules(), *RULES)
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
    if spec is None:
        raise ConfigError(
            f"no sharding rule matches {path} {list(shape)}; add one to "
            "gae_jax.runtime.sharding.RULES"
        )
    if math.prod(shape) < SMALL:
        return P()
    axes = []
    for size, axis in zip(shape, spec, strict=False):  # a spec may end before the shape
        if axis is not None and size % mesh.shape[axis]:
            logging.info("%s: %d does not divide over %s; replicated", path, size, axis)
            axis = None
        axes.append(axis)
    return P(*axes)


def shard(tree, mesh: Mesh):
    """Return the NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_of(path), leaf.shape, mesh)),
        tree,
    )


def place(tree, mesh: Mesh):
    """Put host arrays, which every process has, on the devices, sharded by the rules."""
    return put_whole(tree, shard(tree, mesh))


def unsharded(tree, mesh: Mesh) -> tuple[float, str, tuple[int, ...]]:
    """Measure how much of a state is replicated on every device.

    Args:
      tree: arrays or ShapeDtypeStructs.

    Returns:
      (share of its bytes that no axis of the mesh divides, path of the largest leaf of at least
      `SMALL` elements among them, its shape). (0, "", ()) on a mesh that shards no parameters.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return 0.0, "", ()
    total = replicated = most = 0
    largest, shape = "", ()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += size
        axes = spec_of(path_of(path), leaf.shape, mesh)
        if all(axis is None or mesh.shape[axis] == 1 for axis in axes):
            replicated += size
            if size > most and math.prod(leaf.shape) >= SMALL:
                most, largest, shape = size, path_of(path), leaf.shape
    return replicated / max(total, 1), largest, shape
