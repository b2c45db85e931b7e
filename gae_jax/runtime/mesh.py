"""Device meshes and where every array of a run lies on them.

The mesh has the axes data, fsdp and tensor; one device is a mesh of one. Modules carry no
annotations: `RULES` maps the path of each leaf of the training state to its axes, for
parameters, optimizer moments and EMA alike, and a leaf that no rule names is an error.

Arrays are global, over all processes: a batch comes from all of them (`put_rows`) or is known to
each (`put_batch`), and `to_host` gives every process the whole of a result.
"""

import contextlib
import contextvars
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax.runtime.errors import ConfigError, number_of
from gae_jax.runtime.machines import machine, mesh_of

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# First match wins. Kernels are (in, out), convolutions (height, width, in, out).
RULES: tuple[tuple[str, P], ...] = (
    (r"attn/qkv/kernel$", P("fsdp", "tensor")),
    # low-rank updates: split as the kernel of their layer is, and whole along the rank
    (r"(attn/proj|mlp/(fc2|w3))/lora/lora_a$", P("tensor", None)),
    (r"(attn/proj|mlp/(fc2|w3))/lora/lora_b$", P(None, "fsdp")),
    (r"lora/lora_a$", P("fsdp", None)),
    (r"lora/lora_b$", P(None, "tensor")),
    # which are (out, in)
    (r"(attn/qkv|mlp/(fc1|gate|w12))/quantized$", P("tensor", "fsdp")),
    (r"mlp/(fc2|w3)/quantized$", P("fsdp", "tensor")),
    (r"mlp/(fc1|gate|w12)/kernel$", P("fsdp", "tensor")),
    (r"(attn/proj|mlp/(fc2|w3))/kernel$", P("tensor", "fsdp")),
    (r"adaLN_modulation/linear/kernel$", P("fsdp", None)),  # outputs are split six ways
    (r"t_embedder/mlp/\d/kernel$", P("fsdp", None)),
    (r"(z_proj|recon_head)/kernel$", P(None, "fsdp")),
    # the modulator, the bottleneck and the decoder of PAE; of RAE the decoder
    (r"(cross_attn/[qkv]_proj|latent_(de)?compressor/\d/qkv)/kernel$", P("fsdp", "tensor")),
    (r"latent_(compressor/0|decompressor/1)/proj/kernel$", P("tensor", "fsdp")),
    (r"adapter/fc1/kernel$", P("fsdp", "tensor")),  # of AlignTok
    (r"adapter/fc2/kernel$", P("tensor", "fsdp")),
    (r"(fusion_proj|decoder_embed|decoder_pred)/kernel$", P("fsdp", None)),
    (r"latent_compressor/1/kernel$", P(None, None, "fsdp", None)),
    (r"latent_decompressor/0/kernel$", P(None, None, None, "fsdp")),
    # convolutional autoencoder and U-Net: their outputs; those of one pixel or of a row first,
    # before the rule of Linear layers that are called alike
    (r"/attn(_1|/\d+)/(q|k|v|proj_out)/kernel$", P(None, None, None, "fsdp")),
    (r"(put_blocks/\d+|middle_block)/1/(qkv|proj_out)/kernel$", P(None, None, "fsdp")),
    (
        r"(quant_conv|/conv(_in|_out|[12])|nin_shortcut|(down|up)sample/conv)/kernel$",
        P(None, None, None, "fsdp"),
    ),
    (r"put_blocks/\d+/\d(/op|/conv|)/kernel$", P(None, None, None, "fsdp")),
    (r"((in|out)_layers/\d|skip_connection|/out/2)/kernel$", P(None, None, None, "fsdp")),
    (r"(time_embed/\d|emb_layers/1)/kernel$", P("fsdp", None)),  # outputs are split in two
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
    (r"encoder/(qkv|skip)/kernel$", P("fsdp", "tensor")),  # of FAE
    (r"encoder/moments/kernel$", P("tensor", "fsdp")),
    (r"encoder/kernel$", P("fsdp", None)),
    (r"(cls_token|mask_token|register_tokens|gamma)$", P()),
    (r"(^|/)projection$", P()),  # of the SVD teacher
    # convolutional networks of the metrics are small and stay whole
    (r"((Conv2d|Mixed)_\w+(/\w+)?/conv|net/slice\d/\d+|lin\d/model/1)/kernel$", P()),
    (r"(stem|head|blocks/\d+/(expand|depthwise|project))/conv/kernel$", P()),  # EfficientNet's
    (r"(^|/)fc/kernel$", P()),
    (r"(bias|weight|running_mean|running_var|latent_mean|latent_std|step|count)$", P()),
)
# Below this many elements a leaf is kept whole on every device: sharding it costs more than it
# saves.
SMALL = 2**14


# Of the compiler. By itself it multiplies a gathered array piece by piece while the pieces go round
# (on tori of v5e and v6e): of 1152 channels over 16 devices 72 at a time, with the sum so far read
# and written each time in bf16. See docs/performance_tpu.md.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


@functools.cache
def tpu_options(backend: str) -> dict[str, int]:
    """`TPU_OPTIONS`, or none where the compiler of this machine's TPUs does not know them."""
    if backend == "tpu":  # else it is compiled ahead of time, for others
        try:
            jax.jit(jnp.negative, compiler_options=TPU_OPTIONS).lower(0.0).compile()
        except jax.errors.JaxRuntimeError as error:
            logging.warning("compiler options %s are left out: %s", TPU_OPTIONS, error)
            return {}
    return TPU_OPTIONS


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = 0,
    *,
    preset: str = "",
    devices=None,
) -> Mesh:
    """A mesh of the given shape; one of the axes may be -1 and takes the devices that are left.

    Args:
      slices: groups of devices between which the network is slow (TPU slices joined over the data
        centre's network, or machines with GPUs): the axis data is split over them first, so that
        fsdp and tensor stay inside a group. 0: as many as the devices say; on devices that do not
        know of slices, groups are made of whole processes.
      preset: a machine of `machines.MACHINES`, whose mesh this is where nothing else is given.

    Raises:
      ConfigError: if the shape does not use all devices or does not divide over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if preset:
        own = mesh_of(preset)
        if (data, fsdp, tensor) not in ((-1, 1, 1), tuple(own.values())):
            raise ConfigError(
                f"mesh.preset is {preset!r}, but mesh.data, fsdp or tensor is set too; give one of "
                "the two"
            )
        data, fsdp, tensor = own.values()
        slices = slices or machine(preset).slices
    shape = [data, fsdp, tensor]
    if shape.count(-1) == 1:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, (data, fsdp, tensor), strict=True))} does not fit "
            f"{number_of(len(devices), 'device')}; set mesh.data, mesh.fsdp and mesh.tensor so "
            "that their product is the number of devices (-1 takes what is left)"
        )
    groups = _slices(devices, slices)
    if shape[0] % len(groups):
        raise ConfigError(
            f"mesh.data is {shape[0]}, which does not divide over {len(groups)} slices; use a "
            "multiple, with mesh.fsdp and mesh.tensor inside a slice"
        )
    shape[0] //= len(groups)
    # the order within a group follows how its devices are wired
    parts = [
        mesh_utils.create_device_mesh(shape, group, allow_split_physical_axes=True)
        for group in groups
    ]
    # Auto: the default (Explicit) refuses ordinary code such as a merging reshape.
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * 3)


def _slices(devices: list, count: int) -> list[list]:
    """The devices in groups of one size: by the slice that they name, else by their process."""
    named = sorted({getattr(device, "slice_index", 0) or 0 for device in devices})
    count = count or len(named)
    if count == 1:
        return [devices]
    key = "slice_index" if len(named) > 1 else "process_index"
    keys = sorted({getattr(device, key) for device in devices})
    if count < 1 or len(keys) % count:
        raise ConfigError(
            f"mesh.slices is {count}, but there are {len(keys)} "
            f"{'slices' if len(named) > 1 else 'processes'} to make them of; use a divisor of "
            "that, or 0"
        )
    each = len(keys) // count
    return [
        [d for d in devices if getattr(d, key) in keys[first : first + each]]
        for first in range(0, len(keys), each)
    ]


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
    for size, axis in zip(shape, spec, strict=False):  # a spec may end before the shape
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
    """Host arrays, which every process has, on the devices, as the rules say."""
    return put_whole(tree, shard(tree, mesh))


def put_whole(tree, shardings):
    """Host arrays that every process has whole, as global arrays."""

    def put(x, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def unsharded(tree, mesh: Mesh) -> tuple[float, str, tuple[int, ...]]:
    """How much of a state lies whole on every device.

    Args:
      tree: arrays or ShapeDtypeStructs.

    Returns:
      (share of its bytes that no axis of the mesh divides, path of the largest leaf among them
      that is not small, its shape). (0, "", ()) on a mesh that shards no parameters.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return 0.0, "", ()
    total = whole = most = 0
    largest, shape = "", ()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += size
        axes = spec_of(path_of(path), leaf.shape, mesh)
        if all(axis is None or mesh.shape[axis] == 1 for axis in axes):
            whole += size
            if size > most and math.prod(leaf.shape) >= SMALL:
                most, largest, shape = size, path_of(path), leaf.shape
    return whole / max(total, 1), largest, shape


def check_batch(batch_size: int, mesh: Mesh, what: str) -> None:
    """Raises ConfigError unless a global batch divides over the devices that share it."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ConfigError(
            f"{what} {batch_size} does not divide over {number_of(ways, 'device')} (mesh.data x "
            f"mesh.fsdp); use a multiple of {ways}"
        )


def batch_of(size: int, count: int, mesh: Mesh) -> int:
    """The least batch for ``count`` items, at most about ``size``, that divides over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-min(size, count) // ways) * ways


def put_batch(batch, mesh: Mesh):
    """A batch (numpy) that every process has whole as global arrays, split over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    return put_whole(batch, jax.tree.map(lambda x: sharding, batch))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, ascending."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    spans = {index[0].indices(batch_size)[:2] for index in indices.values()}
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def put_rows(batch, mesh: Mesh, batch_size: int):
    """As `put_batch`, of this process's rows alone, as `local_rows` names them."""
    sharding, rows = NamedSharding(mesh, BATCH), local_rows(mesh, batch_size)
    if len(rows) == batch_size:
        return put_batch(batch, mesh)

    def put(x):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            at = np.searchsorted(rows, start)
            return x[at : at + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def local_part(x: jax.Array) -> np.ndarray:
    """The rows of a global array, split as a batch is, that this process holds, ascending."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate(jax.device_get([parts[start] for start in sorted(parts)]))


def to_host(tree):
    """Global arrays as numpy, whole, on every process; all of them call it."""

    def fetch(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    if all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)  # all at once
    return jax.tree.map(fetch, tree)


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def constrained(mesh: Mesh) -> Iterator[None]:
    """Within it, `constrain` in what is traced holds activations to the batch's split."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def jit_on(mesh: Mesh, **options) -> Callable[[Callable], Callable]:
    """`jax.jit`, with these options, of a function whose activations `constrain` holds.

    Whatever runs a network on a mesh wants it: where parameters are split over ``fsdp``, the
    compiler else gives every device every row, and sends hundreds of times as much.
    """
    if mesh.devices.flat[0].platform == "tpu":
        options = {"compiler_options": tpu_options(jax.default_backend()), **options}

    def wrap(function):
        @functools.wraps(function)
        def held(*arguments):
            with constrained(mesh):
                return function(*arguments)

        return jax.jit(held, **options)

    return wrap


def constrain(x: jax.Array) -> jax.Array:
    """Activations [B, ...], split over the batch as its rows are and over nothing else.

    Without it the compiler may split them as it splits the parameters that they meet, and give
    every device every row.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def platform() -> str:
    """Of the devices that `jit_on` traces for, which need not be there; "" outside it."""
    mesh = _mesh.get()
    return "" if mesh is None else mesh.devices.flat[0].platform


def splits_channels() -> bool:
    """Whether the mesh that `jit_on` traces for splits heads, which `by_rows` would join."""
    mesh = _mesh.get()
    return mesh is not None and mesh.shape["tensor"] > 1


def by_rows(function: Callable, split: list[bool]) -> Callable:
    """A function of arrays [B, ...] that every device computes on its own rows.

    For kernels, into which the compiler cannot look: it would give every device every row.

    Args:
      split: per argument, whether it has rows; what has none is whole on every device.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return function
    specs = tuple(BATCH if rows else P() for rows in split)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)
