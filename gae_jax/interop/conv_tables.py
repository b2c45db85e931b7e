"""Tables of the convolutional autoencoder and ADM's U-Net; `gae_jax.interop.tables` explains rows.

A released state dict of the whole autoencoder serves both halves: each leaves aside the tensors
of the other, and those of the losses that LDM trains with.
"""

from gae_jax.interop.tables import Row, Table
from gae_jax.tokenizers import conv_vae
from gae_jax.tokenizers import dgae_unet as adm_unet
from gae_jax.tokenizers.conv import ConvTokenizer

LEVELS = 8  # resolutions that the tables of the autoencoder have rows for


def _layer(name: str, transform: str = "conv") -> tuple[Row, ...]:
    """A convolution, or Linear with "linear", that both sides call the same.

    "linear" is also right for a convolution along one axis: it reverses all of them.
    """
    return (
        Row(f"{name}.weight", f"{name}.kernel", transform),
        Row(f"{name}.bias", f"{name}.bias", "same"),
    )


def _norm(name: str) -> tuple[Row, ...]:
    return (
        Row(f"{name}.weight", f"{name}.scale", "same"),
        Row(f"{name}.bias", f"{name}.bias", "same"),
    )


def _resnet_block(name: str) -> tuple[Row, ...]:
    return (
        *(row for x in ("norm1", "norm2") for row in _norm(f"{name}.{x}")),
        *(row for x in ("conv1", "conv2", "nin_shortcut") for row in _layer(f"{name}.{x}")),
    )


def _attn_block(name: str) -> tuple[Row, ...]:
    layers = (row for x in ("q", "k", "v", "proj_out") for row in _layer(f"{name}.{x}"))
    return (*_norm(f"{name}.norm"), *layers)


def _half(root: str, levels: str, resample: str) -> tuple[Row, ...]:
    """Encoder or decoder."""
    return (
        *_layer(f"{root}.conv_in"),
        *(
            row
            for level in (f"{root}.{levels}.{number}" for number in range(LEVELS))
            for row in (
                *_resnet_block(f"{level}.block.{{n}}"),
                *_attn_block(f"{level}.attn.{{n}}"),
                *_layer(f"{level}.{resample}.conv"),
            )
        ),
        *_resnet_block(f"{root}.mid.block_{{n}}"),
        *_attn_block(f"{root}.mid.attn_1"),
        *_norm(f"{root}.norm_out"),
        *_layer(f"{root}.conv_out"),
    )


def _unused(*patterns: str) -> tuple[Row, ...]:
    return tuple(Row(pattern, "", "unused") for pattern in patterns)


ENCODER = Table(
    conv_vae.ConvEncoder,
    (
        *_half("encoder", "down", "downsample"),
        *_layer("quant_conv"),
        *_unused("decoder.*", "post_quant_conv.*", "loss.*"),
    ),
)

DECODER = Table(
    conv_vae.ConvDecoder,
    (
        *_layer("post_quant_conv"),
        *_half("decoder", "up", "upsample"),
        *_unused("encoder.*", "quant_conv.*", "loss.*"),
    ),
)


def _inside(table: Table, name: str) -> tuple[Row, ...]:
    """The rows of a module that another one holds under a name."""
    return tuple(
        row._replace(ours=f"{name}.{row.ours}") for row in table.rows if row.transform != "unused"
    )


# The whole of LDM's or VA-VAE's training: the foundation model and the projection on it left aside
AUTOENCODER = Table(
    ConvTokenizer,
    (
        *_inside(ENCODER, "encoder"),
        *_inside(DECODER, "decoder"),
        *_unused("loss.*", "linear_proj.*", "foundation_model.*"),
    ),
)


def _res_block(name: str) -> tuple[Row, ...]:
    return (
        *_norm(f"{name}.in_layers.0"),
        *_layer(f"{name}.in_layers.2"),
        *_layer(f"{name}.emb_layers.1", "linear"),
        *_norm(f"{name}.out_layers.0"),
        *_layer(f"{name}.out_layers.3"),
        *_layer(f"{name}.skip_connection"),
    )


def _attention_block(name: str) -> tuple[Row, ...]:
    return (
        *_norm(f"{name}.norm"),
        *_layer(f"{name}.qkv", "linear"),
        *_layer(f"{name}.proj_out", "linear"),
    )


UNET = Table(
    adm_unet.UNetModel,
    (
        *_layer("time_embed.{n}", "linear"),
        *_layer("input_blocks.0.0"),
        *_res_block("input_blocks.{n}.0"),
        *_attention_block("input_blocks.{n}.1"),
        *_layer("input_blocks.{n}.0.op"),
        *_res_block("middle_block.{n}"),
        *_attention_block("middle_block.1"),
        # what resamples comes last, behind the attention if there is any
        *(row for place in range(3) for row in _res_block(f"output_blocks.{{n}}.{place}")),
        *_attention_block("output_blocks.{n}.1"),
        *(row for place in (1, 2) for row in _layer(f"output_blocks.{{n}}.{place}.conv")),
        *_norm("out.0"),
        *_layer("out.2"),
    ),
)
