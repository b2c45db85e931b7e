"""The thesis on photographs: do aligned latents generate better, and sooner?

    pip install -r requirements-pretrained.txt
    python launch/sweep.py configs/sweeps/photographs.py --config.data.root=tiny-imagenet-200

Three tokenizers of the same sizes and steps on Tiny-ImageNet: ``gae``, whose normalised latents are
aligned with the teacher's; ``norm``, normalised latents alone; ``kl``, a VAE. Then the same
LightningDiT on the latents of each. The Frechet distances of 10,000 samples without guidance are
measured while it trains: ``curves.csv`` and ``curves.png`` hold them against the steps. With
``--task=I --tasks=3`` the arms run side by side on one GPU; see docs/photographs.md.
"""

from gae_jax.sweep import Metric, Point, Sweep

FD = "FD, VGG16 ↓"


def point(name, bottleneck, kl, align):
    changes = {"model.bottleneck": bottleneck, "losses.kl": kl, "losses.align": align}
    return Point(name, {f"tokenizer.{key}": value for key, value in changes.items()})


def get_sweep():
    return Sweep(
        title="Aligned latents on photographs (Tiny-ImageNet, 64 pixels)",
        config="configs/tiny_imagenet.py",
        points=(
            point("gae", "norm", 0.0, 1.0),
            point("norm", "norm", 0.0, 0.0),
            point("kl", "kl", 0.1, 0.0),
        ),
        commands=(
            *("import-torch", "teacher", "tokenizer", "latents"),
            *("diffusion", "sample", "evaluate"),
        ),
        overrides={"sample.sets": ("ode",), "sample.ode.guidance": 1.0},
        metrics=(
            Metric(FD, "generation.ode.fd_vgg16_10k"),
            Metric("FD, EfficientNet ↓", "generation.ode.fd_efficientnet_lite0_10k"),
            Metric("judged right ↑", "generation.ode.judged_right", "{:.1%}"),
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
            Metric("SSIM ↑", "tokenizer.ssim", "{:.3f}"),
            Metric("LPIPS ↓", "tokenizer.lpips", "{:.3f}"),
        ),
        curves=(
            Metric("FD of 10,000 samples, VGG16", "eval/fd_vgg16_10k", "{:.0f}", "diffusion"),
            Metric(
                *("FD of 10,000 samples, EfficientNet", "eval/fd_efficientnet_lite0_10k"),
                *("{:.0f}", "diffusion"),
            ),
            Metric("judged right", "eval/judged_right", "{:.0%}", "diffusion"),
        ),
        seeds=(0,),
        noise=True,
        source="Tables 6 and 7",
        paper={
            "gae": {"rFID ↓": "0.45", "gFID ↓": "2.36"},
            "norm": {"rFID ↓": "0.764", "gFID ↓": "12.55"},
            "kl": {"rFID ↓": "0.977", "gFID ↓": "16.72"},
        },
        expectation="aligned latents generate better than latents without alignment, and a VAE's.",
        check=check,
    )


def check(means):
    gae, norm, kl = (means[name] for name in ("gae", "norm", "kl"))
    return [
        ("generation: gae better than norm", gae[FD] < norm[FD]),
        ("generation: norm better than kl", norm[FD] < kl[FD]),
        ("reconstruction: norm better than kl", norm["PSNR, dB ↑"] > kl["PSNR, dB ↑"]),
    ]
