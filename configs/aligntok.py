"""AlignTok: a foundation encoder that becomes a tokenizer in three phases (arXiv 2509.25162).

    python -m gae_jax import-torch --config=configs/aligntok.py \\
        --config.import_torch.backbone=dinov2_vitl14_pretrain.pth \\
        --config.import_torch.vgg=VGG16 --config.import_torch.lpips_heads=HEADS
    python -m gae_jax tokenizer --config=configs/aligntok.py --config.data.root=IMAGENET
    python -m gae_jax demo --config=configs/aligntok.py:digits

The argument behind a colon: full (d = 32), d64, siglip2 or mae (the paper's other encoders), vit
(GAE's decoder instead of VA-VAE's: ours), lora (the encoder stays, low-rank updates of it
learn), digits or digits_lora. The weight of the alignment, w_sp in the paper, is
tokenizer.losses.align; its arms are tokenizer.align.point=pre (before the adapter) and
tokenizer.align.loss=cosine.

No code is released and the paper's text was not at hand: [second hand] is quoted from reviews and
notes, [code] is VA-VAE's, on which the paper builds. Steps, batch and optimizer are [ours].
"""

from pathlib import Path

from gae_jax.config import default_config, load_config, preset
from gae_jax.pretrained import mae, siglip

EPOCH = 5_004  # batches of 256 images of ImageNet
RECONSTRUCTION = ("l1", "perceptual", "gan")


def of_tokenizer(**changes):
    """Changes of its section, as those of the whole config."""
    return dict(tokenizer=dict(aligntok=changes))


PRESETS = {
    "full": {},
    "d64": of_tokenizer(latent_dim=64),  # [second hand]
    # [second hand] that they were tried, with the same recipe; that they are L, as wide as DINOv2-L
    # (google/siglip2-large-patch16-256, facebook/vit-mae-large), is [ours]
    "siglip2": dict(backbone=dict(name="siglip", siglip=siglip.PRESETS["large"])),
    "mae": dict(backbone=dict(name="mae", mae=mae.PRESETS["large"])),
    "vit": of_tokenizer(decoder="vit"),  # [ours]
    # [ours] that it is an arm: [second hand]
    "lora": of_tokenizer(lora=dict(rank=16, alpha=16.0)),
    "digits": {},
    "digits_lora": of_tokenizer(lora=dict(rank=4, alpha=4.0)),  # [ours]
}


def phases(first, second, third):
    """Of the paper, with so many steps each; the discriminator goes on through all of them."""
    learned = r"^(tokenizer/({})|discriminator)/".format
    every = (
        (first, learned("adapter|decoder"), RECONSTRUCTION),
        (second, "", (*RECONSTRUCTION, "align")),
        (third, learned("decoder"), RECONSTRUCTION),
    )
    return tuple(phase for phase in every if phase[0])


def get_config(size="full"):
    changes = preset(PRESETS, size, "AlignTok")
    config = digits() if size.startswith("digits") else full()
    config.update(changes)
    if size.endswith("lora"):
        config.tokenizer.optim.scales = ()  # [ours] updates learn as fast as all the rest
    return config


def common(config):
    config.tokenizer.name = "aligntok"
    # [second hand] w_sp is 1 on ImageNet, 3 on LAION; that it weighs a mean is [ours]
    config.tokenizer.losses.update(l1=1.0, perceptual=1.0, gan=0.5, align=1.0)
    config.tokenizer.align.update(target="snapshot", point="latent", loss="mse")
    config.tokenizer.gan.update(loss="hinge", weight="adaptive")  # [second hand]
    scales = ((r"^encoder/", 0.1),)  # [ours] the foundation encoder learns ten times slower
    config.tokenizer.optim.update(scales=scales, clip_norm=1.0)
    return config


def full():
    config = common(default_config())
    config.tokenizer.phases = phases(10 * EPOCH, 30 * EPOCH, 10 * EPOCH)
    config.tokenizer.train.update(steps=50 * EPOCH, batch_size=256)
    config.tokenizer.gan.update(start=5_000, discriminator_start=5_000)  # [code]
    adam = dict(learning_rate=1e-4, end_learning_rate=1e-4, warmup_steps=0, b1=0.5, b2=0.9)
    config.tokenizer.optim.update(**adam, weight_decay=0.0)
    config.tokenizer.discriminator_optim.update(**adam, weight_decay=0.0)
    config.tokenizer.ema_decay = 0.999  # [second hand] that there is one; the value is [ours]
    config.precision.override += ("tokenizer.dtype=bfloat16",)
    for name in ("latents", "sample", "evaluate"):  # [ours] 256 images are 8 GiB in every layer
        config[name].batch_size = 64  # of 128 channels at 256 x 256, in fp32
    config.diffusion.train.steps = 80_000  # [second hand] 64 epochs
    # [code] of LightningDiT; the paper takes the best scale of each model
    config.sample.ode.update(time_shift=0.3, guidance=10.0, guidance_start=0.11)
    config.sample.ode.guidance_channels = 3
    return config


def digits():
    config = common(load_config(Path(__file__).parent, "demo"))
    config.tokenizer.aligntok.update(latent_dim=8, hidden=96)
    config.tokenizer.aligntok.conv.update(
        ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=0, attn_resolutions=(), resolution=32
    )
    config.tokenizer.aligntok.vit.update(embed_dim=96, num_layers=4, num_heads=4)
    config.tokenizer.losses.update(perceptual=0.2, gan=0.1)
    config.tokenizer.phases = phases(200, 500, 200)
    config.tokenizer.gan.update(start=150, discriminator_start=100, ramp=50)
    config.tokenizer.optim.update(
        learning_rate=2e-3, end_learning_rate=2e-4, warmup_steps=20, restart=True
    )
    config.tokenizer.train.update(steps=900, batch_size=16)
    return config
