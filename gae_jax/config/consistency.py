"""Networks that must fit the images and each other."""

from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.pretrained.efficientnet import EFFICIENTNET_WIDTHS
from gae_jax.tokenizers import aligns, section_of
from gae_jax.tokenizers.gae_kind import vit_problems


def image_clashes(config) -> list[str]:
    """List the problems of the sizes of the backbone, alone with its images."""
    kind = config.backbone.name
    backbone = config.backbone[kind]
    if kind == "vit":
        return vit_problems("backbone.vit", backbone, config.data.image_size)
    if kind == "efficientnet_lite0":
        return efficientnet_clashes(backbone)
    return vision_encoder_clashes(kind, backbone)


def vision_encoder_clashes(kind: str, section) -> list[str]:
    """List the problems of the section of a released encoder."""
    problems, path = [], f"backbone.{kind}"
    sizes = {"input_size": section.input_size, "image_size": section.get("image_size", 0)}
    for name, pixels in sizes.items():
        if pixels % section.patch_size:
            nearest = max(1, round(pixels / section.patch_size)) * section.patch_size
            problems.append(
                f"{path}.{name} {pixels} is not a multiple of patch_size {section.patch_size}; "
                f"take {nearest}"
            )
    # DINOv3 rotates the channels of a head in four parts
    parts = section.num_attention_heads * (4 if kind == "dinov3" else 1)
    if section.hidden_size % parts:
        problems.append(
            f"{path}.hidden_size {section.hidden_size} is not a multiple of {parts}, which "
            f"num_attention_heads {section.num_attention_heads} asks for; change one of the two"
        )
    return problems


def efficientnet_clashes(section) -> list[str]:
    """List the problems of the section of EfficientNet-Lite0."""
    path, strides = "backbone.efficientnet_lite0", tuple(section.strides)
    if not strides or set(strides) - set(EFFICIENTNET_WIDTHS):
        known = ", ".join(map(str, EFFICIENTNET_WIDTHS))
        return [f"{path}.strides is {strides}; give one or more of {known}"]
    if section.input_size < 32 or section.input_size % 32:
        nearest = max(1, round(section.input_size / 32)) * 32
        return [f"{path}.input_size {section.input_size} is not a multiple of 32; take {nearest}"]
    return []


def alignment_clashes(config, grid: int, latent_dim: int) -> list[str]:
    """What keeps backbone, teacher and tokenizer from being compared token by token.

    Args:
      grid: edge of the tokenizer's grid of tokens.
      latent_dim: channels of its latents.
    """
    kind, teacher, problems = config.backbone.name, config.teacher.model, []
    backbone_grid, _ = backbone_shape(config.backbone)
    section = section_of(config.tokenizer)
    aligned, by_teacher = aligns(config.tokenizer)
    if by_teacher and teacher.latent_dim != latent_dim:
        problems.append(
            f"teacher.model.latent_dim {teacher.latent_dim} and tokenizer.{section}.latent_dim "
            f"{latent_dim} must be equal: the tokenizer's latents are aligned with the teacher's"
        )
    if aligned and backbone_grid != grid:
        problems.append(
            f"the backbone (backbone.{kind}) gives {backbone_grid} x {backbone_grid} tokens, "
            f"tokenizer.{section} {grid} x {grid}; they must be equal: latents and features are "
            "aligned token by token"
        )
    return problems
