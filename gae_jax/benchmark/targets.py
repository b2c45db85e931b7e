"""What a plan is made for: devices that need not be there, their chip, and a mesh of them."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from gae_jax.benchmark.chips import CHIPS, Chip, chip_of
from gae_jax.config import bind
from gae_jax.runtime import mesh as parallel
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.machines import MACHINES, Machine

TPUS = ("v4", "v5e", "v5p", "v6e")
NO_MESH = {"data": -1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Target:
    """Attributes:
    name: as asked for.
    compiler: "tpu", or "cpu" where CPU devices stand in for others; else this machine's.
    chip: None where no rates are known.
    """

    name: str
    mesh: Mesh
    compiler: str
    chip: Chip | None
    machine: Machine | None = None

    @property
    def here(self) -> bool:
        """Whether the devices are this machine's own."""
        return not self.name


def target_of(topology: str, mesh) -> Target:
    """Devices and mesh of a topology.

    Args:
      topology: a name in `MACHINES`, or CHIP:SHAPE, such as "v5p:4x4x4", "h100:8" or "cpu:8";
        empty: the devices of this machine, which are started only then.
      mesh: the section ``mesh``; one that says nothing gives way to that of the preset.

    Raises:
      ConfigError: for an unknown name, a shape that there is not, a mesh that does not fit, or if
        what compiles for TPUs is not installed.
    """
    if not topology:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # nothing is computed
        devices = jax.devices()
        made = parallel.make_mesh(**bind(parallel.make_mesh, mesh, "mesh"), devices=devices)
        return Target("", made, devices[0].platform, chip_of(devices[0].device_kind))
    preset = MACHINES.get(topology)
    chip, shape, count = _read(preset.topology if preset else topology)
    sizes = {name: mesh[name] for name in mesh}
    if preset and all(sizes[name] == size for name, size in NO_MESH.items()):
        sizes |= {"preset": topology}
    # an accelerator that is there is left alone; after a backend has started this does nothing
    jax.config.update("jax_platforms", "cpu")
    if chip in TPUS:
        devices, compiler = _tpu_devices(f"{chip}:{shape}", preset.slices if preset else 1), "tpu"
    else:
        devices, compiler = _cpu_devices(count), "cpu"
    made = parallel.make_mesh(**bind(parallel.make_mesh, sizes, "mesh"), devices=devices)
    return Target(topology, made, compiler, CHIPS.get(chip), preset)


def _read(topology: str) -> tuple[str, str, int]:
    """(chip, shape, number of devices) of "v5e:4x4"."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not found or found[1] not in (*CHIPS, "cpu"):
        raise ConfigError(
            f"plan.topology is {topology!r}; use a machine ({', '.join(MACHINES)}) or CHIP:SHAPE "
            f"with one of {', '.join(CHIPS)} or cpu, such as v5p:4x4x4 or h100:8"
        )
    count = math.prod(int(size) for size in found[2].split("x"))
    if not count:
        raise ConfigError(f"plan.topology is {topology!r}, which has no devices")
    return found[1], found[2], count


def _tpu_devices(topology: str, slices: int) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"compiling for {topology} needs libtpu, which is not installed; no TPU is needed: "
            f'pip install "jax[tpu]=={jax.__version__}"'
        )
    # no TPU is used: others may be, or plan, at the same time
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # it would ask the cloud which machine this is
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.partition(":")[0] + "-8")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **more).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"plan.topology is {topology!r}, which libtpu does not take: {text}"
        ) from None


def _cpu_devices(count: int) -> list:
    with contextlib.suppress(RuntimeError):  # a backend has started: those there must do
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"{count} devices are asked for, but JAX has started with {len(devices)} CPU devices; "
            "plan in a process of its own"
        )
    return devices[:count]
