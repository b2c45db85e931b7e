"""Tables of the convolutional autoencoder; `gae_jax.interop.tables` explains rows.

A released state dict of the whole autoencoder serves both halves: each leaves aside the tensors
of the other, and those of the losses that LDM trains with.
"""

from gae_jax.interop.tables import Row, Table
from gae_jax.models import conv_vae

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
