"""Samplers on the digits: quality against the number of network calls.

    python launch/sweep.py configs/sweeps/samplers.py

One diffusion model per seed, trained as in the demo and sampled without guidance by every solver
with many and few steps.
"""

from gae_jax.sweep import Metric, Point, Sweep

STEPS = (5, 10, 25, 50, 250)
ODE = ("euler", "heun", "adams_bashforth")


def get_sweep():
    return Sweep(
        title="Samplers against network calls (digits)",
        config="configs/demo.py",
        points=(*ode_points(), *sde_points()),
        commands=(
            *("teacher-backbone", "teacher", "tokenizer", "latents"),
            *("diffusion", "sample", "evaluate"),
        ),
        overrides={"sample.ode.guidance": 1.0},
        metrics=(
            Metric("network calls", either("sampling.network_calls"), "{:.0f}"),
            Metric("Frechet distance ↓", either("fd"), "{:.3f}"),
            Metric("judged right ↑", either("accuracy"), "{:.1%}"),
        ),
        lines="network calls",
        check=check,
    )


def either(figure):
    """Of the one set of samples that a point draws."""
    return f"generation.ode.{figure}|generation.sde.{figure}"


def ode_points():
    for method in ODE:
        for calls in STEPS:
            # as many calls: Heun makes two per step
            steps = max(calls // 2, 1) if method == "heun" else calls
            more = {"sample.ode.method": method, "sample.ode.steps": steps + 1}
            yield Point(f"ode-{method}-{calls}", {"sample.sets": ("ode",), **more})
    for rtol in (1e-2, 1e-3, 1e-5):
        more = {"sample.ode.method": "dopri5", "sample.ode.rtol": rtol}
        yield Point(f"ode-dopri5-{rtol:.5f}".rstrip("0"), {"sample.sets": ("ode",), **more})


def sde_points():
    for method in ("euler", "heun"):
        for calls in STEPS:
            # the last step is a call, too
            steps = (calls + 1) // 2 if method == "heun" else calls
            more = {"sample.sde.method": method, "sample.sde.steps": steps}
            yield Point(f"sde-{method}-{calls}", {"sample.sets": ("sde",), **more})


def check(means):
    def few(name):
        found = {calls: means[f"{name}-{calls}"]["Frechet distance ↓"] for calls in STEPS}
        return min(found[calls] for calls in STEPS if calls <= 25) <= 1.1 * found[250]

    series = [*(f"ode-{method}" for method in ODE), "sde-euler", "sde-heun"]
    return [(f"{name}: at most 25 calls within 10 % of 250", few(name)) for name in series]
