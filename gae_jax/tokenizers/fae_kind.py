"""FAE as the pipeline knows it."""

from gae_jax.tokenizers.kind import Kind

MODES = ("features", "noisy_features", "restored_features")
ENCODERS = ("attention", "linear")


def sizes() -> dict:
    """Return the paper's sizes, on DINOv2-g. [inferred]: from its parameter counts."""
    return dict(
        latent_dim=32,  # [paper] 32 in the main results; 48 and 64 were tried
        encoder="attention",  # [paper] attention | linear, an arm of its ablation
        encoder_heads=24,  # [paper]
        encoder_head_dim=256,  # [inferred] wider than the tokens
        decoder_depth=6,  # [paper]
        decoder_heads=24,  # [inferred]
        decoder_hidden=4096,  # [inferred]
        pixel_dim=1024,  # [paper] ViT-L
        pixel_depth=24,  # [paper]
        pixel_heads=16,  # [paper]
        pixel_hidden=2736,  # [inferred]
        noise_std=0.4,  # [paper] for DINOv2; by the features' norm for other backbones
    )


def build(section, backbone, **compute):
    """Build a `FAE`."""
    from gae_jax.tokenizers.fae import FAE

    return FAE(**section, backbone=backbone, **compute)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """Return (h, w, d): the backbone's grid."""
    from gae_jax.pretrained.backbone import backbone_shape

    del image_size
    grid = backbone_shape(backbone)[0]
    return grid, grid, section["latent_dim"]


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=("features", "kl", "l1", "perceptual", "gan"),
    backbone="frozen",
    modes=MODES,
    training_fields=("noise_std",),
    choices={"encoder": ENCODERS},
    rules=(
        (r"encoder/(qkv|skip)/kernel$", ("fsdp", "tensor")),
        (r"encoder/moments/kernel$", ("tensor", "fsdp")),
        (r"encoder/kernel$", ("fsdp", None)),
    ),
)
