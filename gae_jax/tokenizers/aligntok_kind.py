"""AlignTok as the pipeline knows it."""

from gae_jax.tokenizers.conv_kind import factor
from gae_jax.tokenizers.kind import Kind

DECODERS = ("conv", "vit")
# Layers that LoRA may update, as `nn.lora.LAYERS`.
LAYERS = ("qkv", "proj", "fc1", "gate", "fc2", "w12", "w3")


def pixels_per_token(grid: int, image_size: int, decoder: str, conv) -> int:
    """Return the edge of the square of pixels that the decoder makes of each token.

    Raises:
      ValueError: if there is no decoder of that name, or its images are not of ``image_size``.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}; use one of {', '.join(DECODERS)}")
    if decoder == "conv":
        f = factor(conv["ch_mult"], image_size)
        remedy = f"take a backbone.*.input_size that gives {image_size // f} tokens per edge"
    else:
        f, remedy = image_size // grid, "take images whose edge is a multiple of the grid's"
    if f * grid != image_size:
        raise ValueError(
            f"the backbone makes {grid} x {grid} tokens of which the decoder makes "
            f"{f * grid} x {f * grid} pixels, but data.image_size is {image_size}; {remedy}"
        )
    return f


def sizes() -> dict:
    """Return the defaults of the section ``tokenizer.aligntok``."""
    return dict(
        latent_dim=32,  # [second hand] 32 | 64
        hidden=1024,  # [ours] of the adapter, whose width and activation (here GELU) are unstated
        decoder="conv",  # [second hand] conv: VA-VAE's | vit: GAE's, a variant of ours
        conv=dict(  # [code] of VA-VAE
            ch=128,
            ch_mult=(1, 1, 2, 2, 4),
            num_res_blocks=2,
            attn_resolutions=(16,),
            resolution=256,
        ),
        vit=dict(embed_dim=1024, num_layers=24, num_heads=16, mlp_ratio=4.0),  # GAE-L's
        # [ours] all of it, for the paper says only "LoRA": the encoder stays, and products of
        # two matrices learn, of this rank and times alpha / rank. 0: the encoder itself learns
        lora=dict(rank=0, alpha=16.0, layers=LAYERS),
    )


def build(section, backbone, *, image_size, dtype, remat, attention, rngs):
    """Build an `AlignTok` around the backbone that ``backbone(rngs)`` makes."""
    from gae_jax.tokenizers.aligntok import AlignTok

    compute = dict(dtype=dtype, remat=remat, attention=attention, rngs=rngs)
    return AlignTok(backbone(rngs), **section, image_size=image_size, **compute)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """Return (h, w, d) of the latents; raises as `AlignTok`."""
    from gae_jax.nn.lora import check_lora
    from gae_jax.pretrained.backbone import backbone_shape

    grid, width = backbone_shape(backbone)
    pixels_per_token(grid, image_size, section["decoder"], section["conv"])
    check_lora(**section["lora"], width=width)
    return grid, grid, section["latent_dim"]


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=("l1", "perceptual", "gan", "align"),
    backbone="trained",
    rules=(
        (r"adapter/fc1/kernel$", ("fsdp", "tensor")),
        (r"adapter/fc2/kernel$", ("tensor", "fsdp")),
    ),
)
