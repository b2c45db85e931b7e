"""The sections ``tokenizer`` and ``latents``."""

from gae_jax import tokenizers
from gae_jax.config.training import compute, optim, train


def tokenizer_section() -> dict:
    """The autoencoder, its terms and its training; each tokenizer has a section of sizes."""
    section = dict(
        # gae, whose sizes are in ``model``, or another of gae_jax/tokenizers/*_kind.py, with its
        # sizes in the section of its name
        name="gae",
        **tokenizers.default_sizes(),
        discriminator=dict(
            # patch: PatchGAN, of the next three | dino: RAE's, heads on a frozen DINO, of dino
            name="patch",
            ndf=64,  # [code]
            n_layers=3,  # [code]
            stat_groups=1,  # batch statistics over the global batch, or over so many parts of it
            dino=dict(  # (RAE's code)
                weights="dino",  # dino: ViT-S/8, from import-torch | random ones, which stay
                embed_dim=384,
                depth=12,
                num_heads=6,
                mlp_ratio=4.0,
                image_size=224,  # pixels that images are resized to
                patch_size=8,
                key_depths=(2, 5, 8, 11),  # blocks that it looks at, from 0, beside the last
                ks=9,  # tokens that the heads' middle convolution spans
                norm_eps=1e-6,
            ),
            # operations of gae_jax/objectives/diff_augment.py on all that it sees; RAE's code has
            # translation, brightness, saturation and contrast
            augment=(),
        ),
        # Weight of every term; a weight of 0 leaves the term out of the compiled step.
        losses=dict(
            l1=1.0,  # [paper]
            perceptual=1.0,  # [paper]
            gan=0.5,  # [paper]
            align=1.0,  # [paper] lambda_sp
            kl=0.0,  # [paper] 0.1 for the baseline, with bottleneck="kl" and align=0
            structure=0.0,  # of PAE: cosines between tokens, those of the teacher's
            semantics=0.0,  # of PAE: tokens and their mean, the teacher's
            continuity=0.0,  # of PAE: images of latents that are turned
            velocity=0.0,  # of DGAE: of the decoder's flow
            features=0.0,  # of FAE: the backbone's tokens, restored
        ),
        # lpips: VGG16 and heads from import-torch | lpips_random: the same with random weights, to
        # measure memory and speed | backbone: features of the teacher's backbone
        perceptual=dict(
            name="lpips",
            precision="highest",  # of LPIPS; "default" is TF32 or bf16 on accelerators
            dtype="float32",  # that its convolutions compute in; "bfloat16" is faster, see docs
        ),
        align=dict(
            # teacher: its latents, or the backbone's features where the point is no latent |
            # snapshot: the tokenizer itself, as it was when the first phase with this term began
            target="teacher",  # [paper]
            point="latent",  # [paper] latent | pre: encoder's features | post: linear of the latent
            dtype="float32",  # of frozen backbone and teacher; "bfloat16" is faster, see docs
            loss="mse",  # [code] mse | cosine | vf, the loss of VA-VAE with the fields below
            # constant | adaptive, of VA-VAE: losses.align times the ratio of the reconstruction's
            # gradient to this term's, at the encoder's last layer
            weight="constant",
            cos_margin=0.5,
            distance_margin=0.25,
            cos_weight=1.0,
            distance_weight=1.0,
        ),
        gan=dict(
            loss="hinge",  # [code] hinge | vanilla
            weight="constant",  # [code] constant | adaptive: by gradients at the last layer
            eps=1e-4,  # [code] of the adaptive weight; RAE's code has 1e-6
            # The discriminator learns from a reconstruction of its own, as in RAE's code: after the
            # generator's update, without noise and rounded to 8 bits. Its batch statistics and
            # power iterations then move in its own pass alone.
            fresh=False,
            start=5_000,  # [paper] the generator sees the discriminator from step start + 1 on
            discriminator_start=0,  # [ours] the discriminator learns earlier
            ramp=0,  # [ours] steps over which the generator's term grows to its weight
        ),
        # Parts that start from the teacher's weights, tuples (path in the tokenizer, path in the
        # teacher): with PAE and its prior refinement
        # (("pae/latent_compressor", "latent_compressor"),)
        from_teacher=(),
        # Phases one after the other, for systems that train in stages: tuples of (steps, regex of
        # the parameters that learn, names of the terms that count), and a fourth item for a
        # tokenizer that has modes. Empty: all of it, all the time.
        phases=(),
        # Weights to start from in the place of random ones: a run directory whose tokenizer is
        # trained or imported, RUN@STEP for one of its kept checkpoints, or a folder of export-torch
        init_from="",
        init_optimizer=False,  # takes Adam's moments along; the schedule starts anew
        ema_decay=0.0,  # 0: no moving average; else later stages use it
        optim=optim(),  # [paper]
        discriminator_optim=optim(learning_rate=1e-5, end_learning_rate=1e-6),  # [code] peak
        train=train(),  # [paper] 200 epochs
        compute=compute(),
        health=dict(
            pictures=8,  # held-out images whose reconstructions TensorBoard shows; 0: none
            probe=2_000,  # images of either split for the probe while training; 0: none
            window=2_000,  # steps over which a discriminator that wins or stalls is noticed
        ),
    )
    return section


def latents_section() -> dict:
    """How the training set is encoded, and what is kept of it."""
    return dict(
        batch_size=256,
        shard_size=8_192,  # images
        dtype="float32",  # that they are kept in: float32 | bfloat16, half the size
        # that the encoder computes in; bfloat16 [ours] is several times faster on accelerators
        encode_dtype="float32",
        encode_products="same",  # of the encoder: same | fp8 [ours], as sample.products
        # what mean and deviation for the diffusion model are of: a channel | an element, as RAE's,
        # of every channel at every place
        statistics="channel",
        variance_only=False,  # the mean is left in, as RAE's released statistics do
    )
