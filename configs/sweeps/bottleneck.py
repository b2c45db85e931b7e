"""Table 7 on the digits: normalised latents against those of a VAE, both without alignment.

    python launch/sweep.py configs/sweeps/bottleneck.py

The third point, with alignment, is no part of the table.
"""

from gae_jax.sweep import Metric, Point, Sweep


def get_sweep():
    def point(name, bottleneck, kl, align):
        return Point(
            name,
            {
                "tokenizer.model.bottleneck": bottleneck,
                "tokenizer.losses.kl": kl,
                "tokenizer.losses.align": align,
            },
        )

    return Sweep(
        title="Latent norm or KL (Table 7, on digits)",
        config="configs/demo.py",
        points=(
            point("kl", "kl", 0.1, 0.0),
            point("norm", "norm", 0.0, 0.0),
            point("norm-aligned", "norm", 0.0, 0.5),
        ),
        commands=(
            *("backbone", "teacher", "tokenizer", "latent-probe"),
            *("latents", "diffusion", "sample", "evaluate"),
        ),
        overrides={
            "tokenizer.losses.gan": 0.0,
            "tokenizer.train.steps": 700,
            "tokenizer.train.eval_every": 0,
            "tokenizer.health.probe": 0,
            "diffusion.train.steps": 500,
            "sample.per_class": 20,
            "sample.batch_size": 100,
        },
        metrics=(
            Metric("Frechet distance ↓", "generation.sde.fd"),
            Metric("judged right ↑", "generation.sde.accuracy", "{:.1%}"),
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
        ),
        source="Table 7",
        paper={
            "kl": {"rFID ↓": "0.977", "gFID ↓": "16.72"},
            "norm": {"rFID ↓": "0.764", "gFID ↓": "12.55"},
        },
        expectation="normalised latents reconstruct and generate better than a VAE's.",
        check=check,
    )


def check(means):
    kl, norm = means["kl"], means["norm"]
    return [
        ("generation: norm better than kl", norm["Frechet distance ↓"] < kl["Frechet distance ↓"]),
        ("reconstruction: norm better than kl", norm["PSNR, dB ↑"] > kl["PSNR, dB ↑"]),
    ]
