"""The sections ``evaluate``, ``reference`` and ``likelihood``, and their checks."""

from gae_jax.config.choices import choice, choices
from gae_jax.tokenizers import sizes_of


def evaluate_section() -> dict:
    """What is measured of reconstructions, latents and samples."""
    return dict(
        images=50_000,  # [paper] held-out ones that are reconstructed, at most
        batch_size=256,
        # [code] adm | lightningdit: of input, target and reference of reconstruction
        crop=choice("adm", "data.images:CROPS"),
        # protocol of PSNR, SSIM, LPIPS and rFID: lightningdit_recon [inferred] | rae_recon
        reconstruction=choice("lightningdit_recon", "evaluation.presets:RECONSTRUCTION"),
        decode_steps=0,  # of a tokenizer whose decoder iterates; 0: the tokenizer's own
        lpips=True,  # with the run's VGG16 and heads, see import-torch
        noise_levels=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5),  # [paper] figure 4; the grid is ours
        # What generated sets and rFID are judged by: inception, the run's, see import-torch |
        # judge: a small classifier of 8 x 8 grey images, which knows digits | imagenet: the run's
        # EfficientNet-Lite0 and VGG16, which `import-torch` takes from registry packages | none
        features=choice("inception", "judge", "imagenet", "none"),
        # [paper] preset: adm | torch_fidelity | pytorch_fid
        generation=choice("adm", "evaluation.presets:GENERATION"),
        metrics=choices(
            ("fid", "sfid", "inception_score", "precision", "recall"),
            "evaluation.generation:SPACES",
        ),
        # what generated sets are compared with: a file of statistics (ADM's, pytorch-fid's, ours)
        # or samples; empty: the training images of this run
        reference="",
        # how images were resized for Inception, of statistics that do not say it: tf (ADM's,
        # torch-fidelity's, MAR's, JiT's) | pytorch_fid
        reference_front_end=choice("", "", "evaluation.generation:FRONT_ENDS"),
        allow_few=False,  # Frechet distances of no more images than dimensions
        kid_subset_size=1_000,  # images in a subset of KID
        inception_splits=0,  # of the Inception Score; 0: the preset's
        # [paper] sgd: appendix I | logistic: scikit-learn's, small sets | none
        linear_probe=choice("sgd", "logistic", "none"),
        sgd_probe=dict(
            # [paper] table 14
            heads=choices(("flatten", "mean"), "evaluation.sgd_probe:HEADS"),
            images=1_300_000,  # [ours] training images at most: all lie on the devices at once
            learning_rate=0.008,  # [paper]
            batch_size=2048,  # [paper]
            epochs=100,  # [paper]
            momentum=0.0,  # [ours]
            standardise=False,  # [ours]
            flips=True,  # [ours]
            drop_last=True,  # [ours]
            dtype="bfloat16",  # [ours] of the latents on the devices
            precision="highest",  # [ours]
        ),
        probe_images=20_000,  # at most, of each split, for the logistic probe and the judge
        diagnostics=True,  # of the latents: rank, neighbours, coherence, spectrum, continuity
        continuity_images=1_000,  # [ours] at most, for the last of these, where there is LPIPS
        # generated images of each set, of different classes, whose nearest training image is
        # looked for among all of them, to see whether they are copies; 0: none
        nearest=0,  # [ours]
        # folder with a label map for every held-out image (SEGMENTS/CLASS/NAME.png), with
        # data.name="folder": whether clusters of the latents' tokens follow them; empty: none
        segments="",
        segment_images=5_000,  # [ours] at most
        # The same evaluator while the diffusion model trains, at train.eval_every, on so many
        # images of its moving average; 0: none.
        online=dict(images=0, sampler=choice("ode", "sde"), steps=25),
    )


def reference_section() -> dict:
    """What `reference` keeps of the data, for FID and related metrics."""
    return dict(  # [ours]
        split=choice("train", "holdout"),
        images=10_000,  # that lie beside the statistics, as in ADM's files: precision and recall
        dinov2=False,  # statistics for FD-DINOv2 too, by the run's backbone
    )


def likelihood_section() -> dict:
    """How `likelihood` integrates the flow's ODE."""
    return dict(  # [ours] all of it
        images=1_000,  # held-out ones, at most
        batch_size=64,
        steps=101,  # points of the grid; Heun's method, two network calls a step
        time_shift=1.0,
    )


def evaluate_clashes(config) -> list[str]:
    """List the problems of the section ``evaluate``."""
    section, problems = config.evaluate, []
    if "fd_dinov2" in section.metrics:
        problems.append(
            "evaluate.metrics has fd_dinov2, which evaluate-samples computes: --dinov2=FILE"
        )
    if section.sgd_probe.images < 1:
        problems.append(f"evaluate.sgd_probe.images is {section.sgd_probe.images}; give 1 or more")
    levels = list(section.noise_levels)
    if levels != sorted(set(levels)):
        problems.append(f"evaluate.noise_levels {tuple(levels)} must increase")
    steps = section.decode_steps
    if steps and "decode_steps" not in sizes_of(config.tokenizer):
        problems.append(
            f"evaluate.decode_steps is {steps}, but the decoder of tokenizer "
            f"{config.tokenizer.name!r} makes no steps; leave it at 0"
        )
    return problems
