"""VA-VAE (arXiv 2501.01423), and the KL-VAE without its alignment: the convolutional baselines.

    python -m gae_jax tokenizer --config=configs/vavae.py --config.data.root=IMAGENET
    python -m gae_jax import-torch --config=configs/vavae.py \\
        --config.import_torch.tokenizer=vavae-imagenet256-f16d32-dinov2.pt
    python -m gae_jax demo --config=configs/vavae.py:digits

The argument behind a colon: full (VA-VAE, f16, 32 channels), klvae (the same without alignment),
sdvae (Stable Diffusion's, f8, 4 channels), or digits, klvae_digits, sdvae_digits.

[code] is hustvl/LightningDiT's training of VA-VAE, in the 50-epoch setting, as copies and excerpts
have it: the repository itself was not at hand. It sums the pixels' terms and the KL divergence over
an image where ours are means: the KL weight is divided by the ratio of their numbers. Its alignment
is weighted by gradients at the encoder's last layer (align.weight="adaptive"), of which the factor
of the means is none; on the digits the weight is constant.
"""

from pathlib import Path

from gae_jax.config import default_config, load_config, preset
from gae_jax.tokenizers.conv_kind import PRESETS as SIZES

ARMS = {
    "full": "vavae",
    "klvae": "klvae",
    "sdvae": "sdvae",
    "digits": "vavae",
    "klvae_digits": "klvae",
    "sdvae_digits": "sdvae",
}
EPOCH = 5_004  # batches of 256 images of ImageNet


def get_config(size="full"):
    arm = preset(ARMS, size, "convolutional autoencoder")
    config = digits(arm) if size.endswith("digits") else full(arm)
    conv, image_size = config.tokenizer.conv, config.data.image_size
    config.tokenizer.name = "conv"
    values = (image_size // 2 ** (len(conv.ch_mult) - 1)) ** 2 * conv.embed_dim
    config.tokenizer.losses.kl = 1e-6 * values / (3 * image_size**2)  # [code] 1e-6 on sums
    if arm != "vavae":
        config.tokenizer.losses.align = 0.0
    config.tokenizer.align.update(point="post", loss="vf")  # [code]
    return config


def full(arm):
    config = default_config()
    config.tokenizer.conv.update(SIZES["sdvae" if arm == "sdvae" else "vavae"])  # [code]
    config.tokenizer.losses.update(l1=1.0, perceptual=1.0, gan=0.5)  # [code]
    config.tokenizer.losses.align = 0.1  # [code] vf_weight
    if arm == "vavae":
        config.tokenizer.align.weight = "adaptive"  # [code] adaptive_vf
    config.tokenizer.gan.update(loss="hinge", weight="adaptive")  # [code]
    config.tokenizer.gan.update(start=5_000, discriminator_start=5_000)  # [code]
    adam = dict(learning_rate=1e-4, end_learning_rate=1e-4, warmup_steps=0, b1=0.5, b2=0.9)
    config.tokenizer.optim.update(**adam, weight_decay=0.0)  # [code]
    config.tokenizer.discriminator_optim.update(**adam, weight_decay=0.0)  # [code]
    config.tokenizer.train.update(steps=50 * EPOCH, batch_size=256)  # [code]
    for name in ("latents", "sample", "evaluate"):  # [ours] 256 images are 8 GiB in every layer
        config[name].batch_size = 64  # of 128 channels at 256 x 256, in fp32
    config.diffusion.train.steps = 80_000  # [code] of LightningDiT, 64 epochs
    config.sample.ode.update(time_shift=0.3, guidance=10.0, guidance_start=0.11)  # [code]
    config.sample.ode.guidance_channels = 3  # [code]
    return config


def digits(arm):
    config = load_config(Path(__file__).parent, "demo")
    sizes = dict(ch=32, num_res_blocks=1, resolution=32)
    config.tokenizer.conv.update(
        dict(ch_mult=(1, 1, 1), attn_resolutions=(), z_channels=4, embed_dim=4, **sizes)
        if arm == "sdvae"
        else dict(ch_mult=(1, 1, 1, 1), attn_resolutions=(), z_channels=8, embed_dim=8, **sizes)
    )
    # [ours] the alignment's weight is constant here: with it docs/family.md's figures were measured
    config.tokenizer.losses.update(perceptual=0.2, gan=0.1, align=0.1)
    config.tokenizer.gan.update(weight="adaptive", start=400, discriminator_start=300, ramp=100)
    config.tokenizer.optim.update(
        learning_rate=2e-3, end_learning_rate=2e-5, warmup_steps=50, clip_norm=1.0
    )
    config.tokenizer.train.update(steps=600, batch_size=16)
    return config
