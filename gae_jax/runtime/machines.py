"""Machines by name: what they are made of, and a mesh that every stage of the paper's size fits on.

A preset's mesh is one for all stages at a global batch of 1,024 images. ``fsdp`` divides the widths
1152 (LightningDiT-XL) and 1024 (ViT-L), so that next to nothing of the state lies whole on every
device. ``compute`` is what the stages need beside that to fit; `plan` tells whether it is enough.

Names are those of the clouds: v4 and v5p count cores, two to a chip, v5e and v6e count chips.
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
      data, fsdp, tensor: the mesh.
      slices: pods that are joined by a slower network.
      compute: config fields that a run at the paper's size is given there, by their paths.
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
    """Stages that compute activations again, and batches that are computed in so many parts."""
    again = {f"{stage}.compute.remat": "nothing_saveable" for stage in remat}
    parts = {"tokenizer.compute.accumulate": tokenizer, "diffusion.compute.accumulate": diffusion}
    return again | {path: n for path, n in parts.items() if n > 1}


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
    """A preset by its name.

    Raises:
      ConfigError: if there is none of that name; the known ones are named.
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
    """``{"data": ..., "fsdp": ..., "tensor": ...}`` of a preset; raises as `machine` does."""
    preset = machine(name)
    return {axis: getattr(preset, axis) for axis in AXES}
