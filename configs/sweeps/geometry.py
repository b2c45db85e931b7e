"""Flow matching on the sphere of the latents against plain flow matching (digits).

    python launch/sweep.py configs/sweeps/geometry.py

GAE's latents lie on a sphere per token. ``sphere`` moves along geodesics of it, ``flat`` through
the space around it, both from the same tokenizer and by Euler's method without guidance.
"""

from gae_jax.sweep import Metric, Point, Sweep

STEPS = (5, 10, 25, 50, 250)


def get_sweep():
    return Sweep(
        title="Geodesics on the latents' sphere or straight lines (digits)",
        config="configs/demo.py",
        points=(
            Point(
                f"{geometry}-{steps}",
                {"diffusion.flow.geometry": geometry, "sample.ode.steps": steps + 1},
            )
            for geometry in ("flat", "sphere")
            for steps in STEPS
        ),
        commands=(
            *("backbone", "teacher", "tokenizer", "latents"),
            *("diffusion", "sample", "evaluate"),
        ),
        overrides={"sample.sets": ("ode",), "sample.ode.guidance": 1.0},
        metrics=(
            Metric("network calls", "generation.ode.sampling.network_calls", "{:.0f}"),
            Metric("Frechet distance ↓", "generation.ode.fd", "{:.3f}"),
            Metric("judged right ↑", "generation.ode.accuracy", "{:.1%}"),
        ),
        lines="network calls",
    )
