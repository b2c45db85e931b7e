"""The released torch module that each network of a run corresponds to."""

import dataclasses
from collections.abc import Collection, Mapping
from functools import cached_property, partial

from gae_jax.generators.latent_diffusion import ddt_sizes
from gae_jax.interop import metric_tables, rae_tables, tables, vision_tables
from gae_jax.nn.network import Network, Params
from gae_jax.nn.torch_names import Table
from gae_jax.runtime.errors import UserError
from gae_jax.tokenizers import TOKENIZERS, image_size_of, kind_of, name_of, sizes_of
from gae_jax.tokenizers.gae_teacher import teacher_sizes

# Networks for metrics; no section of the config describes them.
METRICS = {
    "lpips": metric_tables.LPIPS_FILES,
    "inception": metric_tables.INCEPTION,
    "efficientnet": vision_tables.EFFICIENTNET,
    "dino": rae_tables.DINO,  # that a discriminator looks through
}
# Stages with a released counterpart, in the order of the pipeline.
NAMES = (*METRICS, "backbone", "teacher", "tokenizer", "diffusion")
BACKBONE_IN_TEACHER = "base_model.model."  # prefix of the backbone in a teacher's state dict


@dataclasses.dataclass(frozen=True)
class Released:
    """A released module.

    Attributes:
      table: of its names.
      sizes: arguments of our module of the table.
      key: the module's name in the stage's network; "": it is the network.
    """

    table: Table
    sizes: dict
    key: str = ""

    @cached_property
    def network(self) -> Network:
        return Network(partial(self.table.module, **self.sizes))

    def inside(self, arrays: tuple[Params, Params]) -> tuple[Params, Params]:
        """Select (params, rest) of the released module from those of the stage's network."""
        params, rest = arrays
        return (params[self.key], rest.get(self.key, {})) if self.key else (params, rest)

    def outside(self, arrays, around: tuple[Params, Params]) -> tuple[Params, Params]:
        """Replace the released module's arrays in those of the stage's network, ``around``."""
        if not self.key:
            return arrays
        params, rest = arrays
        inner = {self.key: rest} if rest else {}
        return {**around[0], self.key: params}, {**around[1], **inner}


def released(
    stage: str,
    config: Mapping,
    *,
    names: Collection[str] = (),
    shape: tuple[int, int, int] | None = None,
) -> Released:
    """The released counterpart of a stage.

    Args:
      stage: one of `NAMES`.
      config: nested, with the section of the stage, and of the backbone for a teacher.
      names: of a file's tensors, since DINOv2 has two namings; empty: DINOv2's own.
      shape: (h, w, d) of the latents of a diffusion model.

    Raises:
      UserError: if there is none.
    """
    if why := without_counterpart(stage, config):
        raise UserError(why)
    if stage in METRICS:
        return Released(METRICS[stage], {})
    if stage == "backbone":
        kind = config["backbone"]["name"]
        sizes = {k: v for k, v in config["backbone"][kind].items() if k != "input_size"}
        if kind == "efficientnet_lite0":  # its fields choose features, not sizes
            sizes = {}
        table = vision_tables.TABLES[kind]
        if kind == "dinov2" and (not names or "patch_embed.proj.weight" in names):
            table = vision_tables.DINOV2_HUB
        return Released(table, sizes, "encoder")
    if stage == "teacher":
        sizes = teacher_sizes(config["teacher"]["model"], config["backbone"])
        return Released(tables.TEACHER, sizes)
    if stage == "tokenizer":
        section = config["tokenizer"]
        counterpart = kind_of(section).counterpart
        sizes = counterpart.arguments(
            sizes_of(section), config.get("backbone", {}), image_size_of(config)
        )
        return Released(counterpart.table, sizes, counterpart.key)
    section = config["diffusion"]
    sizes = dict(input_size=shape[0], in_channels=shape[-1], **section["model"])
    if section.get("name") == "ddt":
        sizes = ddt_sizes(sizes, section["head"])
        return Released(rae_tables.ditdh(sizes["depth"]), sizes, "dit")
    return Released(tables.DIT, sizes, "dit")


def without_counterpart(stage: str, config: Mapping) -> str:
    """Why the network of a stage has no released counterpart; "" if it has one."""
    if stage == "teacher" and config["teacher"].get("kind") == "svd":
        return (
            "teacher.kind is 'svd': a projection on singular vectors has no counterpart in the "
            "released code, so there is nothing to import or export"
        )
    if stage == "tokenizer" and not kind_of(config["tokenizer"]).torch:
        name = name_of(config["tokenizer"])
        known = ", ".join(repr(name) for name, kind in TOKENIZERS.items() if kind.torch)
        return (
            f"tokenizer.name is {name!r}, whose released weights cannot be imported or exported; "
            f"only those of {known} can"
        )
    if stage == "teacher" and config["teacher"].get("kind") == "prior":
        return (
            "teacher.kind is 'prior': the prior refinement of PAE is not released, so there is "
            "nothing to import or export"
        )
    return ""
