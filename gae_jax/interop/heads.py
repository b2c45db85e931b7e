"""The heads of attention, which show in no tensor: by a config.json, or as published networks.

A network with other heads than its weights were trained with runs and gives wrong features, so
a number that nobody stated is never taken.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gae_jax.interop.convert import ConversionError
from gae_jax.pretrained import dinov2, dinov3, mae, siglip
from gae_jax.tokenizers import gae_networks as gae
from gae_jax.tokenizers import mae_decoder

HEAD_WIDTH = 64  # of all published networks but those in `PUBLISHED` with another
UNSAID = 16  # what every section has for heads, whatever its width
FILE = "config.json"


class Place(NamedTuple):
    """Where a section says the heads of one part of a network.

    Attributes:
      heads: the field.
      width: the field with the width of that part; "": the section has none.
      published: width -> heads.
    """

    heads: str
    width: str
    published: Mapping[int, int]


def _published(presets: Mapping[str, Mapping], width: str, heads: str) -> dict[int, int]:
    return {sizes[width]: sizes[heads] for sizes in presets.values()}


_VISION = ("hidden_size", "num_attention_heads")
_DINOV2 = _published(dinov2.PRESETS, *_VISION)
_OF_MAE_DECODER = Place(
    "decoder_num_attention_heads",
    "decoder_hidden_size",
    _published(mae_decoder.PRESETS, "decoder_hidden_size", "decoder_num_attention_heads"),
)
_LIGHTNING_DIT = {384: 6, 768: 12, 1024: 16, 1152: 16}  # -S, -B, -L and -XL
# Parts by the kind of network: a name of `sizes.READERS`, or of a backbone.
PLACES = {
    "dinov2": (Place(*reversed(_VISION), _DINOV2),),
    "dinov3": (Place(*reversed(_VISION), _published(dinov3.PRESETS, *_VISION)),),
    # 1280 is MAE-H
    "mae": (Place(*reversed(_VISION), _published(mae.PRESETS, *_VISION) | {1280: 16}),),
    "siglip": (Place(*reversed(_VISION), _published(siglip.PRESETS, *_VISION)),),
    "tokenizer": (
        Place("num_heads", "embed_dim", _published(gae.SIZES, "embed_dim", "num_heads")),
    ),
    "teacher": (Place("heads", "", _DINOV2),),
    "pae": (Place("num_heads", "", _DINOV2), _OF_MAE_DECODER),
    "rae": (_OF_MAE_DECODER,),
    "diffusion": (Place("num_heads", "hidden_size", _LIGHTNING_DIT),),
    # DiT-DH's two parts: a LightningDiT, and the head of RAE's
    "ddt_backbone": (Place("num_heads", "hidden_size", _LIGHTNING_DIT),),
    "ddt_head": (Place("num_heads", "hidden_size", {2048: 16}),),
}
# Of the published encoders: their names in a config.json, and what is built in here.
MODEL_TYPES = {
    "dinov2": ("dinov2", "dinov2_with_registers"),
    "dinov3": ("dinov3_vit",),
    "mae": ("vit_mae",),
    "siglip": ("siglip", "siglip_vision_model"),
}
BUILT_IN = {
    "dinov2": {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True},
    "dinov3": {"layer_norm_eps": 1e-5, "rope_theta": dinov3.ROPE_BASE, "hidden_act": "gelu"},
    "mae": {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "qkv_bias": True},
    "siglip": {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
}
# Where the config.json of an export has the heads.
EXPORTED: dict[str, tuple[str | int, ...]] = {
    "tokenizer": ("tokenizer", "params", "encoder_config", "params", "num_heads"),
    "diffusion": ("diffusion", "num_heads"),
    "ddt_backbone": ("diffusion", "num_heads", 0),
    "ddt_head": ("diffusion", "num_heads", 1),
    "teacher": ("teacher", "heads"),
}


def heads_of(kind: str, found: Mapping, section: Mapping, stated: Mapping) -> dict[str, int | None]:
    """Field -> heads of every part of a network; None: nothing says how many.

    Args:
      kind: of `PLACES`; of others the answer is empty.
      found: sizes that the file shows, with "width" for parts whose section has none.
      section: the model's arguments in the config.
      stated: what a config.json says, by field.
    """
    answer = {}
    for place in PLACES.get(kind, ()):
        width = found[place.width or "width"]
        given = section[place.heads]
        same_width = not place.width or section[place.width] == width
        if place.heads in stated:
            heads = stated[place.heads]
        elif width in place.published:
            heads = place.published[width]
        elif given != UNSAID and same_width and width % given == 0:
            heads = given
        else:
            heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None
        answer[place.heads] = heads
    return answer


def stated_heads(kind: str, path: Path, width: int | None) -> tuple[dict[str, int], str]:
    """({field: heads} that the config.json beside a file says, a line about that file).

    A config.json of another kind of network or of another width is not read; the line says so.

    Args:
      kind: as `heads_of`.
      path: of the weights: a file, an index or a folder.
      width: of the network in the file.

    Raises:
      ConversionError: if it describes a network that is not built here.
    """
    file = (path if path.is_dir() else path.parent) / FILE
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}, ""
    if not isinstance(content, dict):
        return {}, ""
    if kind in EXPORTED:
        for key in EXPORTED[kind]:
            if isinstance(key, int):
                content = content[key] if isinstance(content, list) and key < len(content) else None
            else:
                content = content.get(key) if isinstance(content, dict) else None
        field = PLACES[kind][0].heads
        return ({field: content}, f"{field} is that of {file}") if _count(content) else ({}, "")
    if kind not in MODEL_TYPES:
        return {}, ""
    vision = content.get("vision_config", content)
    types = {x.get("model_type") for x in (content, vision) if isinstance(x, dict)}
    if not types & set(MODEL_TYPES[kind]) or vision.get("hidden_size", width) != width:
        return {}, f"{file} is of another network and was not read"
    built_in = dict(BUILT_IN[kind])
    if kind == "dinov3" and vision.get("use_gated_mlp"):
        built_in["hidden_act"] = "silu"
    for field, value in built_in.items():
        if field in vision and vision[field] != value:
            raise ConversionError(
                f"{file} has {field} {vision[field]!r}, but the networks {kind!r} that are built "
                f"here have {value!r}: its features would be wrong"
            )
    heads = vision.get("num_attention_heads")
    if not _count(heads):
        return {}, ""
    return {"num_attention_heads": heads}, f"num_attention_heads is that of {file}"


def _count(value) -> bool:
    return type(value) is int and value > 0
