"""The autoencoder of LDM, LightningDiT and VA-VAE: names and sizes.

A released state dict of the complete autoencoder serves both halves: each ignores the tensors of
the other, and those of the losses that LDM trains with.
"""

from collections.abc import Mapping

from gae_jax.nn.torch_names import Row, Shapes, Table, biased, depth_of, norm, unused
from gae_jax.tokenizers.conv import ConvTokenizer
from gae_jax.tokenizers.conv_vae import ConvDecoder, ConvEncoder
from gae_jax.tokenizers.kind import Counterpart

LEVELS = 8  # resolutions that the tables have rows for


def _conv(name: str) -> tuple[Row, ...]:
    return biased(name, transform="conv")


def _resnet_block(name: str) -> tuple[Row, ...]:
    return (
        *(row for x in ("norm1", "norm2") for row in norm(f"{name}.{x}", weight="scale")),
        *(row for x in ("conv1", "conv2", "nin_shortcut") for row in _conv(f"{name}.{x}")),
    )


def _attn_block(name: str) -> tuple[Row, ...]:
    layers = (row for x in ("q", "k", "v", "proj_out") for row in _conv(f"{name}.{x}"))
    return (*norm(f"{name}.norm", weight="scale"), *layers)


def _half(root: str, levels: str, resample: str) -> tuple[Row, ...]:
    """Return the rows of the encoder or the decoder."""
    return (
        *_conv(f"{root}.conv_in"),
        *(
            row
            for level in (f"{root}.{levels}.{number}" for number in range(LEVELS))
            for row in (
                *_resnet_block(f"{level}.block.{{n}}"),
                *_attn_block(f"{level}.attn.{{n}}"),
                *_conv(f"{level}.{resample}.conv"),
            )
        ),
        *_resnet_block(f"{root}.mid.block_{{n}}"),
        *_attn_block(f"{root}.mid.attn_1"),
        *norm(f"{root}.norm_out", weight="scale"),
        *_conv(f"{root}.conv_out"),
    )


ENCODER = Table(
    ConvEncoder,
    (
        *_half("encoder", "down", "downsample"),
        *_conv("quant_conv"),
        *unused("decoder.*", "post_quant_conv.*", "loss.*"),
    ),
)

DECODER = Table(
    ConvDecoder,
    (
        *_conv("post_quant_conv"),
        *_half("decoder", "up", "upsample"),
        *unused("encoder.*", "quant_conv.*", "loss.*"),
    ),
)


def _inside(table: Table, name: str) -> tuple[Row, ...]:
    """Return the rows of a module that another one holds under a name."""
    return tuple(
        row._replace(ours=f"{name}.{row.ours}") for row in table.rows if row.transform != "unused"
    )


# A training of LDM or VA-VAE: the foundation model and the projection on it are ignored
AUTOENCODER = Table(
    ConvTokenizer,
    (
        *_inside(ENCODER, "encoder"),
        *_inside(DECODER, "decoder"),
        *unused("loss.*", "linear_proj.*", "foundation_model.*"),
    ),
)


def read_sizes(shapes: Shapes, section: Mapping) -> dict:
    """Read the sizes of an autoencoder with LDM's names."""
    width = shapes["encoder.conv_in.weight"][0]
    levels = range(depth_of(shapes, "encoder.down"))
    blocks = depth_of(shapes, "encoder.down.0.block")
    return dict(
        ch=width,
        ch_mult=tuple(
            shapes[f"encoder.down.{i}.block.{blocks - 1}.conv2.weight"][0] // width for i in levels
        ),
        num_res_blocks=blocks,
        attn_resolutions=tuple(
            section["resolution"] // 2**i
            for i in levels
            if f"encoder.down.{i}.attn.0.q.weight" in shapes
        ),
        z_channels=shapes["decoder.conv_in.weight"][1],
        embed_dim=shapes["post_quant_conv.weight"][1],
    )


COUNTERPART = Counterpart(table=AUTOENCODER, entry="state_dict", read_sizes=read_sizes)
