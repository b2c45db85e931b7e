"""DGAE: a convolutional KL encoder with a diffusion model as decoder (arXiv 2506.09644).

    python -m gae_jax tokenizer --config=configs/dgae.py --config.data.root=IMAGENET
    python -m gae_jax demo --config=configs/dgae.py:digits --workdir=runs/dgae-digits

The argument behind the colon:

    full      16 x 16 x 16 latents of 256 pixels, decoder L; the same as f16-L
    f8, f16, f32, with -B, -M, -L, -XL or -H behind it: 32 x 32 x 4, 16 x 16 x 16 or 8 x 8 x 32
              latents, and the size of the decoder (L where none is given)
    digits    scikit-learn's digits on two CPU cores

Of the paper's text only the abstract and the introduction's beginning were at hand. [paper] is what
they say, [second hand] what summaries of it say or what epsilon-VAE (arXiv 2410.04081), its nearest
relative, does; what neither says is [ours]. None of the figures below is known to be DGAE's.

A second stage for a better decoder on the same latents is two phases [ours]:
``--config.tokenizer.phases="((1000000, '', ('velocity', 'perceptual', 'kl')), (200000,
'^tokenizer/decoder', ('velocity', 'perceptual')))"`` with tokenizer.train.steps=1200000.
"""

from pathlib import Path

from gae_jax.config import default_config, load_config, preset
from gae_jax.tokenizers.dgae_kind import DECODERS, LATENTS, kl_weight

PRESETS = {
    "full": ("f16", "L"),
    **{latents: (latents, "L") for latents in LATENTS},
    **{f"{latents}-{size}": (latents, size) for latents in LATENTS for size in DECODERS},
    "digits": None,
}


def get_config(size="full"):
    found = preset(PRESETS, size, "size")
    return full(*found) if found else digits()


def full(latents: str, decoder: str):
    config = default_config()
    config.data.update(crop="random", image_size=256)  # [second hand] with flips
    tokenizer, of = config.tokenizer, dict(LATENTS[latents])
    tokenizer.name = "dgae"
    tokenizer.dgae.encoder.ch_mult = of.pop("ch_mult")
    tokenizer.dgae.update(of)
    tokenizer.dgae.decoder.update(DECODERS[decoder])
    objective(config)
    tokenizer.losses.perceptual = 0.5  # [second hand]
    tokenizer.ema_decay = 0.999  # [ours]
    tokenizer.optim.update(  # [second hand] Adam
        learning_rate=1e-4,
        end_learning_rate=1e-4,
        warmup_steps=5_000,
        b1=0.0,
        b2=0.999,
        weight_decay=0.0,
    )
    tokenizer.train.update(steps=1_000_000, batch_size=256)  # [second hand]
    config.precision.override += ("tokenizer.dtype=bfloat16",)  # [second hand] DiTo
    for name in ("latents", "sample", "evaluate"):  # [ours] 256 images are 8 GiB in every layer
        config[name].batch_size = 64  # of 128 channels at 256 x 256, in fp32
    if latents == "f8":
        config.diffusion.model.patch_size = 2  # [ours]
    return config


def digits():
    """All values are ours."""
    config = load_config(Path(__file__).parent, "demo")
    tokenizer = config.tokenizer
    tokenizer.name = "dgae"
    tokenizer.dgae.update(
        latent_dim=8,
        encoder=dict(ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1),
        decoder=dict(
            model_channels=32,
            channel_mult=(1, 1, 2),
            num_res_blocks=0,
            attention_resolutions=(),
            num_head_channels=32,
            resblock_updown=False,
        ),
    )
    objective(config)
    tokenizer.losses.perceptual = 0.2
    tokenizer.ema_decay = 0.99
    tokenizer.optim.update(
        learning_rate=2e-3,
        end_learning_rate=2e-5,
        warmup_steps=50,
        b2=0.99,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    tokenizer.train.update(steps=1000, batch_size=16, eval_every=500, save_every=500)
    return config


def objective(config):
    """[paper] denoising score matching, KL and a perceptual term, and no discriminator."""
    section, size = config.tokenizer.dgae, config.data.image_size
    grid = size // 2 ** (len(section.encoder.ch_mult) - 1)
    config.tokenizer.losses.update(
        l1=0.0,
        gan=0.0,
        align=0.0,
        velocity=1.0,
        kl=kl_weight((grid, grid, section.latent_dim), size, 1e-6),  # [ours] LDM's rule
    )
