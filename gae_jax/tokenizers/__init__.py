"""The tokenizers by name, and what the pipeline asks of the one that a config names.

Functions take a config, or what a stage's folder records of it: the section ``tokenizer``, and of
the others what the tokenizer is made of (`sections_of`).
"""

from collections.abc import Callable, Mapping

from flax import nnx

from gae_jax.nn.network import Network
from gae_jax.pretrained.backbone import make_backbone
from gae_jax.tokenizers import aligntok, conv, dgae, fae, gae, pae, rae
from gae_jax.tokenizers.base import Kind

TOKENIZERS: dict[str, Kind] = {
    "gae": gae.KIND,
    "pae": pae.KIND,
    "dgae": dgae.KIND,
    "aligntok": aligntok.KIND,
    "fae": fae.KIND,
    "rae": rae.KIND,
    "conv": conv.KIND,
}


def name_of(section: Mapping) -> str:
    """The tokenizer that a section ``tokenizer`` names; runs of older versions have GAE only."""
    return section.get("name", "gae")


def kind_of(section: Mapping) -> Kind:
    """What the pipeline knows of it."""
    return TOKENIZERS[name_of(section)]


def sizes_of(section: Mapping) -> Mapping:
    """The sizes of the tokenizer that a section ``tokenizer`` names."""
    name = name_of(section)
    return section["model" if name == "gae" else name]


def default_sizes() -> dict[str, dict]:
    """The sections of the neighbours, by name."""
    return {name: kind.sizes() for name, kind in TOKENIZERS.items() if name != "gae"}


def own_part(section: Mapping) -> dict:
    """A section ``tokenizer`` without the sizes of the tokenizers that it does not name."""
    own = name_of(section)
    others = {"model" if name == "gae" else name for name in TOKENIZERS if name != own}
    return {key: section[key] for key in section if key not in others}


def sections_of(section: Mapping) -> tuple[str, ...]:
    """The sections of a config that decide what a trained tokenizer is."""
    return ("seed", "data", *made_of(section))


def made_of(section: Mapping) -> tuple[str, ...]:
    """Those of them that say what its network is, beside the size of images in ``data``."""
    backbone = ("backbone",) if kind_of(section).backbone else ()
    return (*backbone, "tokenizer")


def image_size_of(config: Mapping) -> int:
    """Edge of the images in pixels; imported weights of GAE record it in the section alone."""
    if "data" in config:
        return config["data"]["image_size"]
    return sizes_of(config["tokenizer"])["image_size"]


def latent_shape(config: Mapping) -> tuple[int, int, int]:
    """(h, w, d) of the latents."""
    section = config["tokenizer"]
    backbone = config.get("backbone")
    return kind_of(section).latent_shape(sizes_of(section), backbone, image_size_of(config))


def builder(config: Mapping, **compute) -> Callable[..., nnx.Module]:
    """Function of ``rngs`` that makes the tokenizer.

    ``compute``: dtype, remat, attention and kernels, which a training has and what is trained has
    not.
    """
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
    """Whether terms compare tokens with another network's, and whether that is the teacher."""
    align = config.losses.align > 0 and config.align.target == "teacher"
    prior = config.losses.structure > 0 or config.losses.semantics > 0
    return align or prior, prior or (align and config.align.point == "latent")


def tokenizer_network(config, **compute) -> Network:
    """Of a config, or of what the tokenizer's folder records of it.

    ``compute``: the fields `COMPUTED`, which a training has and what is trained has not.
    """
    return Network(builder(config, **compute))
