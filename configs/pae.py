"""PAE (arXiv 2605.07915) at the paper's size, and on the digits.

    python -m gae_jax teacher --config=configs/pae.py --workdir=runs/pae --config.data.root=IMAGENET
    python -m gae_jax tokenizer --config=configs/pae.py ...       then latents, diffusion, sample
    python -m gae_jax demo --config=configs/pae.py:digits

The encoder comes first (`import-torch` with --config.import_torch.backbone=FILE), and VGG16 for
LPIPS. It is DINOv2-L with registers (facebook/dinov2-with-registers-large); ":dinov3", ":mae" and
":siglip2" are the paper's others (facebook/dinov3-vitl16-pretrain-lvd1689m, facebook/vit-mae-large,
google/siglip2-so400m-patch16-256), with all else as it is. ":full_800ep" is the longer run of the
diffusion model. [second hand]: the paper through a digest; [code]: the release, which has sampling
and the diffusion model's training only; [RAE]: the tokenizer's training is not released, this is
the recipe of RAE, on whose code PAE is built; the rest as in gae_jax/config/.
"""

from functools import partial
from pathlib import Path

from gae_jax.config import default_config, load_config, preset
from gae_jax.pretrained import dinov2, dinov3, mae, siglip
from gae_jax.tokenizers.pae_losses import ANGLES

EPOCH = 1_281_167  # images of ImageNet
# PAE's own terms: [second hand]
PRIOR = dict(align=0.0, structure=0.2, semantics=1.0, continuity=0.5)
# [code] The frozen encoders, of 16 x 16 tokens each. Modulator and bottleneck are as wide as they
# are, with as many heads: 16. Positions of DINOv2 are interpolated as transformers does.
BACKBONES = {
    "dinov2": dinov2.PRESETS["large_registers"] | dict(interpolate_offset=0.0),
    "dinov3": dinov3.PRESETS["large"],
    "mae": mae.PRESETS["large"],
    "siglip": siglip.PRESETS["so400m"],
}


def get_config(size="full"):
    makers = {"full": full, "full_800ep": full_800ep, "digits": digits}
    for name, backbone in (("dinov3", "dinov3"), ("mae", "mae"), ("siglip2", "siglip")):
        makers[name] = partial(full, backbone)
    return preset(makers, size, "PAE")()


def full(backbone="dinov2"):
    config = default_config()
    config.data.crop = "random"  # [ours] ADM's; [RAE] short side 384, then a random crop of 256
    config.backbone.name = backbone
    config.backbone[backbone].update(BACKBONES[backbone])

    # Stage 0. The schedule is that of GAE's teacher as far as it is known, [ours] for PAE.
    steps = 25 * EPOCH // 1024
    config.teacher.kind = "prior"
    config.teacher.prior.update(reference="image_guided", strength=0.4)  # [second hand], see there
    config.teacher.model.update(latent_dim=32, decoder_layers=4, heads=16)  # [second hand]
    config.teacher.optim.update(
        learning_rate=1e-4, end_learning_rate=1e-5, warmup_steps=steps // 20, b2=0.98
    )
    config.teacher.train.update(steps=steps, batch_size=1024)

    config.tokenizer.name = "pae"
    config.tokenizer.pae.update(delta_depth=6, latent_dim=32, angles=ANGLES)  # [second hand]
    config.tokenizer.from_teacher = (("pae/latent_compressor", "latent_compressor"),)  # [ours]
    # [second hand]: L1 1, LPIPS 1, GAN 0.5. L1 is of images in [0, 1] [RAE]; ours are in [-1, 1]
    config.tokenizer.losses.update(l1=0.5, perceptual=1.0, gan=0.5, **PRIOR)
    # [ours] GAE's discriminator and start, whose weight is PAE's; [RAE] has a DINO discriminator
    config.tokenizer.gan.update(start=5_000, weight="constant", loss="hinge")
    config.tokenizer.ema_decay = 0.9978  # [RAE]
    for name in ("optim", "discriminator_optim"):
        config.tokenizer[name].update(  # [RAE]
            learning_rate=2e-4,
            end_learning_rate=2e-5,
            warmup_steps=EPOCH // 512,
            b1=0.9,
            b2=0.95,
            weight_decay=0.0,
        )
    # [second hand] 25 epochs in the ablations; [RAE] batch
    config.tokenizer.train.update(steps=25 * EPOCH // 512, batch_size=512)
    config.precision.override += ("tokenizer.dtype=bfloat16",)  # [RAE]

    # [code] Both flips are kept; statistics are per channel, here of all latents, in the release of
    # 10,000 drawn ones without flip.
    config.latents.dtype = "bfloat16"
    config.diffusion.latent_multiplier = 1.0
    # [code] LightningDiT-XL/1; the stack is GAE's, so are the defaults
    config.diffusion.model.use_qknorm = False
    config.diffusion.flow.update(time_shift=0.7, cosine_weight=1.0)
    config.diffusion.train.update(steps=100_000, batch_size=1024)  # 80 epochs
    # [code] the release's last step stops short of the end, see docs/training.md
    config.sample.sde.update(steps=250, time_shift=0.4, last_step="reference")
    config.sample.ode.update(
        steps=250, time_shift=0.4, guidance=2.5, guidance_start=0.25, guidance_channels=0
    )

    config.evaluate.continuity_images = 5_000  # [ours] of LPC
    return config


def full_800ep():
    config = full()
    config.diffusion.model.use_qknorm = True  # [code]
    config.diffusion.train.steps = 1_000_000  # [code]
    config.sample.ode.update(guidance=3.3, guidance_start=0.30)  # [code]
    return config


def digits():
    """All values are ours, chosen for the digits, and so are those of configs/demo.py."""
    config = load_config(Path(__file__).parent, "demo")
    config.teacher.kind = "prior"
    config.teacher.model.update(latent_dim=8, decoder_layers=2, heads=4)
    config.teacher.optim.update(learning_rate=1e-3)
    config.tokenizer.name = "pae"
    config.tokenizer.pae.update(
        num_heads=4,
        delta_depth=2,
        latent_dim=8,
        decoder_patch_size=8,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=384,
    )
    config.tokenizer.from_teacher = (("pae/latent_compressor", "latent_compressor"),)
    config.tokenizer.losses.update(l1=1.0, perceptual=0.2, gan=0.01, **PRIOR)
    # half the perceptual weight, as at full size; with 0.5 nothing was learned in 250 steps
    config.tokenizer.losses.continuity = 0.1
    config.tokenizer.optim.update(learning_rate=1e-3)
    return config
