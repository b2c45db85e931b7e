"""Frozen vision encoders in released files: which encoder a file has, and what else.

Every encoder is brought to its names in `vision_tables`; what only its training or its other half
has is ignored by name. Whatever else a file holds stays, so that the import refuses it.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from gae_jax.interop.convert import ConversionError
from gae_jax.pretrained.dinov3 import ROPE_BASE
from gae_jax.runtime.errors import number_of

# What is no part of the encoder: full names, or prefixes if they end with a dot.
ASIDE = {
    "dinov2": (),
    "dinov3": ("local_cls_norm.",),  # of small crops, in training
    "mae": ("decoder.",),
    "siglip": ("text_model.", "vision_model.head.", "head.", "logit_scale", "logit_bias"),
}
# Prefix of the encoder in the file of a complete model.
WHOLE = {"mae": "vit.", "siglip": "vision_model."}
# A tensor that only files of the kind have, by its name without that prefix. First match wins.
MARKS = (
    ("siglip", "embeddings.patch_embedding.weight"),
    ("dinov3", "embeddings.patch_embeddings.weight"),
    ("dinov3", "rope_embed.periods"),
    ("mae", "encoder.layer.0.intermediate.dense.weight"),
    ("dinov2", "encoder.layer.0.layer_scale1.lambda1"),
    ("dinov2", "blocks.0.ls1.gamma"),
    ("efficientnet_lite0", "_conv_stem.weight"),
)
# Names of facebookresearch/dinov3 -> those of transformers; all but query, key and value.
DINOV3_HUB = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(cls_token|mask_token)", r"embeddings.\1"),
        (r"storage_tokens", r"embeddings.register_tokens"),
        (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
        (r"blocks\.(\d+)\.(norm[12]\.(?:weight|bias))", r"layer.\1.\2"),
        (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"layer.\1.attention.o_proj.\2"),
        (r"blocks\.(\d+)\.ls([12])\.gamma", r"layer.\1.layer_scale\2.lambda1"),
        (r"blocks\.(\d+)\.mlp\.(?:fc1|w2)\.(weight|bias)", r"layer.\1.mlp.up_proj.\2"),
        (r"blocks\.(\d+)\.mlp\.(?:fc2|w3)\.(weight|bias)", r"layer.\1.mlp.down_proj.\2"),
        (r"blocks\.(\d+)\.mlp\.w1\.(weight|bias)", r"layer.\1.mlp.gate_proj.\2"),
    )
)
QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias|bias_mask)")


def kind_of_names(names: Collection[str]) -> str | None:
    """Return the encoder that a file holds, by the names of its tensors; None: unknown."""
    plain = {name.removeprefix(prefix) for name in names for prefix in ("", *WHOLE.values())}
    return next((kind for kind, mark in MARKS if mark in plain), None)


def shown_heads(kind: str, tensors: Mapping[str, np.ndarray]) -> int | None:
    """Read the heads of attention that a file shows: those of DINOv3's own repository."""
    periods = tensors.get("rope_embed.periods")
    if kind != "dinov3" or periods is None or not len(periods) or "cls_token" not in tensors:
        return None
    return tensors["cls_token"].shape[-1] // (4 * len(periods))


def set_aside(kind: str, names: Collection[str]) -> dict[str, int]:
    """Return what `encoder_tensors` ignores, as in `ASIDE` -> number of tensors."""
    counts = {part: sum(_is_of(name, part) for name in names) for part in ASIDE[kind]}
    return {part: count for part, count in counts.items() if count}


def encoder_tensors(
    kind: str, tensors: Mapping[str, np.ndarray], *, num_heads: int
) -> dict[str, np.ndarray]:
    """Return the encoder's tensors of a file, by their names in `vision_tables.TABLES`.

    Args:
      kind: of the encoder, as in the config.
      num_heads: of its attention, which only the files of DINOv3's own repository tell of.

    Raises:
      ConversionError: if names clash once the prefix of the complete model is removed; for a DINOv3
        of its own repository with other rotations than ours, or with biases of keys that count.
    """
    kept = {name: x for name, x in tensors.items() if not any(_is_of(name, p) for p in ASIDE[kind])}
    prefix = WHOLE.get(kind, "")
    encoder = {name.removeprefix(prefix): tensor for name, tensor in kept.items()}
    if len(encoder) < len(kept):
        raise ConversionError(
            f"the file holds {number_of(len(kept) - len(encoder), 'tensor')} twice, with "
            f"{prefix!r} before their names and without; save one of the two networks alone"
        )
    if kind == "dinov3" and "rope_embed.periods" in encoder:
        return _from_hub(encoder, num_heads)
    return encoder


def _is_of(name: str, part: str) -> bool:
    return name.startswith(part) if part.endswith(".") else name == part


def _from_hub(tensors: dict[str, np.ndarray], num_heads: int) -> dict[str, np.ndarray]:
    """Rename a DINOv3 from its own repository's names to those of transformers.

    There the mask token has one axis less, and query, key and value are one layer, whose bias is
    multiplied by a mask: 0 for the keys.
    """
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if name == "rope_embed.periods":
            _check_periods(tensor, tensors["cls_token"].shape[-1], num_heads)
        elif match := QKV.fullmatch(name):
            renamed |= _split(f"layer.{match[1]}.attention", match[2], tensor)
        else:
            new = next((p.sub(to, name) for p, to in DINOV3_HUB if p.fullmatch(name)), name)
            renamed[new] = tensor[None] if name == "mask_token" else tensor
    return renamed


def _split(path: str, what: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """Split one tensor of a fused layer; a mask becomes nothing."""
    q, k, v = np.split(tensor, 3)
    if what == "weight":
        return {f"{path}.{x}_proj.weight": part for x, part in zip("qkv", (q, k, v), strict=True)}
    if what == "bias":
        return {f"{path}.q_proj.bias": q, f"{path}.v_proj.bias": v}
    if not (np.all(q == 1) and np.all(k == 0) and np.all(v == 1)):
        raise ConversionError(
            f"{path}: its bias_mask is not 1 for queries and values and 0 for keys, as in every "
            "released DINOv3; such a network is not built here"
        )
    return {}


def _check_periods(periods: np.ndarray, width: int, num_heads: int) -> None:
    if (heads := width // (4 * len(periods))) != num_heads:
        raise ConversionError(
            f"rope_embed.periods are {len(periods)}, of {heads} heads, but the config has "
            f"{num_heads}; pass --config.backbone.dinov3.num_attention_heads={heads}"
        )
    expected = ROPE_BASE ** (np.arange(len(periods)) / len(periods))
    if not np.allclose(periods.astype(np.float32), expected, rtol=1e-2):  # files may be in bf16
        raise ConversionError(
            f"rope_embed.periods are {periods.tolist()}, not those of base {ROPE_BASE:g}, as in "
            "every released DINOv3; such a network is not built here"
        )
