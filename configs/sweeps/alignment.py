"""Table 1 on the digits: where the autoencoder is aligned with the teacher.

    python launch/sweep.py configs/sweeps/alignment.py

``pre`` aligns the encoder's features with the backbone's before they are projected, ``post`` a
Linear of the latents, ``latent`` the latents with the teacher's. The paper's latent arm has the
SVD projection as its teacher, here ``latent-svd``; the learned one enters in its Table 2.

The paper's LP is the flat probe. On digits that is near its ceiling for whatever reconstructs them,
so the probe of the mean latent is compared as well.
"""

from gae_jax.sweep import Metric, Point, Sweep


def get_sweep():
    return Sweep(
        title="Where to align (Table 1, on digits)",
        config="configs/demo.py",
        points=(
            Point("pre", {"tokenizer.align.point": "pre", "teacher.kind": "learned"}),
            Point("post", {"tokenizer.align.point": "post", "teacher.kind": "learned"}),
            Point("latent-svd", {"tokenizer.align.point": "latent", "teacher.kind": "svd"}),
            Point("latent", {"tokenizer.align.point": "latent", "teacher.kind": "learned"}),
        ),
        commands=(
            *("backbone", "teacher", "teacher-probe"),
            *("tokenizer", "latent-probe", "evaluate"),
        ),
        overrides={
            "tokenizer.losses.gan": 0.0,
            "tokenizer.train.steps": 700,
            "tokenizer.train.eval_every": 0,
            "tokenizer.health.probe": 0,
        },
        metrics=(
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("the teacher's, of the mean", "mean", "{:.1%}", folder="teacher-probe"),
        ),
        source="Table 1",
        paper={
            "pre": {"rFID ↓": "0.40", "LP ↑": "20.9"},
            "post": {"rFID ↓": "0.48", "LP ↑": "60.8"},
            "latent-svd": {"rFID ↓": "0.51", "LP ↑": "63.2", "the teacher's LP": "60.9"},
        },
        expectation=(
            "the closer to the latent the alignment is, the better is the probe (latent, post, "
            "pre) and the worse the reconstruction."
        ),
        check=check,
    )


def check(means):
    psnr = {name: row["PSNR, dB ↑"] for name, row in means.items()}
    probes = []
    for label in ("probe", "probe of the mean"):
        pre, post, latent = (means[name][f"{label} ↑"] for name in ("pre", "post", "latent-svd"))
        probes += [
            (f"{label}: latent-svd better than post", latent > post),
            (f"{label}: post better than pre", post > pre),
        ]
    return [
        *probes,
        (
            "reconstruction: pre better than post and latent-svd",
            psnr["pre"] > max(psnr["post"], psnr["latent-svd"]),
        ),
    ]
