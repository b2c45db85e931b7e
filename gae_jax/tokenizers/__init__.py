"""The tokenizers by name, and what the pipeline asks of the one that a config names.

Functions take a config, or what a stage's folder records of it: the section ``tokenizer``, and of
the others those that describe the tokenizer (`sections_of`). Importing this package imports no
Flax: configs need the default sizes; networks are imported when they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gae_jax.runtime.sharding_rules import add_rules
from gae_jax.tokenizers import (
    aligntok_kind,
    conv_kind,
    dgae_kind,
    fae_kind,
    gae_kind,
    pae_kind,
    rae_kind,
)
from gae_jax.tokenizers.kind import Kind

if TYPE_CHECKING:
    from flax import nnx

    from gae_jax.nn.network import Network

TOKENIZERS: dict[str, Kind] = {}


def register(name: str, kind: Kind) -> None:
    """Add a tokenizer, which configs then name, with its section and its sharding rules."""
    TOKENIZERS[name] = kind
    add_rules(kind.rules)


register("gae", gae_kind.KIND)
register("pae", pae_kind.KIND)
register("dgae", dgae_kind.KIND)
register("aligntok", aligntok_kind.KIND)
register("fae", fae_kind.KIND)
register("rae", rae_kind.KIND)
register("conv", conv_kind.KIND)


def name_of(section: Mapping) -> str:
    """Return the name of the tokenizer of a section ``tokenizer``; imports of GAE record none."""
    return section.get("name", "gae")


def kind_of(section: Mapping) -> Kind:
    """Return the kind of the tokenizer of a section ``tokenizer``."""
    return TOKENIZERS[name_of(section)]


def _section_name(name: str) -> str:
    return TOKENIZERS[name].section or name


def section_of(section: Mapping) -> str:
    """Return the name of the subsection with the sizes of the tokenizer."""
    return _section_name(name_of(section))


def sizes_of(section: Mapping) -> Mapping:
    """Return the sizes of the tokenizer of a section ``tokenizer``."""
    return section[section_of(section)]


def default_sizes() -> dict[str, dict]:
    """Return the default sizes of all tokenizers, by the name of their subsection."""
    return {_section_name(name): kind.sizes() for name, kind in TOKENIZERS.items()}


def network_fields() -> tuple[str, ...]:
    """Return patterns of the fields that determine a tokenizer's network, by dotted path."""
    return tuple(f"tokenizer.{_section_name(name)}.*" for name in TOKENIZERS)


def fields_of_kinds(which: str) -> tuple[str, ...]:
    """Return the paths of fields that every kind lists: ``training_fields``, ``start_fields``."""
    return tuple(
        f"tokenizer.{_section_name(name)}.{field}"
        for name, kind in TOKENIZERS.items()
        for field in getattr(kind, which)
    )


def without_other_sizes(section: Mapping) -> dict:
    """Return a section ``tokenizer`` without the sizes of the tokenizers that it does not name."""
    other_sizes = {_section_name(name) for name in TOKENIZERS} - {section_of(section)}
    return {key: section[key] for key in section if key not in other_sizes}


def sections_of(section: Mapping) -> tuple[str, ...]:
    """Return the sections of a config that determine a trained tokenizer."""
    return ("seed", "data", *made_of(section))


def made_of(section: Mapping) -> tuple[str, ...]:
    """Return those that determine its network, besides the image size in ``data``."""
    backbone = ("backbone",) if kind_of(section).backbone else ()
    return (*backbone, "tokenizer")


def image_size_of(config: Mapping) -> int:
    """Return the edge of the images in pixels; imported weights of GAE record it in its section."""
    if "data" in config:
        return config["data"]["image_size"]
    return sizes_of(config["tokenizer"])["image_size"]


def latent_shape(config: Mapping) -> tuple[int, int, int]:
    """Return (h, w, d) of the latents.

    Raises:
      ValueError: for sizes that do not fit; see `Kind.latent_shape`.
    """
    section = config["tokenizer"]
    backbone = config.get("backbone")
    return kind_of(section).latent_shape(sizes_of(section), backbone, image_size_of(config))


def builder(config: Mapping, **compute) -> Callable[..., nnx.Module]:
    """Return a function of ``rngs`` that builds the tokenizer.

    Args:
      compute: dtype, remat, attention and kernels: training-only settings, not saved with the
        weights.
    """
    from gae_jax.pretrained.backbone import make_backbone

    section = config["tokenizer"]
    compute = dict(dtype="float32", remat="none", attention="xla") | compute
    if not kind_of(section).kernels:
        compute.pop("kernels", None)

    def build(rngs):
        return kind_of(section).build(
            sizes_of(section),
            lambda rngs: make_backbone(config["backbone"], dtype=compute["dtype"], rngs=rngs),
            image_size=image_size_of(config),
            **compute,
            rngs=rngs,
        )

    return build


def aligns(config) -> tuple[bool, bool]:
    """Return whether terms compare tokens with another network's, and whether with the teacher's.

    Args:
      config: the section ``tokenizer``.
    """
    align = config.losses.align > 0 and config.align.target == "teacher"
    prior = config.losses.structure > 0 or config.losses.semantics > 0
    return align or prior, prior or (align and config.align.point == "latent")


def tokenizer_network(config, **compute) -> Network:
    """Return the network of a config, or of what the tokenizer's folder records of it.

    Args:
      compute: as `builder`.
    """
    from gae_jax.nn.network import Network

    return Network(builder(config, **compute))
