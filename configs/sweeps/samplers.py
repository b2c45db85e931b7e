"""Samplers: quality against the number of network calls, without guidance.

    python launch/sweep.py configs/sweeps/samplers.py                    # on digits
    python launch/sweep.py configs/sweeps/samplers.py --run=runs/mine    # of a finished run

Every solver with many and few steps. Without ``--run`` one diffusion model per seed is trained as
in the demo.
"""

from gae_jax.sweep import Metric, Point, Sweep

STEPS = (5, 10, 25, 50, 250)
ODE = ("euler", "heun", "adams_bashforth")
FD_DIGITS = "FD, small classifier ↓"


def get_sweep():
    return Sweep(
        title="Samplers against network calls",
        config="configs/demo.py",
        points=(*ode_points(), *sde_points()),
        commands=(
            *("backbone", "teacher", "tokenizer", "latents"),
            *("diffusion", "sample", "evaluate"),
        ),
        overrides={
            f"sample.{name}.{field}": value
            for name in ("ode", "sde")
            for field, value in (("guidance", 1.0), ("guidance_parts", ()))
        },
        metrics=(
            Metric("network calls", either("sampling.network_calls"), "{:.0f}"),
            Metric("FID ↓", either("fid*")),
            Metric("FD, VGG16 ↓", either("fd_vgg16_*")),
            Metric("FD, EfficientNet ↓", either("fd_efficientnet_lite0_*")),
            Metric(FD_DIGITS, either("fd"), "{:.3f}"),
            Metric("judged right ↑", f"{either('judged_right')}|{either('accuracy')}", "{:.1%}"),
        ),
        lines="network calls",
        check=check,
    )


def either(figure):
    """The name of a figure of the one set of samples that a point draws."""
    return f"generation.ode.{figure}|generation.sde.{figure}"


def ode_points():
    for method in ODE:
        for calls in STEPS:
            # as many calls: Heun makes two per step
            steps = max(calls // 2, 1) if method == "heun" else calls
            changes = {"sample.ode.method": method, "sample.ode.steps": steps + 1}
            yield Point(f"ode-{method}-{calls}", {"sample.sets": ("ode",), **changes})
    for rtol in (1e-2, 1e-3, 1e-5):
        changes = {"sample.ode.method": "dopri5", "sample.ode.rtol": rtol}
        yield Point(f"ode-dopri5-{rtol:.5f}".rstrip("0"), {"sample.sets": ("ode",), **changes})


def sde_points():
    for method in ("euler", "heun"):
        for calls in STEPS:
            # the last step is a call, too
            steps = (calls + 1) // 2 if method == "heun" else calls
            changes = {"sample.sde.method": method, "sample.sde.steps": steps}
            yield Point(f"sde-{method}-{calls}", {"sample.sets": ("sde",), **changes})


def check(means):
    labels = ("FID ↓", "FD, VGG16 ↓", FD_DIGITS)
    label = next(label for label in labels if label in means["ode-euler-250"])

    def few_suffice(name):
        distances = {calls: means[f"{name}-{calls}"][label] for calls in STEPS}
        return min(distances[calls] for calls in STEPS if calls <= 25) <= 1.1 * distances[250]

    series = [*(f"ode-{method}" for method in ODE), "sde-euler", "sde-heun"]
    return [(f"{name}: at most 25 calls within 10 % of 250", few_suffice(name)) for name in series]
