"""Table 6 on the digits: the weight of the semantic term.

    python launch/sweep.py configs/sweeps/lambda_sp.py

The paper's LP is the flat probe. On digits that is near its ceiling for whatever reconstructs them,
so the probe of the mean latent is compared as well.
"""

from gae_jax.sweep import Metric, Point, Sweep


def get_sweep():
    weights = (0.0, 0.5, 1.0, 2.0)
    return Sweep(
        title="Weight of the semantic term (Table 6, on digits)",
        config="configs/demo.py",
        points=(Point(f"lambda_sp={w:g}", {"tokenizer.losses.align": w}) for w in weights),
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
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("Frechet distance ↓", "generation.sde.fd"),
            Metric("judged right ↑", "generation.sde.accuracy", "{:.1%}"),
        ),
        source="Table 6",
        paper={
            "lambda_sp=0": {"LP ↑": "5.74", "PSNR ↑": "27.16", "rFID ↓": "0.76", "gFID ↓": "12.55"},
            "lambda_sp=0.5": {
                "LP ↑": "63.5",
                "PSNR ↑": "28.11",
                "rFID ↓": "0.40",
                "gFID ↓": "2.35",
            },
            "lambda_sp=1": {"LP ↑": "69.2", "PSNR ↑": "27.37", "rFID ↓": "0.45", "gFID ↓": "2.36"},
            "lambda_sp=2": {"LP ↑": "71.4", "PSNR ↑": "26.50", "rFID ↓": "0.59", "gFID ↓": "2.45"},
        },
        expectation=(
            "more weight gives a better probe and, from 0.5 on, worse reconstructions; without "
            "the term generation is far worse than with any weight of it."
        ),
        check=check,
    )


def check(means):
    names = [f"lambda_sp={weight}" for weight in ("0", "0.5", "1", "2")]
    flat, mean, psnr, distance = (
        [means[name][label] for name in names]
        for label in ("probe ↑", "probe of the mean ↑", "PSNR, dB ↑", "Frechet distance ↓")
    )
    return [
        ("probe: better with more weight", flat == sorted(flat)),
        ("probe of the mean: better with more weight", mean == sorted(mean)),
        (
            "reconstruction: from 0.5 on worse with more weight",
            psnr[1:] == sorted(psnr[1:], reverse=True),
        ),
        ("reconstruction: 0.5 better than none", psnr[1] > psnr[0]),
        ("generation: any weight better than none", max(distance[1:]) < distance[0]),
    ]
