"""The section ``teacher``."""

from gae_jax.config.checks import compute_clashes, one_of, training_clashes
from gae_jax.nn.attention import ATTENTIONS
from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.tokenizers import pae_target as prior_target


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
    problems += teacher_compute_clashes(config.teacher)
    window = teacher.window_size if teacher.downsampler == "attention_conv" else 1
    for path, whole, part in (
        ("teacher.model.window_size", grid, window),
        ("teacher.model.heads", width, teacher.heads),
    ):
        if whole % part:
            problems.append(f"{path} is {part}, which does not divide {whole}")
    return problems + training_clashes(config.teacher, "teacher")


def teacher_compute_clashes(teacher) -> list[str]:
    """What is wrong with how the teacher and its frozen backbone are computed."""
    problems = compute_clashes(teacher, "teacher")
    known = {"backbone.dtype": ("float32", "bfloat16"), "backbone.attention": ATTENTIONS}
    problems += one_of(teacher, known, "teacher")
    if teacher.kind == "prior":
        plain = {"dtype": "float32", "remat": "none", "attention": "auto", "kernels": "auto"}
        problems += [
            f"teacher.compute.{name} is {teacher.compute[name]!r}, but teacher.kind 'prior' is "
            f"computed plainly; leave it at {value!r}"
            for name, value in plain.items()
            if teacher.compute[name] != value
        ]
    return problems
