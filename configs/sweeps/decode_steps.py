"""DGAE on the digits: reconstruction against the steps of its decoder.

    python launch/sweep.py configs/sweeps/decode_steps.py

One tokenizer per seed, decoded with few and many calls of its U-Net. DGAE's paper was not at
hand; in epsilon-VAE's ablation the row nearest to it (LPIPS, no GAN) is best at 10 steps. Images
a second with N steps are what ``bench`` says of ``decode`` with
``--config.tokenizer.dgae.decode_steps=N``.
"""

from gae_jax.sweep import Metric, Point, Sweep

STEPS = (1, 2, 3, 5, 10, 25, 50)


def get_sweep():
    return Sweep(
        title="Steps of DGAE's decoder (digits)",
        config="configs/dgae.py:digits",
        points=[Point(f"euler-{steps}", {"evaluate.decode_steps": steps}) for steps in STEPS],
        commands=("backbone", "tokenizer", "evaluate"),
        overrides={"evaluate.noise_levels": (), "evaluate.diagnostics": False},
        metrics=(
            Metric("steps", "tokenizer.decode_steps", "{:.0f}"),
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("Frechet distance ↓", "tokenizer.rfd", "{:.3f}"),
        ),
        lines="steps",
        check=check,
    )


def check(means):
    def of(label):
        return {steps: means[f"euler-{steps}"][label] for steps in STEPS}

    distance, psnr = of("Frechet distance ↓"), of("PSNR, dB ↑")
    return [
        ("10 steps have a lower Frechet distance than one", distance[10] < distance[1]),
        ("10 steps are within 10 % of the best", distance[10] <= 1.1 * min(distance.values())),
        ("PSNR does not rise from 10 steps to 50", psnr[50] <= psnr[10] + 0.05),
    ]
