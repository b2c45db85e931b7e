"""The section ``precision``: in which numbers, and by which kernels, networks are computed.

Fields of other sections, such as ``tokenizer.compute.dtype``, follow this section until they are
set themselves. Parameters, optimizers, averages, losses and metrics are float32 in any case.
"""

import copy
import logging
from collections.abc import Mapping

import ml_collections

from gae_jax.config.choices import Choice, choice, follow
from gae_jax.config.tools import flatten

DTYPES = ("float32", "bfloat16")
PRESETS = {"exact": "float32", "fast": "bfloat16"}  # preset -> the dtype of all `FIELDS`
ATTENTIONS = "nn.attention:ATTENTIONS"
PRODUCTS = "nn.quantized:PRODUCTS"

# Fields with the dtype of a network that `settle` records. The first part is the section that a
# stage records.
FIELDS = (
    *("teacher.compute.dtype", "teacher.backbone.dtype"),
    *("tokenizer.compute.dtype", "tokenizer.perceptual.dtype", "tokenizer.align.dtype"),
    *("diffusion.compute.dtype", "latents.encode_dtype", "sample.dtype"),
)


def precision_section() -> dict:
    """How all networks are computed, unless a field of their own section says otherwise. [ours]"""
    preset = choice("auto", *PRESETS)

    def dtype() -> Choice:
        return follow(preset, PRESETS, "auto", "auto", *DTYPES)

    return dict(
        # fast: bfloat16 everywhere, see docs/performance.md | exact: float32 everywhere | auto:
        # each network's own default, and on GPUs and TPUs `fast` where training was shown to
        # learn alike (`shown_alike`). --config.precision=fast is short for .preset=fast
        preset=preset,
        # networks that are trained: activations; auto: each network's own default
        train=dict(
            dtype=dtype(),
            remat=choice("none", "nn.layers:REMAT"),  # as compute.remat
            attention=choice("auto", ATTENTIONS),  # as compute.attention
            kernels=choice("auto", "kernels.norm:KERNELS"),  # as compute.kernels
        ),
        # frozen networks: those that training looks through, and the encoder of `latents`
        frozen=dict(
            dtype=dtype(),
            products=choice("same", PRODUCTS),  # of the encoder of `latents`, as sample.products
        ),
        # networks that draw samples
        sample=dict(
            dtype=dtype(),
            products=choice("same", PRODUCTS),  # as sample.products
            attention=choice("auto", ATTENTIONS),
        ),
    )


def dtype_like(source: Choice, default: str = "float32") -> Choice:
    """A network's dtype: that of a part of ``precision``, and ``default`` where this is auto."""
    return follow(source, {name: name for name in DTYPES}, default, *DTYPES)


def same_as(source: Choice) -> Choice:
    """A field that equals another one until it is set itself."""
    return Choice(source, source.choices)


def following(config: ml_collections.ConfigDict) -> list[str]:
    """Those of `FIELDS` that depend on ``precision.preset``: neither they nor their part is set."""
    config = copy.deepcopy(config)
    values = []
    for preset in PRESETS:
        config.precision.preset = preset
        values.append(flatten(config))
    return [path for path in FIELDS if values[0][path] != values[1][path]]


def shown_alike(config: Mapping) -> tuple[str, ...]:
    """Those of `FIELDS` whose networks learn in bfloat16 as in float32.

    The curves are in docs/performance.md. Encoding, sampling and other tokenizers than GAE have
    none, and keep their defaults.
    """
    fields = ["diffusion.compute.dtype"]
    if config.teacher.kind == "learned":
        fields += ["teacher.compute.dtype", "teacher.backbone.dtype"]
    if config.tokenizer.name == "gae":
        fields += [path for path in FIELDS if path.startswith("tokenizer.")]
    return tuple(fields)


def settle(
    config: ml_collections.ConfigDict, platform: str, recorded: Mapping[str, str]
) -> ml_collections.ConfigDict:
    """The config with the dtypes that ``precision.preset`` "auto" means for this run and device.

    Args:
      platform: of the devices, as `jax.default_backend` names it.
      recorded: field -> value, of stages that have begun. They keep their numbers wherever they
        are resumed.

    Returns:
      The config itself if nothing changes, else a changed copy.
    """
    fields = following(config)
    changes = {}
    if config.precision.preset == "auto":
        alike = shown_alike(config) if platform in ("gpu", "tpu") else ()
        changes |= {path: "bfloat16" for path in fields if path in alike}
        changes |= {path: recorded[path] for path in fields if recorded.get(path) in DTYPES}
    if config.teacher.kind == "prior" and "teacher.compute.dtype" in fields:
        changes["teacher.compute.dtype"] = "float32"  # it is computed in no other way
    values = flatten(config)
    changes = {path: value for path, value in changes.items() if values[path] != value}
    if changes:
        config = copy.deepcopy(config)
        config.update_from_flattened_dict(changes)
    return config


def unreached(config: Mapping) -> list[str]:
    """Those of `FIELDS` with another dtype than the preset "exact" or "fast" asks for."""
    asked = PRESETS.get(config.precision.preset)
    values = flatten(config)
    odd = [path for path in FIELDS if asked and values[path] != asked]
    # the teacher of the prior is computed in float32 under every preset, as `settle` has it
    return [x for x in odd if config.teacher.kind != "prior" or x != "teacher.compute.dtype"]


def log(config: ml_collections.ConfigDict, platform: str) -> None:
    """Log which dtype every network has."""
    values = flatten(config)
    by_dtype = {
        dtype: [path.removesuffix(".compute.dtype") for path in FIELDS if values[path] == dtype]
        for dtype in DTYPES
    }
    said = "; ".join(f"{dtype}: {', '.join(paths)}" for dtype, paths in by_dtype.items() if paths)
    logging.info("precision %s on %s: %s", config.precision.preset, platform, said)
