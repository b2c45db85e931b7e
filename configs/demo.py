"""The whole pipeline on scikit-learn's handwritten digits, on two CPU cores.

    python -m gae_jax demo --config=configs/demo.py

Every field is explained in gae_jax/config/; all values here are ours, chosen for the digits.
"""

from gae_jax.config import default_config


def get_config():
    config = default_config()
    config.data.update(name="digits", holdout=0.2, image_size=32, mirror=False, workers=2)
    vit = dict(image_size=32, patch_size=8, embed_dim=96, num_heads=4)

    config.backbone.name = "vit"
    config.backbone.vit.update(**vit, num_layers=3)
    config.backbone.shift = 3
    config.backbone.optim.update(learning_rate=2e-3, end_learning_rate=1e-5, warmup_steps=50)
    config.backbone.train.update(
        steps=600, batch_size=64, log_every=50, eval_every=200, save_every=300
    )

    config.teacher.model.update(latent_dim=8, decoder_layers=2, window_size=2, heads=2)
    config.teacher.optim.update(learning_rate=2e-3, end_learning_rate=2e-5, warmup_steps=50)
    config.teacher.train.update(
        steps=300, batch_size=64, log_every=50, eval_every=150, save_every=150
    )

    config.tokenizer.model.update(**vit, num_layers=4, latent_dim=8, patch_init="fan_in")
    config.tokenizer.perceptual.name = "backbone"
    config.tokenizer.health.window = 200
    config.tokenizer.discriminator.update(ndf=16, n_layers=2)
    config.tokenizer.losses.update(l1=1.0, perceptual=0.2, gan=0.01, align=0.5)
    config.tokenizer.gan.update(start=1200, discriminator_start=1000, ramp=200)
    config.tokenizer.optim.update(learning_rate=4e-3, end_learning_rate=2e-5, warmup_steps=100)
    config.tokenizer.discriminator_optim.update(
        learning_rate=2e-4, end_learning_rate=2e-5, warmup_steps=100
    )
    config.tokenizer.train.update(
        steps=1500, batch_size=32, log_every=50, eval_every=300, save_every=300
    )

    config.latents.update(batch_size=128, shard_size=1024)

    config.diffusion.model.update(hidden_size=96, depth=5, num_heads=4, num_classes=10)
    config.precision.override = ("diffusion.dtype=float32",)
    config.diffusion.ema_decay = 0.99
    config.diffusion.optim.update(
        learning_rate=2e-3, end_learning_rate=1e-5, warmup_steps=50, clip_norm=1.0
    )
    config.diffusion.train.update(
        steps=1400, batch_size=48, log_every=50, eval_every=0, save_every=350
    )

    config.sample.update(per_class=50, batch_size=250)
    config.sample.sde.update(steps=60, start=1e-3, time_shift=0.6, last_step_size=0.02)
    config.sample.ode.update(steps=40, time_shift=0.6, guidance=1.5, guidance_start=0.3)

    config.evaluate.update(batch_size=120, lpips=False, features="judge", linear_probe="logistic")
    return config
