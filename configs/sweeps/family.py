"""All tokenizers on the digits, with the same LightningDiT and the same budget.

    python launch/sweep.py configs/sweeps/family.py

Every point has the data, backbone, teacher, tokenizer and latents of its config's digits, and for
all the rest configs/demo.py. Steps and batch of the tokenizer are the same for all; where a config
has other steps, its phases and the steps at which terms begin are stretched or shortened alike.
"""

from pathlib import Path

import ml_collections

from gae_jax.config import load_config
from gae_jax.sweep import Metric, Point, Sweep

CONFIGS = Path(__file__).parent.parent
POINTS = {
    "GAE": "demo",
    "PAE": "pae:digits",
    "DGAE": "dgae:digits",
    "AlignTok": "aligntok:digits",
    "FAE": "fae:digits",
    "RAE": "rae:digits",
    "VA-VAE": "vavae:digits",
    "KL-VAE": "vavae:klvae_digits",
}
STEPS, BATCH = 900, 32
OWN = ("data", "backbone", "teacher", "tokenizer", "latents")  # sections that a point brings


def differences(base, other, prefix: str = "") -> dict:
    """Dotted path -> value of the fields of ``other`` that ``base`` has otherwise."""
    found = {}
    for key in other:
        path = f"{prefix}{key}"
        if isinstance(other[key], ml_collections.ConfigDict):
            found |= differences(base[key], other[key], f"{path}.")
        elif other[key] != base[key]:
            found[path] = other[key]
    return found


def with_steps(config, steps: int):
    """The config with so many steps of its tokenizer; what happens on the way keeps its share."""
    section = config.tokenizer
    share = steps / section.train.steps
    lengths = [round(phase[0] * share) for phase in section.phases]
    if lengths:
        lengths[-1] += steps - sum(lengths)
    section.phases = tuple(
        (length, *phase[1:]) for length, phase in zip(lengths, section.phases, strict=True)
    )
    for name in ("start", "discriminator_start", "ramp"):
        section.gan[name] = round(section.gan[name] * share)
    section.train.update(steps=steps, batch_size=BATCH, eval_every=0, save_every=steps)
    section.health.probe = 0
    return config


def get_sweep():
    base = load_config(CONFIGS, "demo")

    def point(name):
        config = with_steps(load_config(CONFIGS, POINTS[name]), STEPS)
        found = differences(base, config)
        return Point(name, {k: v for k, v in found.items() if k.split(".")[0] in OWN})

    return Sweep(
        title="The family of tokenizers on the digits",
        config="configs/demo.py",
        points=tuple(map(point, POINTS)),
        commands=(
            *("backbone", "teacher", "tokenizer", "latent-probe"),
            *("latents", "diffusion", "sample", "evaluate"),
        ),
        overrides={"diffusion.train.steps": 1000, "diffusion.train.save_every": 1000},
        metrics=(
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("Fréchet, reconstructed ↓", "tokenizer.rfd"),
            Metric("PSNR under noise, area ↑", "tokenizer.noise_area_psnr"),
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
            Metric("GSQ ↑", "latents.gsq", "{:.1%}"),
            Metric("effective rank", "latents.effective_rank"),
            Metric("deviation", "latents.std"),
            Metric("Fréchet, unguided ↓", "generation.sde.fd"),
            Metric("judged right, unguided ↑", "generation.sde.accuracy", "{:.1%}"),
            Metric("Fréchet, guided ↓", "generation.ode.fd"),
            Metric("judged right, guided ↑", "generation.ode.accuracy", "{:.1%}"),
        ),
        seeds=(0, 1),
        noise=True,
    )
