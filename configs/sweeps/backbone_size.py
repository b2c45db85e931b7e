"""Table 8 on the digits: the size of the autoencoder.

    python launch/sweep.py configs/sweeps/backbone_size.py

S, B and L are sizes for the digits, far below those of the paper; L is the demo's.
"""

from gae_jax.sweep import Metric, Point, Sweep


def get_sweep():
    sizes = {"S": (32, 2, 2), "B": (64, 3, 4), "L": (96, 4, 4)}
    return Sweep(
        title="Size of the autoencoder (Table 8, on digits)",
        config="configs/demo.py",
        points=(
            Point(
                name,
                {
                    "tokenizer.model.embed_dim": width,
                    "tokenizer.model.num_layers": layers,
                    "tokenizer.model.num_heads": heads,
                },
            )
            for name, (width, layers, heads) in sizes.items()
        ),
        commands=("backbone", "teacher", "tokenizer", "latent-probe", "evaluate"),
        overrides={
            "tokenizer.losses.gan": 0.0,
            "tokenizer.train.steps": 700,
            "tokenizer.train.eval_every": 0,
            "tokenizer.health.probe": 0,
        },
        metrics=(
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
        ),
        source="Table 8",
        paper={
            "S": {"PSNR ↑": "23.85", "SSIM ↑": "0.625", "rFID ↓": "1.55"},
            "B": {"PSNR ↑": "26.70", "SSIM ↑": "0.754", "LP ↑": "62.5", "rFID ↓": "0.41"},
            "L": {"PSNR ↑": "27.37", "SSIM ↑": "0.774", "LP ↑": "69.2", "rFID ↓": "0.45"},
        },
        expectation="the larger the autoencoder, the better are reconstruction and probe.",
        check=check,
    )


def check(means):
    psnr = [means[name]["PSNR, dB ↑"] for name in "SBL"]
    return [
        ("reconstruction: L better than B better than S", psnr == sorted(psnr)),
        *(
            (f"{label}: L better than B", means["L"][f"{label} ↑"] > means["B"][f"{label} ↑"])
            for label in ("probe", "probe of the mean")
        ),
    ]
