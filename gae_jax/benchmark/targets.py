"""Target of a plan: a topology (no hardware needed), its chip, and a mesh of its devices."""

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
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.machines import MACHINES, Machine
from gae_jax.runtime.mesh import make_mesh

TPUS = ("v4", "v5e", "v5p", "v6e")
NO_MESH = {"data": -1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: of the topology; "": the devices of this machine.
      compiler: "tpu", or "cpu" if CPU devices stand in for others; else this machine's platform.
      chip: None if no rates are known.
      machine: the preset, if the topology is one.
    """

    name: str
    mesh: Mesh
    compiler: str
    chip: Chip | None
    machine: Machine | None = None

    @property
    def here(self) -> bool:
        """Whether the devices are those of this machine."""
        return not self.name


def target_of(topology: str, mesh) -> Target:
    """Make the devices and the mesh of a topology.

    Args:
      topology: a name in `MACHINES`, or CHIP:SHAPE, such as "v5p:4x4x4", "h100:8" or "cpu:8";
        empty: the devices of this machine, which are started only then.
      mesh: the section ``mesh``; if it is the default, the preset's mesh is used.

    Raises:
      ConfigError: for an unknown name, an impossible shape, a mesh that does not fit, or if libtpu
        is needed and not installed.
    """
    if not topology:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # nothing is computed
        devices = jax.devices()
        made = make_mesh(**bind(make_mesh, mesh, "mesh"), devices=devices)
        return Target("", made, devices[0].platform, chip_of(devices[0].device_kind))
    preset = MACHINES.get(topology)
    chip, shape, count = _read(preset.topology if preset else topology)
    sizes = {name: mesh[name] for name in mesh}
    if preset and all(sizes[name] == size for name, size in NO_MESH.items()):
        sizes |= {"preset": topology}
    # leave this machine's accelerators alone; no effect after a backend has started
    jax.config.update("jax_platforms", "cpu")
    if chip in TPUS:
        devices, compiler = _tpu_devices(f"{chip}:{shape}", preset.slices if preset else 1), "tpu"
    else:
        devices, compiler = _cpu_devices(count), "cpu"
    made = make_mesh(**bind(make_mesh, sizes, "mesh"), devices=devices)
    return Target(topology, made, compiler, CHIPS.get(chip), preset)


def _read(topology: str) -> tuple[str, str, int]:
    """Parse "v5e:4x4" to (chip, shape, number of devices)."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match or match[1] not in (*CHIPS, "cpu"):
        raise ConfigError(
            f"plan.topology is {topology!r}; use a machine ({', '.join(MACHINES)}) or CHIP:SHAPE "
            f"with one of {', '.join(CHIPS)} or cpu, such as v5p:4x4x4 or h100:8"
        )
    count = math.prod(int(size) for size in match[2].split("x"))
    if not count:
        raise ConfigError(f"plan.topology is {topology!r}, which has no devices")
    return match[1], match[2], count


def _tpu_devices(topology: str, slices: int) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"compiling for {topology} needs libtpu, which is not installed; it needs no TPU: "
            f'pip install "jax[tpu]=={jax.__version__}"'
        )
    # another process may use TPUs, or plan, at the same time
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # otherwise it asks the cloud which machine this is
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.partition(":")[0] + "-8")
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"plan.topology is {topology!r}, which libtpu refuses: {text}") from None


def _cpu_devices(count: int) -> list:
    with contextlib.suppress(RuntimeError):  # a backend has started, with its devices
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"{count} devices are asked for, but JAX has started with {len(devices)} CPU devices; "
            "run plan in a new process"
        )
    return devices[:count]
