"""Table 4 and Figure 4 on the digits: noise on the latents in training, and the latents' width.

    python launch/sweep.py configs/sweeps/noise.py

Without diffusion models, so without the table's gFID: what noise costs and buys the decoder.
"""

from gae_jax.sweep import Metric, Point, Sweep


def get_sweep():
    points = [(8, 0.05), (8, 0.1), (8, 0.2), (8, 0.4), (16, 0.1), (16, 0.2)]
    return Sweep(
        title="Noise and width of the latents (Table 4, on digits)",
        config="configs/demo.py",
        points=(
            Point(
                f"d{width}-noise-{noise:g}",
                {
                    "tokenizer.model.noise_std": noise,
                    "tokenizer.model.latent_dim": width,
                    "teacher.model.latent_dim": width,
                },
            )
            for width, noise in points
        ),
        commands=("backbone", "teacher", "tokenizer", "latent-probe", "evaluate"),
        overrides={
            "tokenizer.losses.gan": 0.0,
            "tokenizer.train.steps": 700,
            "tokenizer.train.eval_every": 0,
            "tokenizer.health.probe": 0,
            "evaluate.noise_levels": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
        },
        metrics=(
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("PSNR at noise 0.2, dB ↑", "tokenizer.noise_psnr.2"),
            Metric("PSNR at noise 0.5, dB ↑", "tokenizer.noise_psnr.5"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
        ),
        source="Table 4, d = 32 and 64",
        paper={
            # their d = 32 and 64 stand beside our 8 and 16
            "d8-noise-0.05": {"PSNR ↑": "27.78", "rFID ↓": "0.37", "gFID ↓": "2.58"},
            "d8-noise-0.1": {"PSNR ↑": "27.37", "rFID ↓": "0.45", "gFID ↓": "2.36"},
            "d8-noise-0.2": {"PSNR ↑": "26.99", "rFID ↓": "0.57", "gFID ↓": "2.32"},
            "d16-noise-0.1": {"PSNR ↑": "29.60", "rFID ↓": "0.31", "gFID ↓": "3.15"},
            "d16-noise-0.2": {"PSNR ↑": "28.92", "rFID ↓": "0.43", "gFID ↓": "3.12"},
        },
        expectation=(
            "more noise in training costs reconstruction from clean latents and buys it from "
            "noisy ones; wider latents reconstruct better."
        ),
        check=check,
        noise=True,
    )


def check(means):
    clean = {name: row["PSNR, dB ↑"] for name, row in means.items()}
    noisy = {name: row["PSNR at noise 0.5, dB ↑"] for name, row in means.items()}
    names = [f"d8-noise-{noise}" for noise in ("0.05", "0.1", "0.2", "0.4")]
    return [
        (
            "from clean latents: the less noise in training the better",
            sorted(names, key=clean.get, reverse=True) == names,
        ),
        (
            "from noisy latents: the more noise in training the better",
            sorted(names, key=noisy.get) == names,
        ),
        (
            "wider latents reconstruct better",
            all(clean[f"d16-noise-{x}"] > clean[f"d8-noise-{x}"] for x in ("0.1", "0.2")),
        ),
    ]
