"""Tables 1, 4 and 6 on photographs: where to align, noise and width, weight of the semantic term.

    pip install -r requirements-pretrained.txt
    python launch/sweep.py configs/sweeps/photographs_tables.py \
        --config.data.root=tiny-imagenet-200

Small changes of one arm, ``base``, each with a short training: a tokenizer of 2,500 steps without
the GAN, and 2,000 steps of LightningDiT on its latents. docs/photographs.md has the results.
"""

from gae_jax.sweep import Metric, Point, Sweep

FD, PROBE, PSNR = "FD, VGG16 ↓", "probe ↑", "PSNR, dB ↑"
NOISY = "PSNR at noise 0.4, dB ↑"


def width(channels, noise):
    return {
        "tokenizer.model.noise_std": noise,
        "tokenizer.model.latent_dim": channels,
        "teacher.model.latent_dim": channels,
    }


# base: the learned teacher of 16 channels, aligned at the latents, weight 1, noise .2
POINTS = {
    "base": {},
    "weight-0": {"tokenizer.losses.align": 0.0},
    "weight-0.5": {"tokenizer.losses.align": 0.5},
    "weight-2": {"tokenizer.losses.align": 2.0},
    "svd": {"teacher.kind": "svd"},
    "post": {"tokenizer.align.point": "post"},
    "pre": {"tokenizer.align.point": "pre"},
    "noise-0.05": width(16, 0.05),
    "noise-0.1": width(16, 0.1),
    "noise-0.4": width(16, 0.4),
    "d32-noise-0.2": width(32, 0.2),
}


def get_sweep():
    return Sweep(
        title="Tables 1, 4 and 6 on photographs (Tiny-ImageNet, 64 pixels)",
        config="configs/tiny_imagenet.py",
        points=tuple(Point(name, changes) for name, changes in POINTS.items()),
        commands=(
            *("import-torch", "teacher", "tokenizer", "latents"),
            *("diffusion", "sample", "evaluate"),
        ),
        overrides={
            "tokenizer.losses.gan": 0.0,
            "tokenizer.train.steps": 2_500,
            "tokenizer.train.eval_every": 0,
            "tokenizer.health.probe": 0,
            "diffusion.train.steps": 2_000,
            "diffusion.train.eval_every": 0,
            "evaluate.online.images": 0,
            "sample.sets": ("ode",),
            "sample.ode.guidance": 1.0,
            "sample.ode.steps": 26,
            "evaluate.nearest": 0,
            "evaluate.diagnostics": False,
        },
        metrics=(
            Metric(PSNR, "tokenizer.psnr"),
            Metric(NOISY, "tokenizer.noise_psnr.4"),
            Metric("LPIPS ↓", "tokenizer.lpips", "{:.3f}"),
            Metric(PROBE, "tokenizer.linear_probe", "{:.1%}"),
            Metric(FD, "generation.ode.fd_vgg16_10k"),
            Metric("FD, EfficientNet ↓", "generation.ode.fd_efficientnet_lite0_10k"),
            Metric("judged right ↑", "generation.ode.judged_right", "{:.1%}"),
        ),
        seeds=(0,),
        source="Tables 1, 4 and 6",
        paper={
            "base": {"LP ↑": "69.2", "PSNR ↑": "27.37", "gFID ↓": "2.36"},
            "weight-0": {"LP ↑": "5.74", "PSNR ↑": "27.16", "gFID ↓": "12.55"},
            "weight-0.5": {"LP ↑": "63.5", "PSNR ↑": "28.11", "gFID ↓": "2.35"},
            "weight-2": {"LP ↑": "71.4", "PSNR ↑": "26.50", "gFID ↓": "2.45"},
            "svd": {"LP ↑": "63.2"},
            "post": {"LP ↑": "60.8"},
            "pre": {"LP ↑": "20.9"},
        },
        expectation=(
            "more weight gives a better probe and, from 0.5 on, worse reconstructions; without the "
            "term generation is far worse; the closer to the latents the alignment is, the better "
            "is the probe; more noise costs clean reconstructions and buys noisy ones."
        ),
        check=check,
    )


def check(means):
    def ordered(label, *names, rising=True):
        values = [means[name][label] for name in names]
        return values == sorted(values, reverse=not rising)

    weights = ("weight-0", "weight-0.5", "base", "weight-2")
    noises = ("noise-0.05", "noise-0.1", "base", "noise-0.4")
    return [
        ("probe: better with more weight", ordered(PROBE, *weights)),
        ("reconstruction: from 0.5 on worse with more weight", ordered(PSNR, *weights[3:0:-1])),
        ("reconstruction: 0.5 better than none", ordered(PSNR, "weight-0", "weight-0.5")),
        (
            "generation: any weight better than none",
            all(ordered(FD, name, "weight-0") for name in weights[1:]),
        ),
        ("probe: svd better than post, post than pre", ordered(PROBE, "pre", "post", "svd")),
        ("clean reconstruction: less noise is better", ordered(PSNR, *noises[::-1])),
        ("noisy reconstruction: more noise is better", ordered(NOISY, *noises)),
        ("wider latents reconstruct better", ordered(PSNR, "base", "d32-noise-0.2")),
    ]
