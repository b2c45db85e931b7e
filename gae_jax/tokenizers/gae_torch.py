"""The released autoencoder of GAE, FoundationEncoderModel: names, sizes and arguments."""

from collections.abc import Mapping

from gae_jax.nn.torch_names import (
    Heads,
    Row,
    Shapes,
    Table,
    depth_of,
    edge_of,
    linear,
    published,
    same,
    unused,
)
from gae_jax.tokenizers.gae import GAE
from gae_jax.tokenizers.gae_kind import SIZES, latent_shape
from gae_jax.tokenizers.kind import Counterpart


def vit_blocks(prefix: str) -> tuple[Row, ...]:
    """Return the rows of the blocks of GAE's transformers."""
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.gate", "mlp.fc2")
    return linear(*(f"{prefix}.{{n}}.{layer}" for layer in layers))


TABLE = Table(
    GAE,
    (
        Row(
            "foundation_encoder.patch_embed.weight",
            "foundation_encoder.patch_embed.kernel",
            "conv",
        ),
        *same("foundation_encoder.pos_embed"),
        *vit_blocks("foundation_encoder.blocks"),
        *linear("foundation_encoder.proj_out", "adapter.model", "decoder.z_proj"),
        *same("decoder.pos_embed"),
        *vit_blocks("decoder.blocks"),
        *linear("decoder.linear_out"),
        *unused("loss.*"),  # discriminator and LPIPS of a training's file
    ),
)


def read_sizes(shapes: Shapes, section: Mapping) -> dict:
    """Read the sizes that the shapes of a file's tensors show."""
    width, _, _, patch = shapes["foundation_encoder.patch_embed.weight"]
    # the projector's rows: d means, or d means and d log-variances
    per_channel = 2 if section.get("bottleneck") == "kl" else 1
    sizes = dict(
        embed_dim=width,
        patch_size=patch,
        image_size=edge_of(shapes["foundation_encoder.pos_embed"][1]) * patch,
        num_layers=depth_of(shapes, "foundation_encoder.blocks"),
        latent_dim=shapes["adapter.model.weight"][0] // per_channel,
    )
    return sizes


def kv_heads(shapes: Shapes, section: Mapping, heads: int | None) -> dict:
    """Read the heads of keys and values of GAE, which are as wide as those of queries."""
    qkv = shapes.get("foundation_encoder.blocks.0.attn.qkv.weight")
    if not (qkv and heads and qkv[1] % heads == 0):
        return {}
    kv_heads = (qkv[0] - qkv[1]) // 2 * heads // qkv[1]
    asked = section["num_kv_heads"]
    return {"num_kv_heads": asked if kv_heads == heads and asked in (0, heads) else kv_heads}


def arguments_of_class(model: Mapping) -> dict:
    """Return the arguments of tokenizer.gae.FoundationEncoderModel."""
    vit = dict(
        embed_dim=model["embed_dim"],
        num_layers=model["num_layers"],
        num_heads=model["num_heads"],
        num_kv_heads=model["num_kv_heads"] or None,
        mlp_ratio=model["mlp_ratio"],
    )
    grid, _, channels = latent_shape(model, None, model["image_size"])
    kl = model.get("bottleneck") == "kl"
    encoder = dict(
        img_size=model["image_size"],
        patch_size=model["patch_size"],
        out_ch=model["embed_dim"],
        **vit,
    )
    return dict(
        target="tokenizer.gae.FoundationEncoderModel",
        params=dict(
            encoder_config=dict(target="tokenizer.utils.decoder.ViTEncoder", params=encoder),
            adapter_config=dict(
                target="tokenizer.utils.encoder.adapter.Adapter",
                params=dict(
                    in_channels=model["embed_dim"], out_channels=2 * channels if kl else channels
                ),
            ),
            ddconfig=dict(
                input_resolution=grid,
                resolution=model["image_size"],
                out_ch=3,
                z_channels=channels,
                **vit,
            ),
            lossconfig=None,
            use_sigma_vae=not kl,  # otherwise it takes a diagonal Gaussian
            sigma_std=model["noise_std"],
            use_norm=not kl,
            align_type="mid",
            latent_dim=channels,
            encoder_channels=model["embed_dim"],
        ),
    )


def sizes_of_class(params: Mapping) -> dict:
    """Return the section tokenizer.model from the arguments of the released class."""
    encoder = params["encoder_config"]["params"]
    return dict(
        image_size=encoder["img_size"],
        patch_size=encoder["patch_size"],
        embed_dim=encoder["embed_dim"],
        num_layers=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        num_kv_heads=encoder["num_kv_heads"] or 0,
        mlp_ratio=encoder["mlp_ratio"],
        latent_dim=params["latent_dim"],
        bottleneck="norm" if params["use_sigma_vae"] else "kl",
        noise_std=params["sigma_std"],
    )


COUNTERPART = Counterpart(
    table=TABLE,
    entry="state_dict",
    read_sizes=read_sizes,
    heads=(Heads("num_heads", "embed_dim", published(SIZES, "embed_dim", "num_heads")),),
    kv_heads=kv_heads,
    describe=arguments_of_class,
    described_heads=("tokenizer", "params", "encoder_config", "params", "num_heads"),
)
