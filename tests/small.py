"""A config that runs every stage in seconds."""

from gae_jax.config import default_config


def get_config():
    """The digits pipeline at a size that trains in seconds; shapes as in the demo."""
    config = default_config()
    config.data.update(name="digits", holdout=0.2, image_size=16, mirror=False, workers=2)
    vit = dict(image_size=16, patch_size=4, embed_dim=32, num_heads=2, num_layers=1)
    config.backbone.name = "vit"
    config.backbone.vit.update(**vit)
    config.teacher.model.update(latent_dim=4, decoder_layers=1, window_size=2, heads=1)
    config.tokenizer.model.update(**vit, latent_dim=4)
    config.tokenizer.perceptual.name = "backbone"
    config.tokenizer.health.update(pictures=4, probe=64, window=4)
    config.tokenizer.discriminator.update(ndf=8, n_layers=1)
    config.tokenizer.gan.update(start=4, discriminator_start=2, ramp=2)
    config.diffusion.model.update(hidden_size=32, depth=1, num_heads=2, num_classes=10)
    config.precision.override = ("diffusion.dtype=float32",)
    for name in ("backbone", "teacher", "tokenizer", "diffusion"):
        config[name].optim.update(learning_rate=1e-3, end_learning_rate=1e-4, warmup_steps=2)
        config[name].train.update(steps=6, batch_size=16, log_every=2, eval_every=0, save_every=3)
    config.latents.update(batch_size=64, shard_size=500)
    config.sample.update(per_class=2, batch_size=8)
    config.sample.sde.update(steps=3, start=1e-2)
    config.sample.ode.update(steps=3)
    config.evaluate.update(
        batch_size=64, lpips=False, features="judge", linear_probe="logistic", nearest=3
    )
    config.likelihood.update(images=20, batch_size=16, steps=3)
    return config
