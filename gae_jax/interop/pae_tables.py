"""Tables of PAE and of the decoder that it shares with RAE, by the names of the released modules.

A released checkpoint of PAE holds the frozen encoder too (``encoder.*``); that is left aside here
and imported by a table of its own.
"""

from gae_jax.interop.tables import Row, Table
from gae_jax.tokenizers.mae_decoder import GeneralDecoder
from gae_jax.tokenizers.pae_modulator import DeltaEncoder
from gae_jax.tokenizers.pae_networks import PAE, Bottleneck

_PARTS = (("q", "query"), ("k", "key"), ("v", "value"))


def _both(torch: str, ours: str | None = None, weight: str = "linear") -> tuple[Row, ...]:
    """Weight and bias of a Linear layer or, with "conv", of a convolution."""
    ours = ours or torch
    return (
        Row(f"{torch}.weight", f"{ours}.kernel", weight),
        Row(f"{torch}.bias", f"{ours}.bias", "same"),
    )


def _norms(*names: tuple[str, str]) -> tuple[Row, ...]:
    return tuple(
        Row(f"{torch}.{x}", f"{ours}.{x}", "same")
        for torch, ours in names
        for x in ("weight", "bias")
    )


def _delta(prefix: str = "") -> tuple[Row, ...]:
    """Of the modulator, whose names have the prefix."""
    layer = f"{prefix}layers.{{n}}"
    names = [f"{layer}.{name}" for name in ("norm1", "norm2_q", "norm2_kv", "norm3")]
    linear = ("self_attn.qkv", "self_attn.proj", "mlp.fc1", "mlp.fc2")
    cross = [f"cross_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")]
    return (
        *_both(f"{prefix}patch_embed.proj", f"{prefix}patch_embed", "conv"),
        Row(f"{prefix}pos_embed", f"{prefix}pos_embed", "same"),
        *(row for name in (*linear, *cross) for row in _both(f"{layer}.{name}")),
        *_norms(*((name, name) for name in names)),
        *_both(f"{prefix}fusion_proj"),
        *_norms((f"{prefix}final_ln", f"{prefix}final_ln")),
    )


def _decoder(prefix: str = "") -> tuple[Row, ...]:
    """Of the decoder, whose names have the prefix."""
    layer = f"{prefix}decoder_layers.{{n}}"
    return (
        *_both(f"{prefix}decoder_embed"),
        Row(f"{prefix}trainable_cls_token", f"{prefix}trainable_cls_token", "same"),
        Row(f"{prefix}decoder_pos_embed", f"{prefix}decoder_pos_embed", "same"),
        *(
            Row(f"{layer}.attention.attention.{name}.{x}", f"{layer}.attn.qkv.{y}", f"{how}_{part}")
            for part, name in _PARTS
            for x, y, how in (("weight", "kernel", "linear"), ("bias", "bias", "same"))
        ),
        *_both(f"{layer}.attention.output.dense", f"{layer}.attn.proj"),
        *_both(f"{layer}.intermediate.dense", f"{layer}.mlp.fc1"),
        *_both(f"{layer}.output.dense", f"{layer}.mlp.fc2"),
        *_norms(
            (f"{layer}.layernorm_before", f"{layer}.norm1"),
            (f"{layer}.layernorm_after", f"{layer}.norm2"),
            (f"{prefix}decoder_norm", f"{prefix}decoder_norm"),
        ),
        *_both(f"{prefix}decoder_pred"),
    )


_BOTTLENECK = (
    *(
        row
        for name in ("latent_compressor.0", "latent_decompressor.1")
        for row in (
            Row(f"{name}.qkv.weight", f"{name}.qkv.kernel", "linear"),
            *_both(f"{name}.proj"),
        )
    ),
    *_both("latent_compressor.1", weight="conv"),
    *_both("latent_decompressor.0", weight="conv"),
)

DELTA_ENCODER = Table(DeltaEncoder, _delta())
BOTTLENECK = Table(Bottleneck, _BOTTLENECK)
DECODER = Table(GeneralDecoder, _decoder())
PAE_MODEL = Table(
    PAE,
    (
        *_delta("delta_encoder."),
        *_BOTTLENECK,
        *_decoder("decoder."),
        Row("encoder.*", "", "unused"),
    ),
)
