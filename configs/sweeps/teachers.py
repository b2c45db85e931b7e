"""Table 2 on the digits: the downsampler of the semantic teacher.

    python launch/sweep.py configs/sweeps/teachers.py

The paper's figures are flat probes of the teacher's own latents, not of the autoencoder's. On
digits these are near their ceiling, so the probe of the mean latent is compared as well.
"""

from gae_jax.sweep import Metric, Point, Sweep


def get_sweep():
    arms = ("attention", "attention_linear", "attention_conv")
    return Sweep(
        title="Downsamplers of the teacher (Table 2, on digits)",
        config="configs/demo.py",
        points=(Point(arm, {"teacher.model.downsampler": arm}) for arm in arms),
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
            Metric("the teacher's, of the mean ↑", "mean", "{:.1%}", folder="teacher-probe"),
            Metric("the teacher's probe ↑", "flat", "{:.1%}", folder="teacher-probe"),
            Metric("probe of the mean ↑", "mean", "{:.1%}", folder="latent-probe"),
            Metric("probe ↑", "flat", "{:.1%}", folder="latent-probe"),
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
        ),
        source="Table 2",
        paper={
            "attention": {"the teacher's LP ↑": "62.8"},
            "attention_linear": {"the teacher's LP ↑": "63.4"},
            "attention_conv": {"the teacher's LP ↑": "75.6"},
        },
        expectation=(
            "attention and a projection of whole windows is far better than attention and a "
            "projection of single tokens, which is a little better than attention alone."
        ),
        check=check,
    )


def check(means):
    found = []
    for label in ("the teacher's probe", "the teacher's, of the mean"):
        alone, linear, windows = (
            means[name][f"{label} ↑"]
            for name in ("attention", "attention_linear", "attention_conv")
        )
        found += [
            (f"{label}: windows better than single tokens", windows > max(alone, linear)),
            (f"{label}: attention and Linear better than attention alone", linear > alone),
        ]
    return found
