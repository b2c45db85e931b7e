"""The sections ``backbone`` and ``teacher``, and their checks."""

from gae_jax.config.checks import accumulation_clashes, training_clashes
from gae_jax.config.choices import choice
from gae_jax.config.training import optim, train


def backbone_section() -> dict:
    """The semantic teacher's frozen backbone.

    A released encoder, which `import-torch` brings in, or a small ViT that is trained here in its
    place.
    """
    return dict(
        # dinov2 | dinov3 | mae | siglip | efficientnet_lite0 | vit; the section of that name holds
        # its sizes
        name=choice("dinov2", "pretrained.backbone:RELEASED", "vit"),
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
        efficientnet_lite0=dict(  # [ours]
            input_size=256,  # pixels that images are resized to
            # of the maps that make up a token, in pixels of the resized image: 2, 4, 8, 16, 32 with
            # 16, 24, 40, 112, 320 channels; tokens form the grid of the largest stride
            strides=(32,),
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
        train=train(accumulate=False, steps=10_000),
    )


def teacher_section() -> dict:
    """Downsampler and feature decoder, trained by cosine distillation."""
    return dict(
        # learned | svd: the tokens' first singular vectors, the baseline of table 1, which reads
        # latent_dim, train.batch_size and ``backbone`` only | prior: the prior refinement of PAE,
        # which reads of ``model`` latent_dim, decoder_layers and heads, and is always computed in
        # float32, without kernels of ours
        kind=choice("learned", "svd", "prior"),
        model=dict(
            latent_dim=32,  # [paper]
            decoder_layers=4,  # [paper]
            # table 2: attention: straight to latent_dim | attention_linear: then one Linear for
            # every token | attention_conv: then one for every window
            downsampler=choice("attention_conv", "attention", "attention_linear"),
            window_size=4,  # [code] the only window that gives the paper's parameter count
            heads=16,  # [code] feature width / 64
        ),
        svd=dict(images=64_000),  # [paper] training images, at most
        # PAE's (arXiv 2605.07915), of which neither text nor code was at hand: structure comes from
        # a target H_ref, made of the backbone's tokens, see gae_jax/tokenizers/pae_target.py
        prior=dict(
            # [ours] raw: the tokens as they are | bilinear | image_guided: a joint bilateral
            # upsampling of ours instead of AnyUp [second hand], whose weights are not here
            reference=choice("image_guided", "tokenizers.pae_target:REFERENCES"),
            # [ours] of two readings: blur | zscore, of the tokens over positions
            low_pass=choice("blur", "tokenizers.pae_target:LOW_PASSES"),
            strength=0.4,  # [second hand] of the low-pass
            blur=0.5,  # [ours] deviation of the Gaussian, in tokens
            reach=1.0,  # [ours] of image_guided: deviation of the weights over distance, in tokens
            colour=0.1,  # [ours] of image_guided: over differences in colour, RGB in [0, 1]
            representation_weight=1.0,  # [ours] of the tokens that come back
            gram_weight=1.0,  # [ours] of the Gram matrix of cosines against H_ref's
        ),
        optim=optim(warmup_steps=500),  # [paper]
        train=train(steps=10_000, batch_size=2048),  # [paper]
    )


def teacher_clashes(config) -> list[str]:
    """List the problems of the section ``teacher``, on the backbone that the config names."""
    from gae_jax.pretrained.backbone import backbone_shape  # it imports Flax

    kind, teacher = config.backbone.name, config.teacher.model
    grid, width = backbone_shape(config.backbone)
    problems = []
    if teacher.latent_dim > width:
        problems.append(
            f"teacher.model.latent_dim {teacher.latent_dim} is more than the {width} channels of "
            f"the backbone (backbone.{kind})"
        )
    problems += accumulation_clashes(config.teacher, "teacher")
    window = teacher.window_size if teacher.downsampler == "attention_conv" else 1
    for path, whole, part in (
        ("teacher.model.window_size", grid, window),
        ("teacher.model.heads", width, teacher.heads),
    ):
        if whole % part:
            problems.append(f"{path} is {part}, which does not divide {whole}")
    return problems + training_clashes(config.teacher, "teacher")
