"""Check that a released file has the sizes of the config."""

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gae_jax.interop.convert import ConversionError
from gae_jax.interop.heads import stated_heads
from gae_jax.interop.sizes import DDT, ROPE, differing, questions, unshown, width_of
from gae_jax.tokenizers import section_of

DDT_PATHS = ("diffusion.model", "diffusion.head")  # sections of DiT-DH's parts


def kind_of(stage: str, config) -> str:
    """The kind of released module of a stage: the stage, or the name of the tokenizer."""
    return config.tokenizer.name if stage == "tokenizer" else stage


def require_sizes(config, stage: str, source, tensors: dict):
    """Check the sizes of a file; returns the source with remarks on what the file does not show.

    Args:
      source: as `sources.Source`.
      tensors: its tensors, by the names in the network's table.

    Raises:
      ConversionError: if the sizes differ; names all flags that make the config fit the file, and
        asks for sizes that no tensor shows.
    """
    if stage == "diffusion" and config.diffusion.name == "ddt":
        model, head = config.diffusion.model, config.diffusion.head
        sections = {**model, "other_depth": head.depth}, {**head, "other_depth": model.depth}
        parts = [Part(*of) for of in zip(DDT, DDT, DDT_PATHS, sections, strict=True)]
        return _require(config, stage, source, tensors, parts)
    kind = kind_of(stage, config)
    model = {
        "backbone": config.backbone.name,
        "tokenizer": section_of(config.tokenizer),
    }.get(stage, "model")
    path, section = f"{stage}.{model}", config[stage][model]
    part = Part(kind, model if stage == "backbone" else kind, path, section)
    return _require(config, stage, source, tensors, [part])


class Part(NamedTuple):
    """A part of a network with a section of its own.

    Attributes:
      kind: as `sizes.differing` takes it.
      name: as `heads.parts_of` takes it.
      path: of the section.
    """

    kind: str
    name: str
    path: str
    section: Mapping


def _require(config, stage: str, source, tensors: dict, parts: list[Part]):
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    flags, asked, remarks, stated = [], [], list(source.remarks), []
    try:
        for kind, name, path, section in parts:
            width = width_of(kind, shapes, section)
            beside, remark = stated_heads(name, Path(source.files[0]), width)
            stated.append({**beside, **source.shown})
            remarks += [remark] if remark else []
            flags += differing(kind, shapes, section, path, stated[-1])
            asked += questions(kind, shapes, section, path, stated[-1])
    except KeyError as error:
        raise ConversionError(
            f"{source} is no {stage} of the released kind: it has no tensor {error}"
        ) from None
    if stage == "diffusion":
        names = [ROPE[part.kind] for part in parts]
        if all(any(fnmatchcase(x, y) for y in config.import_torch.leave_out) for x in names):
            asked = [line for line in asked if "feat_rope" not in line]
        if not config.diffusion.model.use_abs_pos and np.any(tensors.get("pos_embed", 0)):
            flags.append("--config.diffusion.model.use_abs_pos=True")
    if flags or asked:
        lines = [f"{source} holds a {stage} of a different size than the config's; pass", *flags]
        if asked:
            lines += ["and give what the file does not show:" if flags else f"{source}:", *asked]
        raise ConversionError("\n".join(lines if flags else lines[1:]))
    for part, said in zip(parts, stated, strict=True):
        remarks += unshown(part.name, shapes, part.section, said)
    return dataclasses.replace(source, remarks=tuple(remarks))
