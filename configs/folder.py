"""Your own images: a directory with one folder per class, on one accelerator.

    python -m gae_jax demo --config=configs/folder.py --workdir=runs/mine \
        --config.data.root=/data/mine --config.diffusion.model.num_classes=37

64 x 64 pixels, 8 x 8 latents of 16 channels. All values are ours and a starting point: nothing
here was tuned on a particular set of images.
"""

from gae_jax.config import default_config


def get_config():
    config = default_config()
    config.data.update(holdout=0.1, image_size=64, crop="random", mirror=True)
    vit = dict(image_size=64, patch_size=8, embed_dim=384, num_heads=6)

    config.backbone.name = "vit"
    config.backbone.vit.update(**vit, num_layers=6)
    config.backbone.shift = 4
    config.backbone.train.update(steps=10_000, batch_size=256, save_every=1_000)

    config.teacher.model.update(latent_dim=16, heads=6)
    config.teacher.train.update(steps=5_000, batch_size=256, save_every=1_000)

    config.tokenizer.model.update(**vit, num_layers=8, latent_dim=16, patch_init="fan_in")
    config.tokenizer.perceptual.name = "backbone"  # "lpips" once its weights are imported
    config.tokenizer.losses.gan = 0.1
    config.tokenizer.gan.update(start=10_000, discriminator_start=8_000, ramp=2_000)
    config.tokenizer.optim.warmup_steps = 1_000
    config.tokenizer.discriminator_optim.update(
        learning_rate=1e-4, end_learning_rate=1e-5, warmup_steps=1_000
    )
    config.tokenizer.train.update(steps=40_000, batch_size=128, save_every=2_000)

    config.diffusion.model.update(hidden_size=384, depth=12, num_heads=6)
    config.precision.override = ("diffusion.dtype=float32",)
    config.diffusion.ema_decay = 0.999
    config.diffusion.optim.clip_norm = 1.0
    config.diffusion.train.update(steps=60_000, batch_size=256, save_every=2_000)
    # with the networks of LPIPS and FID imported, take these lines out
    config.evaluate.update(lpips=False, features="judge", linear_probe="logistic")
    return config
