"""The section ``teacher``."""

from gae_jax import prior_target
from gae_jax.config import backbone_shape
from gae_jax.validation.fields import one_of, training_clashes


def teacher_clashes(config) -> list[str]:
    """What is wrong with the section ``teacher``, on the backbone that there is."""
    kind, teacher = config.backbone.name, config.teacher.model
    grid, width = backbone_shape(config.backbone)
    problems = one_of(
        config.teacher,
        {
            "kind": ("learned", "svd", "prior"),
            "model.downsampler": ("attention", "attention_linear", "attention_conv"),
            "prior.reference": prior_target.REFERENCES,
            "prior.low_pass": prior_target.LOW_PASSES,
        },
        "teacher",
    )
    if teacher.latent_dim > width:
        problems.append(
            f"teacher.model.latent_dim {teacher.latent_dim} is more than the {width} channels of "
            f"the backbone (backbone.{kind})"
        )
    problems += prior_clashes(config.teacher.prior)
    if config.teacher.svd.images < 1:
        problems.append(f"teacher.svd.images is {config.teacher.svd.images}; it must be > 0")
    window = teacher.window_size if teacher.downsampler == "attention_conv" else 1
    for path, whole, part in (
        ("teacher.model.window_size", grid, window),
        ("teacher.model.heads", width, teacher.heads),
    ):
        if whole % part:
            problems.append(f"{path} is {part}, which does not divide {whole}")
    return problems + training_clashes(config.teacher, "teacher")


def prior_clashes(prior) -> list[str]:
    """What is wrong with the numbers of ``teacher.prior``."""
    problems = [
        f"teacher.prior.{name} is {prior[name]}; it must be > 0"
        for name in ("blur", "reach", "colour")
        if prior[name] <= 0
    ]
    if not 0 <= prior.strength <= 1:
        problems.append(f"teacher.prior.strength is {prior.strength}; it must be in [0, 1]")
    return problems
