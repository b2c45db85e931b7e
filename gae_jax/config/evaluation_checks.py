"""The sections ``evaluate`` and ``make_reference``."""

from gae_jax.config import flatten
from gae_jax.config.checks import one_of
from gae_jax.data.images import CROPS
from gae_jax.evaluation.generation import FRONT_ENDS, SPACES
from gae_jax.evaluation.presets import GENERATION, RECONSTRUCTION
from gae_jax.evaluation.sgd_probe import HEADS
from gae_jax.tokenizers import sizes_of


def evaluate_clashes(config) -> list[str]:
    """What is wrong with the section ``evaluate``."""
    section = config.evaluate
    problems = one_of(
        section,
        {
            "crop": tuple(CROPS),
            "reconstruction": RECONSTRUCTION,
            "features": ("inception", "judge", "imagenet", "none"),
            "generation": GENERATION,
            "reference_front_end": ("", *FRONT_ENDS),
            "linear_probe": ("sgd", "logistic", "none"),
            "online.sampler": ("sde", "ode"),
        },
        "evaluate",
    )
    for name, known in (("metrics", SPACES), ("sgd_probe.heads", HEADS)):
        if odd := sorted(set(flatten(section)[name]) - set(known)):
            problems.append(f"evaluate.{name} has {odd}; known are {', '.join(known)}")
    if "fd_dinov2" in section.metrics:
        problems.append(
            "evaluate.metrics has fd_dinov2, which evaluate-samples computes: --dinov2=FILE"
        )
    if section.sgd_probe.images < 1:
        problems.append(f"evaluate.sgd_probe.images is {section.sgd_probe.images}; give 1 or more")
    levels = list(section.noise_levels)
    if levels != sorted(set(levels)):
        problems.append(f"evaluate.noise_levels {tuple(levels)} must increase")
    steps = section.decode_steps
    if steps and "decode_steps" not in sizes_of(config.tokenizer):
        problems.append(
            f"evaluate.decode_steps is {steps}, but the decoder of tokenizer "
            f"{config.tokenizer.name!r} makes no steps; leave it at 0"
        )
    return problems


def reference_clashes(make_reference) -> list[str]:
    """What is wrong with the section ``make_reference``."""
    return one_of(make_reference, {"split": ("train", "holdout")}, "make_reference")
