"""The Geometric Autoencoder as the pipeline knows it; its section is ``tokenizer.model``."""

from gae_jax.tokenizers.kind import Kind

# Backbones of the paper's Table 8, as arguments of `GAE`.
SIZES = {
    "S": dict(embed_dim=384, num_layers=12, num_heads=6),
    "B": dict(embed_dim=768, num_layers=12, num_heads=12),
    "L": dict(embed_dim=1024, num_layers=24, num_heads=16),
}
BOTTLENECKS = ("norm", "kl")


def sizes() -> dict:
    """Return the sizes of GAE-L at 256 pixels, f16 d32."""
    return dict(
        image_size=256,
        patch_size=16,
        embed_dim=1024,
        num_layers=24,
        num_heads=16,
        num_kv_heads=0,  # 0: as many as num_heads
        mlp_ratio=4.0,
        latent_dim=32,  # [paper]
        bottleneck="norm",  # norm: RMSNorm of every token | kl: the baseline of table 7
        noise_std=0.2,  # [paper] C_sigma
        noise_factor=1 / 0.8,  # [code] the released code divides C_sigma by 0.8; 1.0: as written
        patch_init="fan_out",  # [code] start of the patch embedding | fan_in: a larger one
    )


def build(section, backbone, *, image_size: int, **compute):
    """Build a `GAE`; its section holds the size of the images too."""
    from gae_jax.tokenizers.gae import GAE

    del backbone, image_size
    return GAE(**section, **compute)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """Return (h, w, d) of the section."""
    del backbone, image_size
    grid = section["image_size"] // section["patch_size"]
    return grid, grid, section["latent_dim"]


def vit_problems(path: str, section, image_size: int) -> list[str]:
    """Find problems in the sizes of a ViT, whose section has the given path.

    Args:
      image_size: of the data, in pixels.
    """
    problems = []
    if section.image_size != image_size:
        problems.append(
            f"{path}.image_size is {section.image_size} but data.image_size is {image_size}; set "
            "both to the same value"
        )
    if section.image_size % section.patch_size:
        problems.append(
            f"{path}.image_size {section.image_size} is not a multiple of patch_size "
            f"{section.patch_size}"
        )
    if section.embed_dim % section.num_heads:
        problems.append(
            f"{path}.embed_dim {section.embed_dim} is not a multiple of num_heads "
            f"{section.num_heads}"
        )
    return problems


def checks(config) -> list[str]:
    """Find problems of the sizes, of the loss "kl" and of flow matching on the sphere."""
    section = config.tokenizer.model
    problems = vit_problems("tokenizer.model", section, config.data.image_size)
    bottleneck = section.bottleneck
    if config.tokenizer.losses.kl and bottleneck != "kl":
        problems.append(
            "tokenizer.losses.kl is set, but only tokenizer.model.bottleneck='kl' has a variance"
        )
    if config.diffusion.flow.geometry == "sphere" and bottleneck != "norm":
        problems.append(
            "diffusion.flow.geometry 'sphere' needs tokenizer.model.bottleneck 'norm': the "
            "latents of another lie on no sphere"
        )
    return problems


def counterpart():
    """Return FoundationEncoderModel of the released code."""
    from gae_jax.tokenizers.gae_torch import COUNTERPART

    return COUNTERPART


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=("l1", "perceptual", "gan", "align", "kl"),
    section="model",
    kernels=True,
    training_fields=("noise_std", "noise_factor"),
    start_fields=("patch_init",),
    choices={"bottleneck": BOTTLENECKS, "patch_init": ("fan_out", "fan_in")},
    checks=checks,
    torch=counterpart,
)
