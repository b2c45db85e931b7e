"""Machine presets by name: topology, and a mesh on which every stage of the paper's size fits.

A preset has one mesh for all stages at a global batch of 1,024 images. ``fsdp`` divides the widths
1152 (LightningDiT-XL) and 1024 (ViT-L), so that almost nothing of the state is replicated.
``compute`` is what the stages need besides to fit in memory; `plan` reports whether they do.

Names follow the clouds: v4 and v5p count cores, two per chip; v5e and v6e count chips.
"""

import dataclasses
import difflib
from collections.abc import Mapping

from gae_jax.runtime.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A preset.

    Attributes:
      topology: "CHIP:SHAPE", as `benchmark.targets` reads it.
      data, fsdp, tensor: shape of the mesh.
      slices: number of pods, which a slower network connects.
      compute: path of a config field -> its value for a run at the paper's size.
    """

    topology: str
    data: int
    fsdp: int
    tensor: int = 1
    slices: int = 1
    compute: Mapping[str, str | int] = dataclasses.field(default_factory=dict)


BOTH = ("tokenizer", "diffusion")


def _with(
    *, tokenizer: int = 1, diffusion: int = 1, remat: tuple[str, ...] = BOTH
) -> dict[str, str | int]:
    """Return config fields: stages with rematerialisation, and parts of accumulated batches."""
    rematerialized = {f"precision.{stage}.remat": "nothing_saveable" for stage in remat}
    parts = {"tokenizer.train.accumulate": tokenizer, "diffusion.train.accumulate": diffusion}
    return rematerialized | {path: n for path, n in parts.items() if n > 1}


MACHINES: dict[str, Machine] = {
    "v4-8": Machine("v4:2x2x1", data=1, fsdp=4, compute=_with(tokenizer=16, diffusion=4)),
    "v4-64": Machine("v4:2x4x4", data=2, fsdp=16, compute=_with(tokenizer=2)),
    "v5e-16": Machine("v5e:4x4", data=1, fsdp=16, compute=_with(tokenizer=8)),
    "v5e-64": Machine("v5e:8x8", data=4, fsdp=16, compute=_with(tokenizer=2)),
    "v5e-256": Machine("v5e:16x16", data=16, fsdp=16, compute=_with(remat=("tokenizer",))),
    "v5p-8": Machine("v5p:2x2x1", data=1, fsdp=4, compute=_with(tokenizer=4)),
    "v5p-64": Machine("v5p:2x4x4", data=2, fsdp=16, compute=_with(remat=("tokenizer",))),
    "v6e-16": Machine("v6e:4x4", data=1, fsdp=16, compute=_with(tokenizer=4)),
    "v6e-256": Machine("v6e:16x16", data=16, fsdp=16),
    "h100-1": Machine("h100:1", data=1, fsdp=1, compute=_with(tokenizer=32, diffusion=8)),
    "h100-8": Machine("h100:8", data=1, fsdp=8, compute=_with(tokenizer=4)),
    "h100-64": Machine("h100:64", data=8, fsdp=8),
    "h200-8": Machine("h200:8", data=1, fsdp=8, compute=_with(tokenizer=2)),
    "cpu": Machine("cpu:1", data=1, fsdp=1),
}


def machine(name: str) -> Machine:
    """Look up a preset by name.

    Raises:
      ConfigError: if there is none of that name; lists the known ones.
    """
    if name not in MACHINES:
        near = difflib.get_close_matches(name, MACHINES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"there is no machine {name!r}{hint}; known are {', '.join(MACHINES)}; or give "
            "mesh.data, mesh.fsdp and mesh.tensor"
        )
    return MACHINES[name]


def mesh_of(name: str) -> dict[str, int]:
    """Return ``{"data": ..., "fsdp": ..., "tensor": ...}`` of a preset; raises as `machine`."""
    preset = machine(name)
    return {axis: getattr(preset, axis) for axis in AXES}
