"""PAE as the pipeline knows it."""

from gae_jax.tokenizers.kind import Kind
from gae_jax.tokenizers.rae_kind import DECODERS, RULES

TERMS = ("l1", "perceptual", "gan", "align", "structure", "semantics", "continuity")
# Fields of the section that only training reads; `pae_networks.PAE` does not have them.
TRAINING = ("angles", "noise", "jitter", "detach_z")
ANGLES = (42.5, 85.0)  # degrees between a latent and its two perturbed ones, of the paper
NOISES = ("tangent", "isotropic")  # laws of the perturbation, see `perturbed`
# Which vector the sphere norm brings to mean square 1: every token, or all of an image at once.
SPHERES = ("per-token", "per-sample")
# What becomes of the pixel tokens x and the encoder's tokens u; W is a Linear layer.
FUSIONS = (
    "sft",  # LN(u * (1 + gamma) + beta) with [gamma | beta] = W x, W zero at the start
    "add",  # LN(u + W x), W zero at the start
    "concat",  # LN(W [u | x])
    "none",  # x
)


def check_image_size(grid: int, patch_size: int, image_size: int) -> None:
    """Raise ValueError unless patches on the backbone's grid make images of that size."""
    if grid * patch_size != image_size:
        raise ValueError(
            f"decoder_patch_size {patch_size} on the backbone's grid of {grid} x {grid} tokens "
            f"makes images of {grid * patch_size} pixels, but data.image_size is {image_size}"
        )


def sizes() -> dict:
    """Return PAE's sizes over DINOv2-L, f16 d32; read in the released code, not in the paper."""
    return dict(
        num_heads=16,  # [code] of modulator and bottleneck: as many as the backbone's
        delta_depth=6,  # [second hand] K, layers of the modulator
        fusion_mode="sft",  # [code] sft | add | concat | none
        latent_dim=32,  # [code]
        sphere="per-token",  # [code] per-token | per-sample
        decoder_patch_size=16,  # [code]
        **DECODERS["L"],  # [code] all released PAEs have it
        angles=ANGLES,  # [second hand] degrees, of MCR
        noise="tangent",  # [ours] tangent, of just these angles | isotropic, of about these
        jitter=0.0,  # [ours] an image's angles are multiplied by one number in [1 - jitter, 1]
        detach_z=False,  # [ours] MCR teaches the encoder too
    )


def build(section, backbone, *, image_size: int, dtype, remat, attention, rngs):
    """Build a `PAETokenizer` on a backbone that it owns."""
    from gae_jax.tokenizers.pae import PAETokenizer

    compute = dict(dtype=dtype, remat=remat, attention=attention)
    return PAETokenizer(backbone(rngs), image_size=image_size, **section, **compute, rngs=rngs)


def latent_shape(section, backbone, image_size: int) -> tuple[int, int, int]:
    """Return (h, w, d): the backbone's grid.

    Raises:
      ValueError: if the decoder makes images of another size.
    """
    from gae_jax.pretrained.backbone import backbone_shape

    grid = backbone_shape(backbone)[0]
    check_image_size(grid, section["decoder_patch_size"], image_size)
    return grid, grid, section["latent_dim"]


def checks(config) -> list[str]:
    """Find problems of backbone and angles, and of heads of a projector from the teacher."""
    section, problems = config.tokenizer.pae, []
    if config.backbone.name == "efficientnet_lite0":
        problems.append(
            "backbone.name is 'efficientnet_lite0', but PAE's modulator needs the patches of a "
            "ViT; use dinov2, dinov3, mae, siglip or vit"
        )
    if len(section.angles) != 2 or not section.angles[0] < section.angles[1]:
        problems.append(
            f"tokenizer.pae.angles is {tuple(section.angles)}; give two between 0 and 90, growing"
        )
    heads = config.teacher.model.heads, section.num_heads
    if config.tokenizer.from_teacher and heads[0] != heads[1]:
        problems.append(
            f"teacher.model.heads is {heads[0]} and tokenizer.pae.num_heads {heads[1]}; they must "
            "be equal where the projector starts from the teacher's (tokenizer.from_teacher)"
        )
    return problems


def counterpart():
    """Return the released PAE, without its frozen encoder."""
    from gae_jax.tokenizers.pae_torch import PAE_COUNTERPART

    return PAE_COUNTERPART


KIND = Kind(
    sizes=sizes,
    build=build,
    latent_shape=latent_shape,
    terms=TERMS,
    backbone="frozen",
    training_fields=TRAINING,
    choices={"fusion_mode": FUSIONS, "sphere": SPHERES, "noise": NOISES},
    checks=checks,
    rules=RULES,
    torch=counterpart,
)
