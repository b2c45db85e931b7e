"""The section ``sample`` and its checks."""

from gae_jax.config.checks import is_tuple
from gae_jax.config.choices import choice, choices


def sample_section() -> dict:
    """What is drawn from it, and how."""
    return dict(
        sets=choices(("sde", "ode")),  # what is drawn, each with the section of that name
        # [paper] uniform: per_class of each | random: as many, drawn | file
        labels=choice("uniform", "random", "file"),
        labels_file="",  # with labels="file": one class per line, or an .npy file; kept in order
        per_class=50,  # [paper]
        classes=(),  # only these; empty: all
        batch_size=256,
        png=False,  # a folder of PNG files beside samples.npz
        weaker="",  # autoguidance: a run with a weaker diffusion model on the same latents
        sde=dict(
            # [paper] euler (Maruyama) | heun, with twice the calls
            method=choice("euler", "generators.samplers:SDE_METHODS"),
            steps=250,  # [paper] points of the grid; the last step starts from the last of them
            start=1e-5,  # [code]
            time_shift=0.4,  # [paper]
            # g(t), the noise that is added and taken away again: sbdm [code] | sigma | linear |
            # constant | decreasing | increasing-decreasing
            form=choice("sbdm", "generators.samplers:FORMS"),
            norm=1.0,  # [code] factor of g
            # mean [ours] goes to the end | reference [code] stops short of it, see
            # docs/training.md | tweedie | euler | none
            last_step=choice("mean", "generators.samplers:LAST_STEPS"),
            last_step_size=0.004,  # [code] the grid ends so far from 1, before it is shifted
            guidance=1.0,  # [paper] 1: none
            guidance_start=0.0,
            guidance_end=1.0,
            guidance_channels=0,
            guidance_parts=(),
        ),
        ode=dict(  # [paper] 80-epoch setting
            # [paper] euler | heun | adams_bashforth | dopri5, which is adaptive
            method=choice("euler", "generators.samplers:ODE_METHODS"),
            steps=250,  # [paper] points of the grid, one more than steps
            end=1.0,  # [ours] of the grid before it is shifted; RAE stops at 0.999
            time_shift=0.4,  # [paper]
            rtol=1e-3,  # [code] of dopri5
            atol=1e-6,  # [code] of dopri5
            guidance=2.5,  # [paper]
            guidance_start=0.25,  # [paper]
            guidance_end=1.0,
            guidance_channels=0,  # only the first so many; 0: all
            # tuples of (last time, scale), from noise on, instead of the other three, such as
            # FAE's ((0.1, 0.9), (0.3, 1.0), (1.0, 2.5)); empty: none, and with them guidance=1
            guidance_parts=(),
        ),
    )


def sample_clashes(config) -> list[str]:
    """List the problems of the section ``sample``."""
    sample, diffusion = config.sample, config.diffusion
    problems = []
    if sample.labels == "file" and not sample.labels_file:
        problems.append(
            "sample.labels is 'file' but sample.labels_file names none: a text file with one class "
            "per line, or an .npy file"
        )
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
    """List the problems of one set, ``sample.sde`` or ``sample.ode``."""
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
    """List the problems of guidance that has a scale for every part of the time."""
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
