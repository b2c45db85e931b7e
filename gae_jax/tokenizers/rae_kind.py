"""RAE as the pipeline knows it, and the sizes of its decoder, which PAE shares."""

from gae_jax.tokenizers.kind import Kind

# How the std of an image's noise is sampled: tau * U(0, 1), or |N(0, tau^2)|.
NOISES = ("uniform", "half_normal")
# The released decoders, as arguments of `GeneralDecoder`.
DECODERS = {
    "B": dict(
        decoder_hidden_size=768,
        decoder_num_hidden_layers=12,
        decoder_num_attention_heads=12,
        decoder_intermediate_size=3072,
    ),
    "L": dict(
        decoder_hidden_size=1024,
        decoder_num_hidden_layers=24,
        decoder_num_attention_heads=16,
        decoder_intermediate_size=4096,
    ),
    "XL": dict(
        decoder_hidden_size=1152,
        decoder_num_hidden_layers=28,
        decoder_num_attention_heads=16,
        decoder_intermediate_size=4096,
    ),
}
# Of modulator and bottleneck (PAE), and of the decoder.
RULES = (
    (r"(cross_attn/[qkv]_proj|latent_(de)?compressor/\d/qkv)/kernel$", ("fsdp", "tensor")),
    (r"latent_(compressor/0|decompressor/1)/proj/kernel$", ("tensor", "fsdp")),
    (r"(fusion_proj|decoder_embed|decoder_pred)/kernel$", ("fsdp", None)),
    (r"latent_compressor/1/kernel$", (None, None, "fsdp", None)),
    (r"latent_decompressor/0/kernel$", (None, None, None, "fsdp")),
)


def sizes() -> dict:
    """Return ViT-XL decoder and noise of the released code."""
    return dict(
        patch_size=16,  # [code] 32 with a backbone of half the grid: "decoder upsampling"
        **DECODERS["XL"],  # [code]
        noise_tau=0.8,  # [paper]
        # law of the noise's std. [code] uniform: tau U(0, 1) | [paper] half_normal
        noise="uniform",
    )


def build(section, backbone, **compute):
    """Build a `RAE`."""
    from gae_jax.tokenizers.rae import RAE

    return RAE(**section, backbone=backbone, **compute)


def latent_shape(section, backbone, image_size) -> tuple[int, int, int]:
    """Return (h, w, d): the backbone's grid and width."""
    from gae_jax.pretrained.backbone import backbone_shape

    del section, image_size
    grid, width = backbone_shape(backbone)
    return grid, grid, width


def counterpart():
    """Return the released decoder."""
    from gae_jax.tokenizers.pae_torch import RAE_COUNTERPART

    return RAE_COUNTERPART


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=("l1", "perceptual", "gan"),
    backbone="frozen",
    training_fields=("noise", "noise_tau"),
    choices={"noise": NOISES},
    rules=RULES,
    torch=counterpart,
)
