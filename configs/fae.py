"""FAE, "One Layer Is Enough" (arXiv 2512.07829), on DINOv2-g; :siglip2; or :digits.

":siglip2" is on the vision tower of google/siglip2-giant-opt-patch16-256, the paper's other
backbone [paper], which is as wide. The noise on its features is DINOv2's [ours]: the paper goes by
their norm and gives no number.

    python -m gae_jax import-torch --config=configs/fae.py --workdir=runs/fae \\
        --config.import_torch.backbone=dinov2_vitg14_pretrain.pth  # and vgg, lpips_heads, inception
    python -m gae_jax tokenizer --config=configs/fae.py --workdir=runs/fae \\
        --config.data.root=IMAGENET
    python -m gae_jax demo --config=configs/fae.py:digits

No code was released. [paper] is its text, [inferred] follows from its parameter counts, [ours]
where it says nothing. Its phases have batches of 1024 (features) and 512 (pixels); here all have
512. Its generator reads sampled latents or means, it does not say; here means.
"""

from functools import partial
from pathlib import Path

from gae_jax.config import default_config, load_config, preset
from gae_jax.pretrained import dinov2, siglip

BACKBONES = {
    "dinov2": dinov2.PRESETS["giant"],  # [paper] without registers
    "siglip": siglip.PRESETS["giant_opt"],  # [paper]
}
# Paths of parameters that learn.
FEATURES, PIXELS = r"^tokenizer/autoencoder/", r"^(tokenizer/decoder|discriminator)/"
PIXEL_TERMS = ("l1", "perceptual", "gan")


def phases(features: int, noisy: int, restored: int) -> tuple:
    """The three phases, of so many steps. [paper]"""
    return (
        (features, FEATURES, ("features", "kl"), "features"),
        (noisy, PIXELS, PIXEL_TERMS, "noisy_features"),
        (restored, PIXELS, PIXEL_TERMS, "restored_features"),
    )


def full(backbone="dinov2"):
    config = default_config()
    config.data.crop = "random"  # [ours]
    config.backbone.name = backbone
    config.backbone[backbone].update(BACKBONES[backbone])
    tokenizer = config.tokenizer
    tokenizer.name = "fae"
    tokenizer.losses.update(
        features=1.0,  # [paper]
        kl=1e-4,  # [ours] beta, of a mean over elements; to be tried: 1e-6 to 1e-3
        l1=1.0,  # [ours] the terms are TiTok's by the paper, the weights GAE's
        perceptual=1.0,  # [ours]
        gan=0.5,  # [ours]
        align=0.0,
    )
    steps = (1_000_000, 1_000_000, 100_000)  # [paper] but for the last, [ours]
    tokenizer.phases = phases(*steps)
    tokenizer.gan.update(  # [ours] as GAE: the generator sees it 5000 steps after it starts
        discriminator_start=steps[0], start=steps[0] + 5_000
    )
    tokenizer.optim.update(
        learning_rate=1e-4,  # [paper]
        end_learning_rate=0.0,  # [ours]
        warmup_steps=1_000,  # [paper]
        restart=True,  # [paper] a schedule for each phase
        b2=0.999,  # [paper]
        weight_decay=0.0,  # [ours]
        clip_norm=1.0,  # [ours]
    )
    tokenizer.ema_decay = 0.999  # [ours]
    tokenizer.train.update(steps=sum(steps), batch_size=512)  # [paper] of pixels
    config.precision.override += ("tokenizer.dtype=bfloat16",)  # [ours]

    diffusion = config.diffusion
    diffusion.flow.update(
        time_shift=0.4,  # [ours] the paper gives one shift and does not say whether of training
        cosine_weight=0.0,  # [paper] plain squares
    )
    diffusion.optim.update(learning_rate=1e-4, end_learning_rate=1e-4, b2=0.999)  # [paper]
    diffusion.train.update(steps=2_000_000, batch_size=512)  # [paper] 800 epochs

    # [paper] w_t = sigma_t; [ours] read as in SiT's code, noise sqrt(2 sigma); norm=0.5 is the text
    config.sample.sde.update(
        time_shift=0.4,  # [paper]
        form="sigma",
        norm=1.0,
        last_step_size=0.04,  # [ours] as SiT
    )
    config.sample.ode.update(
        time_shift=0.4,  # [paper]
        guidance=1.0,
        # [paper] 0.9, none, 2.5 for t in [0.9, 1], [0.7, 0.9), [0, 0.7), which begins at data there
        guidance_parts=((0.1, 0.9), (0.3, 1.0), (1.0, 2.5)),
    )
    return config


def digits():
    """All values are ours, chosen for the digits; the backbone is the demo's small ViT."""
    config = load_config(Path(__file__).parent, "demo")
    tokenizer = config.tokenizer
    tokenizer.name = "fae"
    tokenizer.fae.update(
        latent_dim=8, encoder_heads=4, encoder_head_dim=32, decoder_depth=2, decoder_heads=4,
        decoder_hidden=256, pixel_dim=96, pixel_depth=4, pixel_heads=4, pixel_hidden=256,
    )  # fmt: skip
    tokenizer.losses.update(features=1.0, kl=1e-4, align=0.0)
    tokenizer.phases = phases(500, 700, 300)
    tokenizer.optim.update(learning_rate=2e-3, warmup_steps=50, restart=True, weight_decay=0.0)
    config.diffusion.flow.cosine_weight = 0.0
    config.sample.sde.form = "sigma"
    config.sample.ode.update(
        guidance=1.0, guidance_parts=((0.1, 0.9), (0.3, 1.0), (1.0, 1.5)), guidance_start=0.0
    )
    return config


def get_config(size="full"):
    makers = {"full": full, "siglip2": partial(full, "siglip"), "digits": digits}
    return preset(makers, size, "size")()
