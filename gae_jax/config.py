"""The one config: every field with its default, and the checks that refuse what nothing reads.

A config describes the whole pipeline; a stage reads its own section. `default_config` is both
the documentation and the schema: files in ``configs/`` start from it and change what differs,
and a key that it does not have is an error. Leaf names equal the arguments of the function or
constructor that receives the section (see `bind`), so one grep connects the two.

Sources of the values: [paper] quoted from GAE, arXiv 2603.10365; [code] from the authors'
released code or configs; [ours] chosen here.
"""

import difflib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from gae_jax.errors import ConfigError

# Fields that say how a run is watched and fed, not what it computes: a run may be resumed with
# other values of these.
OPERATIONAL = frozenset(
    {
        *("log_every", "save_every", "eval_every", "keep", "workers"),
        *("remat", "attention", "kernels", "pictures", "probe", "window"),
    }
)


def optim(**changes) -> ml_collections.ConfigDict:
    """The optimizer section (AdamW) as the autoencoder and the teacher have it. [paper]"""
    section = ml_collections.ConfigDict(
        dict(
            learning_rate=2e-4,  # peak
            end_learning_rate=2e-5,  # where the cosine ends; equal to the peak: constant
            warmup_steps=8_000,
            b1=0.9,
            b2=0.98,
            weight_decay=0.05,  # none on tensors of one dimension
            clip_norm=0.0,  # global gradient norm; 0 switches clipping off
            decay="cosine",  # cosine | linear, from the peak to the end
            hold_steps=0,  # at the peak, after the warm-up and before the decay
            # factors of the learning rate, (regex of paths within the network, factor); the first
            # that matches counts
            scales=(),
            restart=False,  # warm-up and cosine anew in each of the tokenizer's phases
        )
    )
    section.update(changes)
    return section


def train(**changes) -> ml_collections.ConfigDict:
    """How long a stage trains, and how often it reports and saves."""
    section = ml_collections.ConfigDict(
        dict(
            steps=250_000,
            batch_size=1024,  # global, whatever the number of devices
            log_every=100,
            eval_every=5_000,  # 0: never
            save_every=5_000,
            keep=2,  # checkpoints kept
            # figure of the evaluations, such as "eval/fid", whose best checkpoint is kept and is
            # the stage's result; empty: the last one is
            best_metric="",
            best_mode="min",  # min | max
        )
    )
    section.update(changes)
    return section


def compute(**changes) -> ml_collections.ConfigDict:
    """How a stage's step is computed. [ours]"""
    section = ml_collections.ConfigDict(
        dict(
            accumulate=1,  # parts that a batch is computed in, one after the other
            dtype="float32",  # of activations; parameters and losses are always fp32
            remat="none",  # or the name of a policy of jax.checkpoint_policies
            # auto: on a GPU in bf16 triton where tokens and heads fit, else cudnn where the heads
            # fit, else xla | xla | cudnn | triton | mosaic, for TPUs: see docs/performance_tpu.md
            attention="auto",
            # norms, gates and SwiGLU: auto: triton on a GPU in bf16 where the sizes fit, else xla
            # | xla | triton
            kernels="auto",
        )
    )
    section.update(changes)
    return section


def default_config() -> ml_collections.ConfigDict:
    """GAE at the paper's size (d = 32, ViT-L, 256 px, LightningDiT-XL/1, 80 epochs)."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.mesh = dict(
        data=-1,  # devices per axis; -1 takes what is left
        fsdp=1,  # parameters, optimizer and EMA are split over it, as the batch is
        tensor=1,  # heads and MLPs are split over it
        slices=0,  # groups with a slow network between them, over which data is split; 0: as found
        preset="",  # or a machine of gae_jax/machines.py, such as "v5p-64", for its mesh
    )

    config.data = dict(
        name="folder",  # digits | folder | tfds | array_record, see docs/data.md
        # folder: where the class folders are; tfds: TFDS's data_dir; array_record: what
        # `prepare-data` wrote. The last two may be gs://
        root="",
        dataset="imagenet2012:5.*.*",  # tfds: name and version
        holdout=0.0,  # share of the images held out, where the source has no split of its own
        image_size=256,
        crop="center",  # center | random, after the ADM resize
        mirror=True,  # horizontal mirror images make sense for this data
        on_corrupt="error",  # error | skip (counted and named)
        workers=8,  # threads that decode
    )

    # The semantic teacher's frozen backbone: a released encoder, which `import-torch` brings in, or
    # a small ViT that is trained here in its place.
    config.backbone = dict(
        # dinov2 | dinov3 | mae | siglip | vit; the section of that name holds its sizes
        name="dinov2",
        dinov2=dict(  # [code] dinov2_vitl14
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            mlp_ratio=4.0,
            image_size=518,  # that its position table was trained at
            patch_size=14,
            num_register_tokens=0,
            use_swiglu_ffn=False,  # giant
            interpolate_offset=0.1,  # [code] as torch.hub; 0: as transformers, and with registers
            input_size=224,  # [code] pixels that images are resized to
        ),
        dinov3=dict(  # [code] dinov3_vitl16
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            patch_size=16,
            num_register_tokens=4,
            use_gated_mlp=False,  # small_plus, huge_plus and 7b
            qkv_bias=True,  # not of 7b
            input_size=256,  # [ours] gives as many tokens as the tokenizer has; PAE has it too
        ),
        mae=dict(  # MAE-L
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=224,
            patch_size=16,
            input_size=256,  # [ours] gives as many tokens as the tokenizer has
        ),
        siglip=dict(  # [code] the vision tower of siglip2-so400m-patch16-256
            hidden_size=1152,
            num_hidden_layers=27,
            num_attention_heads=16,
            intermediate_size=4304,
            image_size=256,  # of its position table
            patch_size=16,
            input_size=256,
        ),
        vit=dict(
            image_size=256,
            patch_size=16,
            embed_dim=1024,
            num_layers=24,
            num_heads=16,
            mlp_ratio=4.0,
        ),
        # the rest is for training a vit
        shift=0,  # random translation in training, in pixels either way
        label_smoothing=0.1,
        optim=optim(learning_rate=1e-3, end_learning_rate=1e-5, warmup_steps=500),
        train=train(steps=10_000),
    )

    # Downsampler and feature decoder, trained by cosine distillation.
    config.teacher = dict(
        # learned | svd: the tokens' first singular vectors, the baseline of table 1, which reads
        # latent_dim, train.batch_size and ``backbone`` only | prior: the prior refinement of PAE,
        # which reads of ``model`` latent_dim, decoder_layers and heads, of ``compute`` accumulate
        kind="learned",
        backbone=dict(  # how the frozen backbone is computed in this stage
            dtype="float32",  # "bfloat16" is faster, see docs
            attention="xla",  # as compute.attention
        ),
        model=dict(
            latent_dim=32,  # [paper]
            decoder_layers=4,  # [paper]
            # table 2: attention: straight to latent_dim | attention_linear: then one Linear for
            # every token | attention_conv: then one for every window
            downsampler="attention_conv",
            window_size=4,  # [code] the only window that gives the paper's parameter count
            heads=16,  # [code] feature width / 64
        ),
        svd=dict(images=64_000),  # [paper] training images, at most
        # PAE's (arXiv 2605.07915), of which neither text nor code was at hand: structure comes from
        # a target H_ref, made of the backbone's tokens, see gae_jax/prior_target.py
        prior=dict(
            # [ours] raw: the tokens as they are | bilinear | image_guided: a joint bilateral
            # upsampling of ours in the place of AnyUp [second hand], whose weights are not here
            reference="image_guided",
            low_pass="blur",  # [ours] of two readings: blur | zscore, of the tokens over positions
            strength=0.4,  # [second hand] of the low-pass
            blur=0.5,  # [ours] deviation of the Gaussian, in tokens
            reach=1.0,  # [ours] of image_guided: deviation of the weights over distance, in tokens
            colour=0.1,  # [ours] of image_guided: over differences in colour, RGB in [0, 1]
            representation_weight=1.0,  # [ours] of the tokens that come back
            gram_weight=1.0,  # [ours] of the Gram matrix of cosines against H_ref's
        ),
        optim=optim(warmup_steps=500),  # [paper]
        train=train(steps=10_000, batch_size=2048),  # [paper]
        compute=compute(),
    )

    config.tokenizer = dict(
        # gae, whose sizes are in ``model``, or another of gae_jax/tokenizers, with its sizes in the
        # section of its name
        name="gae",
        model=dict(
            image_size=256,
            patch_size=16,
            embed_dim=1024,
            num_layers=24,
            num_heads=16,
            num_kv_heads=0,  # 0: as many as num_heads
            mlp_ratio=4.0,
            latent_dim=32,  # [paper]
            bottleneck="norm",  # norm: RMSNorm of every token | kl: the baseline of table 7
            noise_std=0.2,  # [paper] C_sigma
            noise_factor=1
            / 0.8,  # [code] the released code divides C_sigma by 0.8; 1.0: as written
            patch_init="fan_out",  # [code] start of the patch embedding | fan_in: a larger one
        ),
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
            # operations of gae_jax/diff_augment.py on all that it sees; RAE's code has translation,
            # brightness, saturation and contrast
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

    from gae_jax import tokenizers  # here: `--help` must not wait for the networks

    config.tokenizer.update(tokenizers.default_sizes())

    config.latents = dict(
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

    config.diffusion = dict(
        name="lightningdit",  # lightningdit | ddt: it makes the conditions of RAE's wide head
        model=dict(
            patch_size=1,
            hidden_size=1152,
            depth=28,
            num_heads=16,
            mlp_ratio=4.0,
            num_classes=1000,
            class_dropout_prob=0.1,
            use_qknorm=False,  # [code] off for the 80-epoch runs, on for the 800-epoch runs
            use_swiglu=True,
            use_rmsnorm=True,
            use_rope=True,
            use_abs_pos=True,
            wo_shift=False,
        ),
        head=dict(hidden_size=2048, depth=2, num_heads=16),  # of "ddt" (RAE's code)
        flow=dict(
            path="linear",  # [paper] linear | gvp | vp
            prediction="velocity",  # [paper] velocity | noise | score
            geometry="flat",  # [paper] flat | sphere, ours: geodesics from token to token
            weighting="none",  # [code] none | velocity | likelihood, of noise and score
            time="logit_normal",  # [code] logit_normal | uniform
            time_mean=0.0,  # [code]
            time_std=1.0,  # [code]
            time_shift=0.7,  # [code]
            time_least=0.0,  # [ours] logit-normal times are cut off below this, before the shift
            cosine_weight=1.0,  # [code] of velocities
        ),
        latent_multiplier=1.0,  # [code]
        ema_decay=0.9999,  # [paper]
        optim=optim(  # [paper]
            end_learning_rate=2e-4, warmup_steps=0, b2=0.95, weight_decay=0.0
        ),
        train=train(steps=100_000),  # [paper] 80 epochs
        compute=compute(dtype="bfloat16"),  # [code]
    )

    config.sample = dict(
        sets=("sde", "ode"),  # what is drawn, each with the section of that name
        labels="uniform",  # [paper] uniform: per_class of each | random: as many, drawn | file
        labels_file="",  # with labels="file": one class per line, or an .npy file; kept in order
        per_class=50,  # [paper]
        classes=(),  # only these; empty: all
        batch_size=256,
        # that networks compute in; bfloat16 [ours] is several times faster on accelerators
        dtype="float32",
        # same: products are of numbers of that dtype | fp8 [ours]: of float8_e4m3fn in the large
        # layers of diffusion models, on NVIDIA's Ada, Hopper and later; see docs/performance.md
        products="same",
        decode_products="same",  # of the decoder, likewise
        attention="auto",  # of the diffusion model, as compute.attention
        png=False,  # a folder of PNG files beside samples.npz
        weaker="",  # autoguidance: a run with a weaker diffusion model on the same latents
        sde=dict(
            method="euler",  # [paper] euler (Maruyama) | heun, with twice the calls
            steps=250,  # [paper] points of the grid; the last step starts from the last of them
            start=1e-5,  # [code]
            time_shift=0.4,  # [paper]
            # g(t), the noise that is added and taken away again: sbdm [code] | sigma | linear |
            # constant | decreasing | increasing-decreasing
            form="sbdm",
            norm=1.0,  # [code] factor of g
            # mean [ours] goes to the end | reference [code] stops short of it, see
            # docs/architecture.md | tweedie | euler | none
            last_step="mean",
            last_step_size=0.004,  # [code] the grid ends so far from 1, before it is shifted
            guidance=1.0,  # [paper] 1: none
            guidance_start=0.0,
            guidance_end=1.0,
            guidance_channels=0,
            guidance_parts=(),
        ),
        ode=dict(  # [paper] 80-epoch setting
            method="euler",  # [paper] euler | heun | adams_bashforth | dopri5, which is adaptive
            steps=250,  # [paper] points of the grid, one more than steps
            end=1.0,  # [ours] of the grid before it is shifted; RAE stops at 0.999
            time_shift=0.4,  # [paper]
            rtol=1e-3,  # [code] of dopri5
            atol=1e-6,  # [code] of dopri5
            guidance=2.5,  # [paper]
            guidance_start=0.25,  # [paper]
            guidance_end=1.0,
            guidance_channels=0,  # only the first so many; 0: all
            # tuples of (last time, scale), from noise on, in the place of the other three, such as
            # FAE's ((0.1, 0.9), (0.3, 1.0), (1.0, 2.5)); empty: none, and with them guidance=1
            guidance_parts=(),
        ),
    )

    config.evaluate = dict(
        images=50_000,  # [paper] held-out ones that are reconstructed, at most
        batch_size=256,
        crop="adm",  # [code] adm | lightningdit: of input, target and reference of reconstruction
        # protocol of PSNR, SSIM, LPIPS and rFID: lightningdit_recon [inferred] | rae_recon
        reconstruction="lightningdit_recon",
        decode_steps=0,  # of a tokenizer whose decoder iterates; 0: the tokenizer's own
        lpips=True,  # with the run's VGG16 and heads, see import-torch
        noise_levels=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5),  # [paper] figure 4; the grid is ours
        # What generated sets and rFID are judged by: inception, the run's, see import-torch |
        # judge: a small classifier of 8 x 8 grey images, which knows digits | none
        features="inception",
        generation="adm",  # [paper] preset: adm | torch_fidelity | pytorch_fid
        metrics=("fid", "sfid", "inception_score", "precision", "recall"),
        # what generated sets are compared with: a file of statistics (ADM's, pytorch-fid's, ours)
        # or samples; empty: the training images of this run
        reference="",
        allow_few=False,  # Frechet distances of no more images than dimensions
        linear_probe="sgd",  # [paper] appendix I | logistic: scikit-learn's, small sets | none
        sgd_probe=dict(
            heads=("flatten", "mean"),  # [paper] table 14
            learning_rate=0.008,  # [paper]
            batch_size=2048,  # [paper]
            epochs=100,  # [paper]
            momentum=0.0,  # [ours]
            standardise=False,  # [ours]
            flips=True,  # [ours]
            drop_last=True,  # [ours]
            dtype="bfloat16",  # [ours] of the latents on the devices
            precision="highest",  # [ours]
        ),
        probe_images=20_000,  # at most, of each split, for the logistic probe and the judge
        diagnostics=True,  # of the latents: rank, neighbours, coherence, spectrum, continuity
        continuity_images=1_000,  # [ours] at most, for the last of these, where there is LPIPS
        # folder with a label map for every held-out image (SEGMENTS/CLASS/NAME.png), with
        # data.name="folder": whether clusters of the latents' tokens follow them; empty: none
        segments="",
        segment_images=5_000,  # [ours] at most
        # The same evaluator while the diffusion model trains, at train.eval_every, on so many
        # images of its moving average; 0: none.
        online=dict(images=0, sampler="ode", steps=25),
    )
    config.make_reference = dict(  # [ours]
        split="train",
        images=10_000,  # that lie beside the statistics, as in ADM's files: precision and recall
        dinov2=False,  # statistics for FD-DINOv2 too, by the run's backbone
    )
    config.likelihood = dict(  # [ours] all of it
        images=1_000,  # held-out ones, at most
        batch_size=64,
        steps=101,  # points of the grid; Heun's method, two network calls a step
        time_shift=1.0,
    )
    # What `bench` times, on random weights and data. [ours] all of it
    config.bench = dict(
        works=(
            *("dit-train", "dit-forward", "sample-sde"),
            *("tokenizer-train", "tokenizer-train-teacher", "encode", "decode"),
            *("features", "precision-recall", "data"),
        ),
        repeats=5,  # of so many steps as each work says; median, least and most are reported
        warmup=2,  # steps before the first repeat
        batches=4,  # that the steps take in turn
        dtype="bfloat16",  # of dit-forward, sample-sde, encode and decode; training has its own
        products="same",  # of those four too, as sample.products
        matmul=0,  # edge of the matrices whose product gives the rate to compare with; 0: by device
        out="",  # JSON file; empty: bench.json in the run directory
        compare="",  # such a file of another run, for one more column
        torch="",  # FILE.py:FUNCTION, which returns (callable, images per step), timed beside
        dit_train=dict(batch_size=128, steps=10),
        dit_forward=dict(batch_size=256, steps=10),
        sample_sde=dict(batch_size=64, steps=1),
        tokenizer_train=dict(batch_size=64, steps=10),
        tokenizer_train_teacher=dict(batch_size=64, steps=10),
        encode=dict(batch_size=256, steps=10),
        decode=dict(batch_size=256, steps=10),
        features=dict(batch_size=256, steps=10),
        precision_recall=dict(reference=10_000, generated=50_000, channels=2048, steps=1),
        data=dict(
            images=1024,  # JPEG files of 500 x 375 pixels in each repeat
            batch_size=32,
            workers=0,  # threads; 0: one for each core
            # images/s of one accelerator, for the number of cores that feed it: training and
            # encoding on an H200, see docs/performance.md
            rates=(384.0, 3409.0),
        ),
    )
    # What `plan` compiles ahead of time, for devices that need not be there. [ours] all of it
    config.plan = dict(
        topology="",  # of gae_jax/machines.py, or CHIP:SHAPE (v5p:4x4x4); empty: this machine
        works=(),  # of gae_jax/benchmark/steps.py; empty: all that the config has
        batch_size=0,  # global, of every work; 0: each stage's own
        images=1_281_167,  # of the training set, for latents: ImageNet's
        # images a second on the whole machine, known from elsewhere, for hours; 0: not known
        throughput=dict(
            teacher_backbone=0.0,
            teacher=0.0,
            tokenizer=0.0,
            latents=0.0,
            diffusion=0.0,
            sample_sde=0.0,
            sample_ode=0.0,
        ),
        out="",  # JSON file; empty: plan.json in the run directory
    )
    # What `doctor` tries on every host before a long run. [ours] all of it
    config.doctor = dict(
        works=(),  # steps to time on random data, named as in `plan`; empty: those that train
        steps=3,  # of each; 0: none are timed, and nothing is compiled
        images=64,  # of the training set that every host reads
        disk_megabytes=256,  # written to the run directory and read again by every host
    )
    # What `import-torch` reads; an empty path leaves the network alone.
    config.import_torch = dict(
        dino="",  # dino_deitsmall8_pretrain.pth, for RAE's discriminator
        vgg="",  # VGG16 of torchvision, for LPIPS
        lpips_heads="",  # lpips/weights/v0.1/vgg.pth, with vgg
        inception="",  # pt_inception-2015-12-05-6726825d.pth (pytorch-fid), for FID and its kin
        # .safetensors of Hugging Face, of SigLIP 2 the whole model's; or .pth of DINOv2's and
        # DINOv3's own repositories
        backbone="",
        teacher="",  # model_state_dict, with the backbone inside or without
        tokenizer="",  # state_dict
        diffusion="",  # ema or model
        diffusion_entry="ema",  # ema | model
        # mean and std of the latents that the diffusion model was trained on, of channels
        # (latents_stats.pt); or RAE's mean and variance of elements (stat.pt)
        statistics="",
        # folder of latents_rankRR_shardSSS.safetensors that the released code made with the run's
        # tokenizer, kept as latents.dtype says; with its latents_stats, if that is there
        latents="",
        leave_out=(),  # patterns of tensors to leave aside, such as "loss.*"; each is named
    )
    config.export_torch = dict(
        # those that the run has are exported; "latents" besides writes the training set's
        networks=("teacher", "tokenizer", "diffusion"),
        folder="",  # where to; empty: export/ in the run directory
    )
    return config.lock()


def preset(presets: Mapping[str, Any], name: str, what: str) -> Any:
    """``presets[name]``, for the argument of a config file (``--config=FILE.py:NAME``).

    Raises:
      ConfigError: if there is none of that name; the others are named.
    """
    if name not in presets:
        raise ConfigError(
            f"there is no {what} {name!r} in this config: use :{' or :'.join(presets)}"
        )
    return presets[name]


def load_config(folder: Path, name: str) -> ml_collections.ConfigDict:
    """The config of ``folder/NAME.py``, for config files that change another one.

    Args:
      name: NAME, or NAME:ARGUMENT.

    Raises:
      ConfigError: if there is no such file; the others are named.
    """
    name, *argument = name.split(":", 1)
    path = folder / f"{name}.py"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.py"))
        raise ConfigError(f"there is no config {path}: use :{' or :'.join(known)}")
    spec = importlib.util.spec_from_file_location(f"config_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def backbone_shape(backbone: Mapping) -> tuple[int, int]:
    """(edge of the grid of tokens, width) of the backbone that a section describes."""
    model = backbone[backbone["name"]]
    if backbone["name"] == "vit":
        return model["image_size"] // model["patch_size"], model["embed_dim"]
    return model["input_size"] // model["patch_size"], model["hidden_size"]


def bind(function: Callable, section: Mapping, path: str) -> dict[str, Any]:
    """The section as keyword arguments of ``function``.

    Raises:
      ConfigError: if the section holds a name that is no argument of the function.
    """
    # NNX's metaclass hides the signature of a module class; its __init__ has it
    target = function.__init__ if isinstance(function, type) else function
    names = inspect.signature(target).parameters
    for key in section:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise ConfigError(
                f"{path}.{key} is no argument of {function.__qualname__}"
                + (f" (did you mean {near[0]}?)" if near else "")
            )
    return {key: section[key] for key in section}


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; tuples become lists, as JSON has them."""
    flat = {}
    for key in config:
        value, path = config[key], f"{prefix}{key}"
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, path + ".")
        else:
            flat[path] = list(value) if isinstance(value, tuple) else value
    return flat


def plain(config: ml_collections.ConfigDict) -> dict:
    """The config as nested dicts of JSON values."""
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))
