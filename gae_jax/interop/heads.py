"""Numbers of attention heads, which no tensor shows: from a config.json or published networks.

A network with other heads than its weights were trained with runs and gives wrong features, so
a number that nobody stated is never assumed.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from gae_jax.interop.convert import ConversionError
from gae_jax.nn.torch_names import Heads, published
from gae_jax.pretrained import dinov2, dinov3, mae, siglip
from gae_jax.tokenizers import TOKENIZERS
from gae_jax.tokenizers.kind import Counterpart

HEAD_WIDTH = 64  # of all published networks but those in `PUBLISHED` with another
UNSAID = 16  # the default of every section, whatever its width
FILE = "config.json"


def _vision(presets: Mapping[str, Mapping], unlisted: Mapping[int, int] = {}) -> Heads:
    """Return the heads of a vision encoder; ``unlisted``: width -> heads of other networks."""
    heads = published(presets, "hidden_size", "num_attention_heads")
    return Heads("num_attention_heads", "hidden_size", heads | dict(unlisted))


DINOV2 = _vision(dinov2.PRESETS)
_LIGHTNING_DIT = {384: 6, 768: 12, 1024: 16, 1152: 16}  # -S, -B, -L and -XL
# Parts by the kind of network: a name of `sizes.READERS`, or of a backbone; `parts_of` has
# tokenizers too.
PLACES = {
    "dinov2": (DINOV2,),
    "dinov3": (_vision(dinov3.PRESETS),),
    "mae": (_vision(mae.PRESETS, {1280: 16}),),  # MAE-H
    "siglip": (_vision(siglip.PRESETS),),
    "teacher": (Heads("heads", "", DINOV2.published),),
    "diffusion": (Heads("num_heads", "hidden_size", _LIGHTNING_DIT),),
    # DiT-DH's two parts: a LightningDiT, and the head of RAE's
    "ddt_backbone": (Heads("num_heads", "hidden_size", _LIGHTNING_DIT),),
    "ddt_head": (Heads("num_heads", "hidden_size", {2048: 16}),),
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
    "diffusion": ("diffusion", "num_heads"),
    "ddt_backbone": ("diffusion", "num_heads", 0),
    "ddt_head": ("diffusion", "num_heads", 1),
    "teacher": ("teacher", "heads"),
}


def parts_of(kind: str) -> tuple[Heads, ...]:
    """Return the parts of a network that have attention."""
    tokenizer = _counterpart(kind)
    return tokenizer.heads if tokenizer else PLACES.get(kind, ())


def _described(kind: str) -> tuple[str | int, ...]:
    """Return where the config.json of an export has the heads; empty: nowhere."""
    tokenizer = _counterpart(kind)
    return tokenizer.described_heads if tokenizer else EXPORTED.get(kind, ())


def _counterpart(kind: str) -> Counterpart | None:
    make = TOKENIZERS[kind].torch if kind in TOKENIZERS else None
    return make() if make else None


def heads_of(kind: str, shown: Mapping, section: Mapping, stated: Mapping) -> dict[str, int | None]:
    """Return field -> heads of every part of a network; None: nothing says how many.

    Args:
      kind: as `parts_of`; {} for kinds without attention.
      shown: sizes that the file shows, with "width" for parts whose section has none.
      section: the model's arguments in the config.
      stated: what a config.json says, by field.
    """
    heads_by_field = {}
    for place in parts_of(kind):
        width = shown[place.width or "width"]
        given = section[place.field]
        same_width = not place.width or section[place.width] == width
        if place.field in stated:
            heads = stated[place.field]
        elif width in place.published:
            heads = place.published[width]
        elif given != UNSAID and same_width and width % given == 0:
            heads = given
        else:
            heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None
        heads_by_field[place.field] = heads
    return heads_by_field


def stated_heads(kind: str, path: Path, width: int | None) -> tuple[dict[str, int], str]:
    """Return ({field: heads} of the config.json next to a file, a line about that file).

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
    if keys := _described(kind):
        for key in keys:
            if isinstance(key, int):
                content = content[key] if isinstance(content, list) and key < len(content) else None
            else:
                content = content.get(key) if isinstance(content, dict) else None
        field = parts_of(kind)[0].field
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
