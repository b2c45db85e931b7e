"""RAE (arXiv 2510.11690) on DINOv2-B with registers; :weak, its weaker model; or :digits.

":siglip2" and ":mae" are the paper's other encoders (google/siglip2-base-patch16-256,
facebook/vit-mae-base), of as many channels, with all else as it is [code].

    python -m gae_jax import-torch --config=configs/rae.py --workdir=runs/rae \\
        --config.import_torch.backbone=model.safetensors  # facebook/dinov2-with-registers-base
        --config.import_torch.dino=dino_deitsmall8_pretrain.pth  # and vgg, lpips_heads, inception
    python -m gae_jax tokenizer --config=configs/rae.py --workdir=runs/rae \\
        --config.data.root=IMAGENET
    python -m gae_jax demo --config=configs/rae.py:digits

Autoguidance is by a run of configs/rae.py:weak on the same latents (a copy of the run with
another diffusion model):

    python -m gae_jax sample --config=configs/rae.py --workdir=runs/rae \\
        --config.sample.weaker=runs/rae-weak --config.sample.ode.guidance=1.42

[code] is bytetriper/RAE, [paper] its text. Of the code's data two things differ here: crops for the
decoder are ADM's random ones (the code resizes the short side to 384), and they are mirrored. And
latents are computed once and kept, where the code computes them in every step: for ImageNet and
its mirror images that is 1 TB in bfloat16 (2 x 1.28 M x 196 608 numbers).
"""

import math
from functools import partial
from pathlib import Path

from gae_jax.config import default_config, load_config, preset
from gae_jax.generators.ddt import SIZES
from gae_jax.pretrained import dinov2, mae, siglip

EPOCH = 2_502  # steps of 512 of ImageNet's 1 281 167 images

BACKBONES = {  # [code] of 16 x 16 tokens with 768 channels each
    "dinov2": dinov2.PRESETS["base_registers"] | dict(interpolate_offset=0.0),
    "mae": mae.PRESETS["base"],
    "siglip": siglip.PRESETS["base"],
}


def full(backbone="dinov2"):
    config = default_config()
    config.data.crop = "random"
    config.backbone.name = backbone
    config.backbone[backbone].update(BACKBONES[backbone])
    tokenizer = config.tokenizer
    tokenizer.name = "rae"
    tokenizer.losses.update(l1=1.0, perceptual=1.0, gan=0.75, align=0.0)  # [code]
    tokenizer.discriminator.update(name="dino", augment=("translation", "brightness", "saturation",
                                                         "contrast"))  # fmt: skip
    tokenizer.gan.update(  # [code]
        weight="adaptive",
        eps=1e-6,
        fresh=True,
        discriminator_start=6 * EPOCH,
        start=8 * EPOCH,
    )
    for section in (tokenizer.optim, tokenizer.discriminator_optim):
        section.update(  # [code]
            learning_rate=2e-4, end_learning_rate=2e-5, warmup_steps=EPOCH, b2=0.95,
            weight_decay=0.0,
        )  # fmt: skip
    tokenizer.ema_decay = 0.9978  # [code]
    tokenizer.train.update(steps=16 * EPOCH, batch_size=512)  # [code]

    # [code] statistics of elements; the released file of DINOv2-B has no mean
    config.latents.update(statistics="element", dtype="bfloat16")

    diffusion = config.diffusion
    diffusion.name = "ddt"  # DiT-DH-XL
    diffusion.flow.update(  # [code]; shifts are 1 / sqrt(16 * 16 * 768 / 4096) with t = 0 as noise
        time_shift=1 / math.sqrt(48), time_least=1e-3, cosine_weight=0.0
    )
    diffusion.ema_decay = 0.9995  # [code]
    diffusion.optim.update(  # [code] the peak until epoch 40, then linear
        end_learning_rate=2e-5, decay="linear", hold_steps=40 * 1251, clip_norm=1.0
    )
    diffusion.train.steps = 800 * 1251  # [paper]
    config.precision.override += ("diffusion.dtype=float32",)  # [code]

    config.sample.sets = ("ode",)
    config.sample.ode.update(  # [code] 49 calls; sample.labels="uniform" is its balanced protocol
        steps=50, end=0.999, time_shift=1 / math.sqrt(48), guidance=1.0, guidance_start=0.0
    )
    config.evaluate.reconstruction = "rae_recon"
    return config


def weak():
    """DiT-DH-S after 14 epochs, for autoguidance. [code]"""
    config = full()
    sizes = SIZES["DH-S"]
    for name in ("hidden_size", "depth", "num_heads"):
        config.diffusion.model[name], config.diffusion.head[name] = sizes[name]
    config.diffusion.train.steps = 14 * 1251
    return config


def digits():
    """All values are ours, chosen for the digits; the backbone is the demo's small ViT.

    The discriminator looks at features of a small DINO with random weights, which never learn.
    """
    config = load_config(Path(__file__).parent, "demo")
    tokenizer = config.tokenizer
    tokenizer.name = "rae"
    tokenizer.rae.update(
        patch_size=8, decoder_hidden_size=96, decoder_num_hidden_layers=4,
        decoder_num_attention_heads=4, decoder_intermediate_size=256,
    )  # fmt: skip
    tokenizer.losses.update(gan=0.1, align=0.0)
    tokenizer.discriminator.update(name="dino", augment=("translation", "brightness"))
    tokenizer.discriminator.dino.update(
        weights="random", embed_dim=48, depth=3, num_heads=4, image_size=32, patch_size=4,
        key_depths=(0, 2), ks=5,
    )  # fmt: skip
    steps = tokenizer.train.steps
    tokenizer.gan.update(  # the paper's shares of the training
        weight="adaptive", eps=1e-6, fresh=True, discriminator_start=steps * 6 // 16,
        start=steps * 8 // 16, ramp=0,
    )  # fmt: skip
    tokenizer.optim.learning_rate = 2e-3
    config.latents.statistics = "element"
    config.diffusion.name = "ddt"
    config.diffusion.head.update(hidden_size=192, depth=2, num_heads=4)
    # latents of 1,536 correlated numbers show their class early: without the shift hardly any
    # training fell on the times at which classes are decided, and samples ignored them
    shift = 0.3
    config.diffusion.flow.update(time_shift=shift, time_least=1e-3, cosine_weight=0.0)
    config.sample.sde.update(time_shift=shift)
    config.sample.ode.update(end=0.999, time_shift=shift, guidance=1.0, guidance_start=0.0)
    return config


def get_config(size="full"):
    makers = {"full": full, "weak": weak, "digits": digits}
    makers |= {"mae": partial(full, "mae"), "siglip2": partial(full, "siglip")}
    return preset(makers, size, "size")()
