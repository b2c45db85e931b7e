"""Whether a released file has the sizes that the config says, and what no file shows."""

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from gae_jax.interop.convert import ConversionError
from gae_jax.interop.heads import stated_heads
from gae_jax.interop.sizes import ROPE, differing, questions, unshown, width_of


def kind_of(stage: str, config) -> str:
    """The stage, but of tokenizers other than GAE the name: which released module it is."""
    other = stage == "tokenizer" and config.tokenizer.name != "gae"
    return config.tokenizer.name if other else stage


def require_sizes(config, stage: str, source, tensors: dict):
    """The source with remarks on what its file does not show.

    Args:
      source: as `import_torch.Source`.
      tensors: its tensors by the names that the network's table has.

    Raises:
      ConversionError: unless the file's network has the sizes that the config says; with all flags
        that bring the config in line, and with what has to be asked because no tensor shows it.
    """
    kind = kind_of(stage, config)
    model = {"backbone": config.backbone.name}.get(kind, "model" if kind == stage else kind)
    path, section = f"{stage}.{model}", config[stage][model]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    part = model if stage == "backbone" else kind
    try:
        width = width_of(kind, shapes, section)
        stated, remark = stated_heads(part, Path(source.files[0]), width)
        said = {**stated, **source.shown}
        flags = differing(kind, shapes, section, path, said)
        asked = questions(kind, shapes, section, path, said)
    except KeyError as error:
        raise ConversionError(
            f"{source} is no {stage} of the released kind: it has no tensor {error}"
        ) from None
    if stage == "diffusion":
        if any(fnmatchcase(ROPE[0], pattern) for pattern in config.import_torch.leave_out):
            asked = [line for line in asked if ROPE[0].partition(".")[0] not in line]
        if not section.use_abs_pos and np.any(tensors.get("pos_embed", 0)):
            flags.append(f"--config.{path}.use_abs_pos=True")
    if flags or asked:
        lines = [f"{source} holds a {stage} of another size than the config's; pass", *flags]
        if asked:
            lines += ["and say what the file does not:" if flags else f"{source}:", *asked]
        raise ConversionError("\n".join(lines if flags else lines[1:]))
    remarks = [*source.remarks, *([remark] if remark else [])]
    remarks += unshown(part, shapes, section, said)
    return dataclasses.replace(source, remarks=tuple(remarks))
