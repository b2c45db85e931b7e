"""Read the networks of a folder that ``export-torch`` wrote."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path

from gae_jax.interop import rae_tables, tables
from gae_jax.interop.convert import import_torch
from gae_jax.interop.files import read_state_dict
from gae_jax.nn.network import Arrays, Network
from gae_jax.nn.torch_names import Table
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import read_json
from gae_jax.tokenizers import gae_torch

# Stage -> files that may hold its network; the first that exists counts.
FILES = {
    "tokenizer": ("gae.safetensors",),
    "diffusion": ("dit.safetensors", "dit_raw.safetensors"),
}
PAIRS = ("hidden_size", "depth", "num_heads")  # sizes of DiT-DH: (of the backbone, of the head)


@dataclasses.dataclass(frozen=True)
class Exported:
    """One network of an export folder.

    Attributes:
      file: its tensors.
      table, sizes: its released module and the arguments of ours.
      section: the part of a config that describes it, as nested dicts.
      name: of the kind of tokenizer or diffusion model.
    """

    file: Path
    table: Table
    sizes: dict
    section: dict
    name: str

    @cached_property
    def network(self) -> Network:
        """The network, without its arrays."""
        return Network(partial(self.table.module, **self.sizes))

    def arrays(self) -> Arrays:
        """Load (parameters, rest) as numpy arrays; raises as `import_torch`."""
        tensors = read_state_dict(self.file)
        return import_torch(self.table, tensors, self.network, **self.sizes)


def is_export(folder: Path) -> bool:
    """Return whether ``export-torch`` wrote the folder."""
    marker = folder / "config.json"
    return marker.is_file() and "gae_jax" in read_json(marker)


def networks_of(folder: Path) -> list[str]:
    """Return the stages whose networks the folder holds, of those in `FILES`."""
    described = read_json(folder / "config.json")
    return [
        stage
        for stage, names in FILES.items()
        if stage in described and any((folder / name).is_file() for name in names)
    ]


def read_export(folder: Path, stage: str) -> Exported:
    """Read the description of a network of an export folder, not yet its tensors.

    Args:
      stage: one of `networks_of` the folder.

    Raises:
      UserError: if config.json does not describe the network as `export-torch` does.
    """
    described = read_json(folder / "config.json")
    file = next(folder / name for name in FILES[stage] if (folder / name).is_file())
    try:
        if stage == "tokenizer":
            sizes = gae_torch.sizes_of_class(described["tokenizer"]["params"])
            return Exported(file, gae_torch.TABLE, sizes, {"tokenizer": {"model": sizes}}, "gae")
        return _diffusion(file, described["diffusion"], described["latent_multiplier"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'config.json'} does not describe the {stage} as export-torch does ({error} "
            "is missing or of another kind); export the run again with --fresh"
        ) from None


def _diffusion(file: Path, described: Mapping, multiplier: float) -> Exported:
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
    model = {k: v for k, v in sizes.items() if k not in ("input_size", "in_channels")}
    section: dict = {"latent_multiplier": multiplier}
    if not isinstance(sizes["depth"], tuple):
        return Exported(
            file, tables.DIT, sizes, {"diffusion": section | {"model": model}}, "lightningdit"
        )
    head = {key: model[key][1] for key in PAIRS}
    model |= {key: model[key][0] for key in PAIRS}
    if "use_pos_embed" in model:
        model["use_abs_pos"] = model.pop("use_pos_embed")
    section |= {"model": model, "head": head}
    return Exported(file, rae_tables.ditdh(sizes["depth"]), sizes, {"diffusion": section}, "ddt")
