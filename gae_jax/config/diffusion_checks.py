"""The sections ``latents`` and ``diffusion``."""

from gae_jax.config.checks import compute_clashes, one_of, start_clashes, training_clashes
from gae_jax.data.latent_files import DTYPES
from gae_jax.generators import flow
from gae_jax.generators.latent_diffusion import NETWORKS
from gae_jax.nn.quantized import PRODUCTS


def latents_clashes(latents) -> list[str]:
    """What is wrong with the section ``latents``."""
    known = {"dtype": tuple(DTYPES), "statistics": ("channel", "element")}
    known |= {"encode_dtype": ("float32", "bfloat16"), "encode_products": PRODUCTS}
    return one_of(latents, known, "latents")


def diffusion_clashes(diffusion, grid: int) -> list[str]:
    """What is wrong with the section ``diffusion``, on latents of ``grid`` x ``grid``."""
    problems = one_of(diffusion, {"name": NETWORKS}, "diffusion")
    model, head = diffusion.model, diffusion.head
    for path, whole, part in (
        ("diffusion.model.patch_size", grid, model.patch_size),
        ("diffusion.model.num_heads", model.hidden_size, model.num_heads),
        ("diffusion.head.num_heads", head.hidden_size, head.num_heads),
    ):
        if whole % part:
            problems.append(f"{path} is {part}, which does not divide {whole}")
    if diffusion.name == "ddt" and diffusion.flow.prediction != "velocity":
        problems.append(
            f"diffusion.flow.prediction is {diffusion.flow.prediction!r}, but "
            "diffusion.name 'ddt' predicts the 'velocity'"
        )
    problems += start_clashes(diffusion, "diffusion")
    problems += flow_clashes(diffusion.flow) + compute_clashes(diffusion, "diffusion")
    return problems + training_clashes(diffusion, "diffusion")


def flow_clashes(section) -> list[str]:
    """What is wrong with ``diffusion.flow``."""
    problems = []
    if section.time_least and section.time != "logit_normal":
        problems.append(
            f"diffusion.flow.time_least is {section.time_least}, but diffusion.flow.time is "
            f"{section.time!r}; only 'logit_normal' is cut off"
        )
    problems += one_of(
        section,
        {
            "path": tuple(flow.PATHS),
            "prediction": flow.PREDICTIONS,
            "weighting": flow.WEIGHTINGS,
            "time": flow.TIMES,
            "geometry": ("flat", "sphere"),
        },
        "diffusion.flow",
    )
    straight = section.path, section.prediction
    if section.geometry == "sphere" and straight != ("linear", "velocity"):
        problems.append(
            "diffusion.flow.geometry is 'sphere', which has one path and predicts its velocity: "
            "set diffusion.flow.path to 'linear' and diffusion.flow.prediction to 'velocity'"
        )
    return problems
