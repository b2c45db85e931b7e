"""What DGAE's terms and sizes do, on the digits.

    python launch/sweep.py configs/sweeps/dgae.py

The weight of the KL, the perceptual term, and whether a larger decoder or a larger encoder pays.
"""

from gae_jax.sweep import Metric, Point, Sweep
from gae_jax.tokenizers.dgae import kl_weight

LARGER = "tokenizer.dgae.decoder.model_channels", "tokenizer.dgae.encoder.ch"


def get_sweep():
    weight = 1e4 * kl_weight((4, 4, 8), 32)
    return Sweep(
        title="DGAE: terms and sizes (digits)",
        config="configs/dgae.py:digits",
        points=(
            Point("base", {}),
            Point("kl-10000x", {"tokenizer.losses.kl": weight}),
            Point("no-perceptual", {"tokenizer.losses.perceptual": 0.0}),
            Point("decoder-64", {LARGER[0]: 64}),
            Point("encoder-64", {LARGER[1]: 64}),
        ),
        commands=("teacher-backbone", "tokenizer", "evaluate"),
        overrides={"evaluate.noise_levels": (), "tokenizer.train.eval_every": 0},
        metrics=(
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("Frechet distance ↓", "tokenizer.rfd", "{:.3f}"),
            Metric("deviation of the means", "tokenizer.latent_std"),
        ),
        expectation="enlarging the decoder helps a lot, enlarging the encoder little (Figure 1).",
        check=check,
    )


def check(means):
    def of(label):
        return {name: row[label] for name, row in means.items()}

    distance, psnr = of("Frechet distance ↓"), of("PSNR, dB ↑")
    spread = of("deviation of the means")
    return [
        ("much KL shrinks the means", spread["kl-10000x"] < spread["base"]),
        ("much KL costs reconstruction", distance["kl-10000x"] > distance["base"]),
        ("the perceptual term lowers the distance", distance["base"] < distance["no-perceptual"]),
        ("and costs PSNR", psnr["base"] < psnr["no-perceptual"]),
        ("a larger decoder lowers the distance", distance["decoder-64"] < distance["base"]),
        (
            "more than a larger encoder does",
            distance["decoder-64"] < distance["encoder-64"],
        ),
    ]
