"""What DGAE's terms and sizes do, on the digits.

    python launch/sweep.py configs/sweeps/dgae.py

The weight of the KL, the perceptual term, and whether a larger decoder or a larger encoder pays.
"""

from gae_jax.sweep import Metric, Point, Sweep
from gae_jax.tokenizers.dgae_kind import kl_weight

TIMES = 10_000, 1_000_000, 100_000_000
LARGER = "tokenizer.dgae.decoder.model_channels", "tokenizer.dgae.encoder.ch"


def get_sweep():
    weight = kl_weight((4, 4, 8), 32)
    return Sweep(
        title="DGAE: terms and sizes (digits)",
        config="configs/dgae.py:digits",
        points=(
            Point("base", {}),
            *(Point(f"kl-{by}x", {"tokenizer.losses.kl": by * weight}) for by in TIMES),
            Point("no-perceptual", {"tokenizer.losses.perceptual": 0.0}),
            Point("perceptual-5x", {"tokenizer.losses.perceptual": 1.0}),
            Point("decoder-64", {LARGER[0]: 64}),
            Point("encoder-64", {LARGER[1]: 64}),
        ),
        commands=("backbone", "tokenizer", "evaluate"),
        overrides={"evaluate.noise_levels": (), "tokenizer.train.eval_every": 0},
        metrics=(
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("Frechet distance ↓", "tokenizer.rfd", "{:.3f}"),
            Metric("deviation of the latents", "latents.std"),
        ),
        expectation="enlarging the decoder helps a lot, enlarging the encoder little (Figure 1).",
        check=check,
    )


def check(means):
    def of(label):
        return {name: row[label] for name, row in means.items()}

    distance, psnr = of("Frechet distance ↓"), of("PSNR, dB ↑")
    spread, much = of("deviation of the latents"), [f"kl-{by}x" for by in TIMES]
    return [
        *((f"{by}: it shrinks the latents", spread[by] < spread["base"]) for by in much),
        *((f"{by}: it costs reconstruction", distance[by] > distance["base"]) for by in much),
        ("the perceptual term lowers the distance", distance["base"] < distance["no-perceptual"]),
        ("and costs PSNR", psnr["base"] < psnr["no-perceptual"]),
        ("a larger decoder lowers the distance", distance["decoder-64"] < distance["base"]),
        (
            "more than a larger encoder does",
            distance["decoder-64"] < distance["encoder-64"],
        ),
    ]
