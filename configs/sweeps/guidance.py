"""Classifier-free guidance: quality against its scale, in several intervals of time.

    python launch/sweep.py configs/sweeps/guidance.py --run=runs/mine

With ``--run`` of any finished run; without, one diffusion model is trained as in the demo. Time
runs from 0 (noise) to 1 (image), and guidance acts inside the interval alone.
"""

from gae_jax.sweep import Metric, Point, Sweep

SCALES = (1.5, 2.0, 2.5, 3.5)
INTERVALS = ((0.0, 1.0), (0.25, 1.0), (0.25, 0.75))


def get_sweep():
    return Sweep(
        title="Guidance scale and interval",
        config="configs/demo.py",
        points=(
            Point("none-1", guidance(1.0, 0.0, 1.0)),
            *(
                Point(f"{start:g}-to-{end:g}-{scale:g}", guidance(scale, start, end))
                for start, end in INTERVALS
                for scale in SCALES
            ),
        ),
        commands=(
            *("backbone", "teacher", "tokenizer", "latents"),
            *("diffusion", "sample", "evaluate"),
        ),
        overrides={"sample.sets": ("ode",), "sample.ode.guidance_parts": ()},
        metrics=(
            Metric("guidance", "generation.ode.sampling.guidance", "{:g}"),
            Metric("FID ↓", "generation.ode.fid*"),
            Metric("FD, VGG16 ↓", "generation.ode.fd_vgg16_*"),
            Metric("FD, EfficientNet ↓", "generation.ode.fd_efficientnet_lite0_*"),
            Metric("FD, small classifier ↓", "generation.ode.fd", "{:.3f}"),
            Metric(
                "judged right ↑", "generation.ode.judged_right|generation.ode.accuracy", "{:.1%}"
            ),
        ),
        seeds=(0,),
        lines="guidance",
    )


def guidance(scale, start, end):
    fields = {"guidance": scale, "guidance_start": start, "guidance_end": end}
    return {f"sample.ode.{name}": value for name, value in fields.items()}
