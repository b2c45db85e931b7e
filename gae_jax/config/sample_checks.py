"""The section ``sample``."""

from gae_jax.config.checks import is_tuple, one_of
from gae_jax.generators import samplers
from gae_jax.nn.attention import ATTENTIONS
from gae_jax.nn.quantized import PRODUCTS


def sample_clashes(config) -> list[str]:
    """What is wrong with the section ``sample``."""
    sample, diffusion = config.sample, config.diffusion
    problems = one_of(
        sample,
        {
            "labels": ("uniform", "random", "file"),
            "dtype": ("float32", "bfloat16"),
            "products": PRODUCTS,
            "decode_products": PRODUCTS,
            "attention": ATTENTIONS,
            "sde.method": samplers.SDE_METHODS,
            "sde.form": samplers.FORMS,
            "sde.last_step": samplers.LAST_STEPS,
            "ode.method": samplers.ODE_METHODS,
        },
        "sample",
    )
    if sample.labels == "file" and not sample.labels_file:
        problems.append(
            "sample.labels is 'file' but sample.labels_file names none: a text file with one class "
            "per line, or an .npy file"
        )
    if odd := set(sample.sets) - {"sde", "ode"}:
        problems.append(f"sample.sets has {sorted(odd)}; use 'sde', 'ode' or both")
    if odd := [c for c in sample.classes if not 0 <= c < diffusion.model.num_classes]:
        problems.append(
            f"sample.classes has {odd}; diffusion.model.num_classes is "
            f"{diffusion.model.num_classes}"
        )
    for name in ("sde", "ode"):
        problems += set_clashes(config, name)
    if diffusion.flow.geometry == "sphere":
        problems += sphere_clashes(config)
    if sample.sde.start <= 0 and diffusion.flow.path != "vp":
        problems.append(
            f"sample.sde.start is {sample.sde.start}; it must be > 0, where the score is finite"
        )
    if sample.sde.start >= 1 - sample.sde.last_step_size:
        problems.append(
            f"sample.sde.start is {sample.sde.start}, where the grid has ended: it must be below "
            f"1 - sample.sde.last_step_size = {1 - sample.sde.last_step_size:g}"
        )
    return problems


def set_clashes(config, name: str) -> list[str]:
    """What is wrong with one set, ``sample.sde`` or ``sample.ode``."""
    sample, section = config.sample, config.sample[name]
    problems = []
    if section.guidance_start > section.guidance_end:
        problems.append(
            f"sample.{name}.guidance_start is {section.guidance_start}, after "
            f"sample.{name}.guidance_end {section.guidance_end}; times run from 0, noise, to 1, "
            "data"
        )
    null_class = config.diffusion.model.class_dropout_prob > 0
    problems += guidance_part_clashes(section, f"sample.{name}")
    guided = section.guidance != 1 or section.guidance_parts
    if guided and not null_class and not sample.weaker:
        problems.append(
            f"sample.{name}.guidance is {section.guidance}, but with "
            "diffusion.model.class_dropout_prob 0 there is no null class to guide away from; "
            "set the guidance to 1 (none), or sample.weaker to a run with a weaker model"
        )
    return problems


def guidance_part_clashes(section, where: str) -> list[str]:
    """What is wrong with guidance that has a scale for every part of the time."""
    parts = section.guidance_parts
    if not parts:
        return []
    if not all(is_tuple(part, 2) for part in parts):
        return [f"{where}.guidance_parts is {parts}; it is made of pairs (last time, scale)"]
    ends = [end for end, _ in parts]
    if ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
        return [f"{where}.guidance_parts end at {ends}; they must increase, from above 0 up to 1"]
    if section.guidance != 1:
        return [f"{where}.guidance is {section.guidance}; with {where}.guidance_parts it must be 1"]
    return []


def sphere_clashes(config) -> list[str]:
    """What does not go with flow matching on the latents' sphere."""
    sample, problems = config.sample, []
    if tuple(sample.sets) != ("ode",) or sample.ode.method != "euler":
        problems.append(
            "diffusion.flow.geometry 'sphere' has one sampler: set sample.sets to ('ode',) and "
            "sample.ode.method to 'euler'"
        )
    return problems
