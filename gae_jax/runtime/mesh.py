"""Device meshes, and how batches get onto them and results back.

The mesh has the axes data, fsdp and tensor; a single device is a mesh of one. Arrays are global
over all processes: each process contributes its rows of a batch (`put_rows`) or has all of them
(`put_batch`), and `to_host` gives every process the complete result. How a training state is
sharded is told in `sharding`.
"""

import contextlib
import contextvars
import functools
import logging
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax.runtime.errors import ConfigError, number_of
from gae_jax.runtime.machines import AXES, machine, mesh_of

BATCH = P(("data", "fsdp"))

# Compiler options. By default XLA multiplies a gathered array piece by piece while the pieces
# travel around the torus (v5e and v6e): of 1152 channels over 16 devices 72 at a time, and reads
# and writes the partial sum in bf16 each time. See docs/performance_tpu.md.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}


@functools.cache
def tpu_options(backend: str) -> dict[str, int]:
    """Return `TPU_OPTIONS`, or {} if the compiler of this machine's TPUs does not know them."""
    if backend == "tpu":  # elsewhere TPU programs are compiled ahead of time only
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
    """Make a mesh of the given shape; one axis may be -1 and takes the remaining devices.

    Args:
      slices: groups of devices with a slow network between them (TPU slices joined over the data
        centre's network, or hosts with GPUs): the axis data is split over the groups first, so
        that fsdp and tensor stay inside a group. 0: as many as the devices report; on devices that
        report no slices, a group is one or several processes.
      preset: a machine of `machines.MACHINES`, which provides the shape.

    Raises:
      ConfigError: if the shape does not use all devices or does not divide over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if preset:
        shape_of_preset = tuple(mesh_of(preset).values())
        if (data, fsdp, tensor) not in ((-1, 1, 1), shape_of_preset):
            raise ConfigError(
                f"mesh.preset is {preset!r}, but mesh.data, fsdp or tensor is set too; give one of "
                "the two"
            )
        data, fsdp, tensor = shape_of_preset
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
    """Group devices evenly: by the slice that they report, else by process."""
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


def put_whole(tree, shardings):
    """Make global arrays of host arrays that every process has in full."""

    def put(x, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def check_batch(batch_size: int, mesh: Mesh, what: str) -> None:
    """Raise ConfigError unless a global batch divides over the devices that share it."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ConfigError(
            f"{what} {batch_size} does not divide over {number_of(ways, 'device')} (mesh.data x "
            f"mesh.fsdp); use a multiple of {ways}"
        )


def batch_of(size: int, count: int, mesh: Mesh) -> int:
    """Return a batch size that divides over the mesh: min(size, count), rounded up."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-min(size, count) // ways) * ways


def put_batch(batch, mesh: Mesh):
    """Put a numpy batch, which every process has in full, on the mesh, split over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    return put_whole(batch, jax.tree.map(lambda x: sharding, batch))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return which rows of a global batch the devices of this process hold, ascending."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    spans = {index[0].indices(batch_size)[:2] for index in indices.values() if index is not None}
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def put_rows(batch, mesh: Mesh, batch_size: int):
    """Put a batch on the mesh as `put_batch` does, from the `local_rows` of each process."""
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
    """Fetch this process's rows, ascending, of a global array that is split like a batch."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate(jax.device_get([parts[start] for start in sorted(parts)]))


def to_host(tree):
    """Fetch complete global arrays as numpy on every process; all processes must call it."""

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
    """Make `constrain` effective in whatever is traced inside."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def jit_on(mesh: Mesh, **options) -> Callable[[Callable], Callable]:
    """Return `jax.jit` with these options; `constrain` takes effect in the jitted function.

    Use it for whatever runs a network on a mesh. Where parameters are split over ``fsdp``, the
    compiler would otherwise replicate activations and send hundreds of times as many bytes.
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
    """Constrain activations [B, ...] to be split over their rows as batches are, and only there.

    Otherwise the compiler may shard them like the parameters that they are multiplied with, so that
    every device computes every row. Outside of `constrained` nothing happens.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def platform() -> str:
    """Return the platform that `jit_on` traces for, present here or not; "" outside of it."""
    mesh = _mesh.get()
    return "" if mesh is None else mesh.devices.flat[0].platform


def splits_channels() -> bool:
    """Whether the mesh that `jit_on` traces for splits channels, which `by_rows` would gather."""
    mesh = _mesh.get()
    return mesh is not None and mesh.shape["tensor"] > 1


def by_rows(function: Callable, split: list[bool]) -> Callable:
    """Let every device compute a function of arrays [B, ...] on its own rows.

    For kernels, which the compiler cannot partition by itself: it would replicate their inputs.

    Args:
      split: for each argument, whether its leading axis is the batch; the others are replicated.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return function
    specs = tuple(BATCH if rows else P() for rows in split)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)
