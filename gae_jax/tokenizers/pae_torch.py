"""The released modules of PAE and of the decoder that it shares with RAE: names and sizes.

A released checkpoint of PAE holds the frozen encoder too (``encoder.*``); it is ignored here and
imported by a table of its own.
"""

from collections.abc import Mapping

from gae_jax.nn.torch_names import (
    Heads,
    Row,
    Shapes,
    Table,
    biased,
    depth_of,
    edge_of,
    norm,
    published,
    unused,
)
from gae_jax.pretrained import dinov2
from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.tokenizers.kind import Counterpart
from gae_jax.tokenizers.mae_decoder import GeneralDecoder
from gae_jax.tokenizers.pae_kind import TRAINING
from gae_jax.tokenizers.pae_networks import PAE
from gae_jax.tokenizers.rae_kind import DECODERS

_PARTS = (("q", "query"), ("k", "key"), ("v", "value"))


def _delta(prefix: str) -> tuple[Row, ...]:
    """Return the rows of the modulator, whose names have the prefix."""
    layer = f"{prefix}layers.{{n}}"
    names = [f"{layer}.{name}" for name in ("norm1", "norm2_q", "norm2_kv", "norm3")]
    linear = ("self_attn.qkv", "self_attn.proj", "mlp.fc1", "mlp.fc2")
    cross = [f"cross_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")]
    return (
        *biased(f"{prefix}patch_embed.proj", f"{prefix}patch_embed", "conv"),
        Row(f"{prefix}pos_embed", f"{prefix}pos_embed", "same"),
        *(row for name in (*linear, *cross) for row in biased(f"{layer}.{name}")),
        *(row for name in names for row in norm(name)),
        *biased(f"{prefix}fusion_proj"),
        *norm(f"{prefix}final_ln"),
    )


def _decoder(prefix: str = "") -> tuple[Row, ...]:
    """Return the rows of the decoder, whose names have the prefix."""
    layer = f"{prefix}decoder_layers.{{n}}"
    return (
        *biased(f"{prefix}decoder_embed"),
        Row(f"{prefix}trainable_cls_token", f"{prefix}trainable_cls_token", "same"),
        Row(f"{prefix}decoder_pos_embed", f"{prefix}decoder_pos_embed", "same"),
        *(
            Row(f"{layer}.attention.attention.{name}.{x}", f"{layer}.attn.qkv.{y}", f"{how}_{part}")
            for part, name in _PARTS
            for x, y, how in (("weight", "kernel", "linear"), ("bias", "bias", "same"))
        ),
        *biased(f"{layer}.attention.output.dense", f"{layer}.attn.proj"),
        *biased(f"{layer}.intermediate.dense", f"{layer}.mlp.fc1"),
        *biased(f"{layer}.output.dense", f"{layer}.mlp.fc2"),
        *norm(f"{layer}.layernorm_before", f"{layer}.norm1"),
        *norm(f"{layer}.layernorm_after", f"{layer}.norm2"),
        *norm(f"{prefix}decoder_norm"),
        *biased(f"{prefix}decoder_pred"),
    )


_BOTTLENECK = (
    *(
        row
        for name in ("latent_compressor.0", "latent_decompressor.1")
        for row in (
            Row(f"{name}.qkv.weight", f"{name}.qkv.kernel", "linear"),
            *biased(f"{name}.proj"),
        )
    ),
    *biased("latent_compressor.1", transform="conv"),
    *biased("latent_decompressor.0", transform="conv"),
)

DECODER = Table(GeneralDecoder, _decoder())
PAE_MODEL = Table(
    PAE,
    (
        *_delta("delta_encoder."),
        *_BOTTLENECK,
        *_decoder("decoder."),
        *unused("encoder.*"),
    ),
)


def _read_pae(shapes: Shapes, section: Mapping) -> dict:
    del section
    width, _, _, _ = shapes["latent_decompressor.0.weight"]
    fused = shapes.get("delta_encoder.fusion_proj.weight")
    modes: dict[tuple[int, ...], str] = {
        (2 * width, width): "sft",
        (width, width): "add",
        (width, 2 * width): "concat",
    }
    return dict(
        width=width,
        delta_depth=depth_of(shapes, "delta_encoder.layers"),
        fusion_mode=modes[fused] if fused else "none",
        latent_dim=shapes["latent_compressor.1.weight"][0],
        **_mae_decoder(shapes, "decoder."),
        decoder_patch_size=edge_of(shapes["decoder.decoder_pred.weight"][0] // 3),
    )


def _mae_decoder(shapes: Shapes, prefix: str = "") -> dict:
    """Read the sizes of the decoder that PAE and RAE share."""
    layers = f"{prefix}decoder_layers"
    return dict(
        decoder_hidden_size=shapes[f"{prefix}decoder_embed.weight"][0],
        decoder_num_hidden_layers=depth_of(shapes, layers),
        decoder_intermediate_size=shapes[f"{layers}.0.intermediate.dense.weight"][0],
    )


def _read_rae(shapes: Shapes, section: Mapping) -> dict:
    del section
    patch = edge_of(shapes["decoder_pred.weight"][0] // 3)
    return dict(patch_size=patch, **_mae_decoder(shapes))


def _pae_arguments(section: Mapping, backbone: Mapping, image_size: int) -> dict:
    """Return the arguments of the released `PAE` for sections of tokenizer and backbone."""
    del image_size
    sizes = {name: section[name] for name in section if name not in TRAINING}
    grid, width = backbone_shape(backbone)
    model = backbone[backbone["name"]]
    return dict(
        hidden_size=width,
        encoder_input_size=grid * model["patch_size"],
        encoder_patch_size=model["patch_size"],
        **sizes,
    )


def _rae_arguments(section: Mapping, backbone: Mapping, image_size: int) -> dict:
    """Return the arguments of the released decoder for sections of tokenizer and backbone."""
    sizes = {name: section[name] for name in section if not name.startswith("noise")}
    return dict(hidden_size=backbone_shape(backbone)[1], image_size=image_size, **sizes)


_DECODER_HEADS = Heads(
    "decoder_num_attention_heads",
    "decoder_hidden_size",
    published(DECODERS, "decoder_hidden_size", "decoder_num_attention_heads"),
)
_DINOV2 = published(dinov2.PRESETS, "hidden_size", "num_attention_heads")
PAE_COUNTERPART = Counterpart(
    table=PAE_MODEL,
    entry="model",
    read_sizes=_read_pae,
    heads=(Heads("num_heads", "", _DINOV2), _DECODER_HEADS),
    key="pae",
    arguments=_pae_arguments,
)
RAE_COUNTERPART = Counterpart(
    table=DECODER,  # everything that learns
    entry="model",
    read_sizes=_read_rae,
    heads=(_DECODER_HEADS,),
    key="decoder",
    arguments=_rae_arguments,
)
