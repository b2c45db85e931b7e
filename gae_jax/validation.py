"""Refuses configs that cannot be run, before any work is done."""

import difflib

import ml_collections

from gae_jax import flow, pae_losses, prior_target, samplers
from gae_jax.config import backbone_shape, default_config, flatten
from gae_jax.data.images import CROPS
from gae_jax.data.latents import DTYPES
from gae_jax.data.sources import SOURCES
from gae_jax.diff_augment import OPERATIONS
from gae_jax.errors import ConfigError
from gae_jax.evaluation.generation import SPACES
from gae_jax.evaluation.presets import GENERATION, RECONSTRUCTION
from gae_jax.evaluation.sgd_probe import HEADS
from gae_jax.models import modulator
from gae_jax.models.attention import ATTENTIONS
from gae_jax.models.backbone import ENCODERS
from gae_jax.models.kernels import KERNELS
from gae_jax.models.latent_diffusion import NETWORKS
from gae_jax.models.layers import REMAT
from gae_jax.models.pae import SPHERES
from gae_jax.models.quantized import PRODUCTS
from gae_jax.tokenizers import TOKENIZERS, aligns, kind_of, latent_shape, sizes_of


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses keys that `default_config` does not have, missing keys and settings that clash.

    Raises:
      ConfigError: naming each field, its nearest known neighbour and what to do.
    """
    known, given = flatten(default_config()), flatten(config)
    problems = []
    for path in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(path, known, n=1)
        problems.append(f"unknown key {path}" + (f" (did you mean {near[0]}?)" if near else ""))
    problems += [f"missing key {path}" for path in sorted(set(known) - set(given))]
    if not problems:
        problems += _clashes(config)
    if problems:
        raise ConfigError("the config cannot be used:\n  " + "\n  ".join(problems))


def _vision_encoder(kind: str, section) -> list[str]:
    """Of the section of a released encoder."""
    problems, path = [], f"backbone.{kind}"
    sizes = {"input_size": section.input_size, "image_size": section.get("image_size", 0)}
    for name, pixels in sizes.items():
        if pixels % section.patch_size:
            nearest = max(1, round(pixels / section.patch_size)) * section.patch_size
            problems.append(
                f"{path}.{name} {pixels} is not a multiple of patch_size {section.patch_size}; "
                f"take {nearest}"
            )
    # DINOv3 rotates the channels of a head in four parts
    parts = section.num_attention_heads * (4 if kind == "dinov3" else 1)
    if section.hidden_size % parts:
        problems.append(
            f"{path}.hidden_size {section.hidden_size} is not a multiple of {parts}, which "
            f"num_attention_heads {section.num_attention_heads} asks for; change one of the two"
        )
    return problems


def _clashes(config) -> list[str]:
    kind = config.backbone.name
    if kind not in (*ENCODERS, "vit"):
        known = ", ".join(map(repr, ENCODERS))
        return [f"backbone.name is {kind!r}; use one of {known} or 'vit'"]
    if config.tokenizer.name not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        return [f"tokenizer.name is {config.tokenizer.name!r}; use one of {known}"]
    problems = []
    tokenizer, backbone = config.tokenizer.model, config.backbone[kind]
    vits = {"tokenizer.model": tokenizer} if config.tokenizer.name == "gae" else {}
    if kind == "vit":
        vits["backbone.vit"] = backbone
    else:
        problems += _vision_encoder(kind, backbone)
    for path, model in vits.items():
        if model.image_size != config.data.image_size:
            problems.append(
                f"{path}.image_size is {model.image_size} but data.image_size is "
                f"{config.data.image_size}; set both to the same value"
            )
        if model.image_size % model.patch_size:
            problems.append(
                f"{path}.image_size {model.image_size} is not a multiple of patch_size "
                f"{model.patch_size}"
            )
        if model.embed_dim % model.num_heads:
            problems.append(
                f"{path}.embed_dim {model.embed_dim} is not a multiple of num_heads "
                f"{model.num_heads}"
            )
    try:
        grid, _, latent_dim = latent_shape(config)
    except ValueError as error:
        return [*problems, f"tokenizer.{config.tokenizer.name}: {error}"]
    section = "model" if config.tokenizer.name == "gae" else config.tokenizer.name
    teacher, diffusion = config.teacher.model, config.diffusion.model
    backbone_grid, width = backbone_shape(config.backbone)
    aligned, by_teacher = aligns(config.tokenizer)
    if by_teacher and teacher.latent_dim != latent_dim:
        problems.append(
            f"teacher.model.latent_dim {teacher.latent_dim} and tokenizer.{section}.latent_dim "
            f"{latent_dim} must be equal: the tokenizer's latents are aligned with the teacher's"
        )
    if aligned and backbone_grid != grid:
        problems.append(
            f"the backbone (backbone.{kind}) gives {backbone_grid} x {backbone_grid} tokens, "
            f"tokenizer.{section} {grid} x {grid}; they must be equal: latents and features are "
            "aligned token by token"
        )
    problems += _one_of(
        config.teacher,
        {
            "kind": ("learned", "svd", "prior"),
            "model.downsampler": ("attention", "attention_linear", "attention_conv"),
            "prior.reference": prior_target.REFERENCES,
            "prior.low_pass": prior_target.LOW_PASSES,
        },
        "teacher",
    )
    problems += _one_of(config.make_reference, {"split": ("train", "holdout")}, "make_reference")
    problems += _one_of(
        config.data,
        {"name": SOURCES, "on_corrupt": ("error", "skip"), "crop": ("center", "random")},
        "data",
    )
    problems += _one_of(config.import_torch, {"diffusion_entry": ("ema", "model")}, "import_torch")
    if teacher.latent_dim > width:
        problems.append(
            f"teacher.model.latent_dim {teacher.latent_dim} is more than the {width} channels of "
            f"the backbone (backbone.{kind})"
        )
    problems += _prior_clashes(config.teacher.prior)
    problems += _teacher_compute_clashes(config.teacher)
    if config.teacher.svd.images < 1:
        problems.append(f"teacher.svd.images is {config.teacher.svd.images}; it must be > 0")
    head = config.diffusion.head
    window = teacher.window_size if teacher.downsampler == "attention_conv" else 1
    for path, whole, part in (
        ("teacher.model.window_size", backbone_grid, window),
        ("teacher.model.heads", width, teacher.heads),
        ("diffusion.model.patch_size", grid, diffusion.patch_size),
        ("diffusion.model.num_heads", diffusion.hidden_size, diffusion.num_heads),
        ("diffusion.head.num_heads", head.hidden_size, head.num_heads),
    ):
        if whole % part:
            problems.append(f"{path} is {part}, which does not divide {whole}")
    problems += _flow_clashes(config.diffusion.flow) + sample_clashes(config)
    problems += _compute_clashes(config.diffusion, "diffusion")
    problems += _one_of(config.diffusion, {"name": NETWORKS}, "diffusion")
    if config.diffusion.name == "ddt" and config.diffusion.flow.prediction != "velocity":
        problems.append(
            f"diffusion.flow.prediction is {config.diffusion.flow.prediction!r}, but "
            "diffusion.name 'ddt' predicts the 'velocity'"
        )
    problems += _time_shift(config.likelihood, "likelihood")
    for name, least in (("images", 2), ("steps", 2)):
        if (value := config.likelihood[name]) < least:
            problems.append(f"likelihood.{name} is {value}; it must be at least {least}")
    known = {"dtype": tuple(DTYPES), "statistics": ("channel", "element")}
    known |= {"encode_dtype": ("float32", "bfloat16"), "encode_products": PRODUCTS}
    problems += _one_of(config.latents, known, "latents")
    for name in ("backbone", "teacher", "tokenizer", "diffusion"):
        known = {"best_mode": ("min", "max")}
        problems += _one_of(config[name].train, known, f"{name}.train")
        problems += _one_of(config[name].optim, {"decay": ("cosine", "linear")}, f"{name}.optim")
    heads = config.teacher.model.heads, config.tokenizer.pae.num_heads
    if config.tokenizer.name == "pae" and config.tokenizer.from_teacher and heads[0] != heads[1]:
        problems.append(
            f"teacher.model.heads is {heads[0]} and tokenizer.pae.num_heads {heads[1]}; they must "
            "be equal where the projector starts from the teacher's (tokenizer.from_teacher)"
        )
    problems += _tokenizer_clashes(config.tokenizer) + _evaluate_clashes(config.evaluate)
    problems += _bench_clashes(config.bench)
    steps = config.evaluate.decode_steps
    if steps and "decode_steps" not in sizes_of(config.tokenizer):
        problems.append(
            f"evaluate.decode_steps is {steps}, but the decoder of tokenizer "
            f"{config.tokenizer.name!r} makes no steps; leave it at 0"
        )
    if steps < 0:
        problems.append(f"evaluate.decode_steps is {steps}; it must be 0 or more")
    return problems


def _pae_clashes(pae) -> list[str]:
    problems = _one_of(
        pae,
        {
            "fusion_mode": modulator.FUSIONS,
            "sphere": SPHERES,
            "noise": pae_losses.NOISES,
        },
        "tokenizer.pae",
    )
    if len(pae.angles) != 2 or not 0 < pae.angles[0] < pae.angles[1] < 90:
        problems.append(
            f"tokenizer.pae.angles is {tuple(pae.angles)}; give two between 0 and 90, growing"
        )
    if not 0 <= pae.jitter < 1:
        problems.append(f"tokenizer.pae.jitter is {pae.jitter}; it must be in [0, 1)")
    return problems


def _prior_clashes(prior) -> list[str]:
    problems = [
        f"teacher.prior.{name} is {prior[name]}; it must be > 0"
        for name in ("blur", "reach", "colour")
        if prior[name] <= 0
    ]
    if not 0 <= prior.strength <= 1:
        problems.append(f"teacher.prior.strength is {prior.strength}; it must be in [0, 1]")
    return problems


def _one_of(config, known: dict[str, tuple[str, ...]], where: str) -> list[str]:
    """What is wrong with fields that are names. ``known``: dotted path -> the names there are."""
    values = {path: flatten(config)[path] for path in known}
    return [
        f"{where}.{path} is {value!r}; use one of {', '.join(known[path])}"
        for path, value in values.items()
        if value not in known[path]
    ]


def _time_shift(section, where: str) -> list[str]:
    if section.time_shift > 0:
        return []
    return [f"{where}.time_shift is {section.time_shift}; it must be > 0 (1.0 = none)"]


def _teacher_compute_clashes(teacher) -> list[str]:
    """What is wrong with how the teacher and its frozen backbone are computed."""
    problems = _compute_clashes(teacher, "teacher")
    known = {"backbone.dtype": ("float32", "bfloat16"), "backbone.attention": ATTENTIONS}
    problems += _one_of(teacher, known, "teacher")
    if teacher.kind == "prior":
        plain = {"dtype": "float32", "remat": "none", "attention": "auto", "kernels": "auto"}
        problems += [
            f"teacher.compute.{name} is {teacher.compute[name]!r}, but teacher.kind 'prior' is "
            f"computed plainly; leave it at {value!r}"
            for name, value in plain.items()
            if teacher.compute[name] != value
        ]
    return problems


def _compute_clashes(section, where: str) -> list[str]:
    """What is wrong with a trained section's batch and how it is computed."""
    problems = _one_of(
        section,
        {
            "compute.dtype": ("float32", "bfloat16"),
            "compute.remat": REMAT,
            "compute.attention": ATTENTIONS,
            "compute.kernels": KERNELS,
        },
        where,
    )
    for path in ("train.batch_size", "compute.accumulate"):
        if (value := flatten(section)[path]) < 1:
            problems.append(f"{where}.{path} is {value}; it must be at least 1")
    if section.train.batch_size % max(section.compute.accumulate, 1):
        problems.append(
            f"{where}.train.batch_size {section.train.batch_size} does not divide into "
            f"{where}.compute.accumulate {section.compute.accumulate} parts"
        )
    return problems


def _bench_clashes(bench) -> list[str]:
    problems, known = [], default_config().bench.works
    names = {"dtype": ("float32", "bfloat16"), "products": PRODUCTS}
    problems += _one_of(bench, names, "bench")
    if odd := [name for name in bench.works if name not in known]:
        problems.append(f"bench.works has {odd}; use some of {', '.join(known)}")
    sizes = [path for path, value in flatten(default_config().bench).items() if type(value) is int]
    for path in sizes:
        least = {"repeats": 5, "warmup": 1, "matmul": 0, "data.workers": 0}.get(path, 1)
        if (value := flatten(bench)[path]) < least:
            problems.append(f"bench.{path} is {value}; it must be at least {least}")
    return problems


def _flow_clashes(section) -> list[str]:
    problems = _time_shift(section, "diffusion.flow")
    if not 0 <= section.time_least < 1:
        problems.append(
            f"diffusion.flow.time_least is {section.time_least}; it must be >= 0 and < 1"
        )
    elif section.time_least and section.time != "logit_normal":
        problems.append(
            f"diffusion.flow.time_least is {section.time_least}, but diffusion.flow.time is "
            f"{section.time!r}; only 'logit_normal' is cut off"
        )
    problems += _one_of(
        section,
        {
            "path": tuple(flow.PATHS),
            "prediction": flow.PREDICTIONS,
            "weighting": flow.WEIGHTINGS,
            "time": flow.TIMES,
            "geometry": ("flat", "sphere"),
        },
        "diffusion.flow",
    )
    straight = section.path, section.prediction
    if section.geometry == "sphere" and straight != ("linear", "velocity"):
        problems.append(
            "diffusion.flow.geometry is 'sphere', which has one path and predicts its velocity: "
            "set diffusion.flow.path to 'linear' and diffusion.flow.prediction to 'velocity'"
        )
    return problems


def _evaluate_clashes(section) -> list[str]:
    problems = _one_of(
        section,
        {
            "crop": tuple(CROPS),
            "reconstruction": RECONSTRUCTION,
            "features": ("inception", "judge", "none"),
            "generation": GENERATION,
            "linear_probe": ("sgd", "logistic", "none"),
            "online.sampler": ("sde", "ode"),
        },
        "evaluate",
    )
    for name, known in (("metrics", SPACES), ("sgd_probe.heads", HEADS)):
        if odd := sorted(set(flatten(section)[name]) - set(known)):
            problems.append(f"evaluate.{name} has {odd}; known are {', '.join(known)}")
    if "fd_dinov2" in section.metrics:
        problems.append(
            "evaluate.metrics has fd_dinov2, which evaluate-samples computes: --dinov2=FILE"
        )
    levels = list(section.noise_levels)
    if levels != sorted(set(levels)) or min(levels, default=0) < 0:
        problems.append(f"evaluate.noise_levels {tuple(levels)} must increase, from 0 or more on")
    return problems


def sample_clashes(config) -> list[str]:
    """What is wrong with the section ``sample``."""
    sample, problems = config.sample, []
    problems += _one_of(
        sample,
        {
            "labels": ("uniform", "random", "file"),
            "dtype": ("float32", "bfloat16"),
            "products": PRODUCTS,
            "decode_products": PRODUCTS,
            "attention": ATTENTIONS,
            "sde.method": samplers.SDE_METHODS,
            "sde.form": samplers.FORMS,
            "sde.last_step": samplers.LAST_STEPS,
            "ode.method": samplers.ODE_METHODS,
        },
        "sample",
    )
    if sample.labels == "file" and not sample.labels_file:
        problems.append(
            "sample.labels is 'file' but sample.labels_file names none: a text file with one class "
            "per line, or an .npy file"
        )
    if odd := set(sample.sets) - {"sde", "ode"}:
        problems.append(f"sample.sets has {sorted(odd)}; use 'sde', 'ode' or both")
    if odd := [c for c in sample.classes if not 0 <= c < config.diffusion.model.num_classes]:
        problems.append(
            f"sample.classes has {odd}; diffusion.model.num_classes is "
            f"{config.diffusion.model.num_classes}"
        )
    for name in ("sde", "ode"):
        section = sample[name]
        problems += _time_shift(section, f"sample.{name}")
        if section.steps < 2:
            problems.append(f"sample.{name}.steps is {section.steps}; a grid has 2 points or more")
        null_class = config.diffusion.model.class_dropout_prob > 0
        problems += _guidance_parts(section, f"sample.{name}")
        guided = section.guidance != 1 or section.guidance_parts
        if guided and not null_class and not sample.weaker:
            problems.append(
                f"sample.{name}.guidance is {section.guidance}, but with "
                "diffusion.model.class_dropout_prob 0 there is no null class to guide away from; "
                "set the guidance to 1 (none), or sample.weaker to a run with a weaker model"
            )
    if config.diffusion.flow.geometry == "sphere":
        if tuple(sample.sets) != ("ode",) or sample.ode.method != "euler":
            problems.append(
                "diffusion.flow.geometry 'sphere' has one sampler: set sample.sets to ('ode',) and "
                "sample.ode.method to 'euler'"
            )
        if config.tokenizer.name == "gae" and config.tokenizer.model.bottleneck != "norm":
            problems.append(
                "diffusion.flow.geometry 'sphere' needs tokenizer.model.bottleneck 'norm': the "
                "latents of another lie on no sphere"
            )
    if not 0 < sample.ode.end <= 1:
        problems.append(f"sample.ode.end is {sample.ode.end}; it must be > 0 and at most 1")
    if sample.sde.start <= 0 and config.diffusion.flow.path != "vp":
        problems.append(
            f"sample.sde.start is {sample.sde.start}; it must be > 0, where the score is finite"
        )
    return problems


def _guidance_parts(section, where: str) -> list[str]:
    """What is wrong with guidance that has a scale for every part of the time."""
    parts = section.guidance_parts
    if not parts:
        return []
    if any(len(part) != 2 for part in parts):
        return [f"{where}.guidance_parts is {parts}; it is made of pairs (last time, scale)"]
    ends = [end for end, _ in parts]
    if ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
        return [f"{where}.guidance_parts end at {ends}; they must increase, from above 0 up to 1"]
    if section.guidance != 1:
        return [f"{where}.guidance is {section.guidance}; with {where}.guidance_parts it must be 1"]
    return []


def _dino_clashes(section) -> list[str]:
    """What is wrong with ``tokenizer.discriminator``, as far as it is not PatchGAN's."""
    problems, dino = [], section.dino
    if odd := sorted(set(section.augment) - set(OPERATIONS)):
        problems.append(
            f"tokenizer.discriminator.augment has {odd}; known are {', '.join(OPERATIONS)}"
        )
    own = default_config().tokenizer.discriminator.dino
    if dino.weights == "dino" and (odd := [k for k in own if dino[k] != own[k] and k != "ks"]):
        problems.append(
            f"tokenizer.discriminator.dino.weights are DINO's own, but {', '.join(odd)} differ "
            "from its sizes; leave them, or take weights='random'"
        )
    if odd := [block for block in dino.key_depths if not 0 <= block < dino.depth]:
        problems.append(
            f"tokenizer.discriminator.dino.key_depths has {odd}; the blocks are 0 to "
            f"{dino.depth - 1}"
        )
    if dino.ks % 2 == 0:
        problems.append(f"tokenizer.discriminator.dino.ks is {dino.ks}; it must be odd")
    return problems


def _adaptive_align_clashes(tokenizer, kind) -> list[str]:
    """What is wrong with a weight of the alignment that follows the reconstruction's gradient."""
    problems = []
    if not kind.encoder_last:
        able = ", ".join(name for name, kind in TOKENIZERS.items() if kind.encoder_last)
        problems.append(
            "tokenizer.align.weight is 'adaptive': by gradients at the encoder's last layer, and "
            f"tokenizer {tokenizer.name!r} names none; use 'constant', or one of {able}"
        )
    phases = [phase[2] for phase in tokenizer.phases] or [tuple(tokenizer.losses)]
    live = [{name for name in names if tokenizer.losses.get(name)} for names in phases]
    if any("align" in names and names.isdisjoint(("l1", "perceptual")) for names in live):
        problems.append(
            "tokenizer.align.weight is 'adaptive', but a phase aligns without reconstruction, of "
            "whose gradient the weight is a share: give tokenizer.losses.l1 or perceptual a weight "
            "there, or use 'constant'"
        )
    return problems


def _tokenizer_clashes(tokenizer) -> list[str]:
    problems = _one_of(
        tokenizer,
        {
            "model.bottleneck": ("norm", "kl"),
            "model.patch_init": ("fan_out", "fan_in"),
            "perceptual.name": ("lpips", "lpips_random", "backbone"),
            "perceptual.dtype": ("float32", "bfloat16"),
            "align.dtype": ("float32", "bfloat16"),
            "align.target": ("teacher", "snapshot"),
            "align.point": ("latent", "pre", "post"),
            "align.loss": ("mse", "cosine", "vf"),
            "align.weight": ("constant", "adaptive"),
            "gan.loss": ("hinge", "vanilla"),
            "gan.weight": ("constant", "adaptive"),
            "discriminator.name": ("patch", "dino"),
            "discriminator.dino.weights": ("dino", "random"),
        },
        "tokenizer",
    )
    if tokenizer.name == "gae" and tokenizer.losses.kl and tokenizer.model.bottleneck != "kl":
        problems.append(
            "tokenizer.losses.kl is set, but only tokenizer.model.bottleneck='kl' has a variance"
        )
    problems += _compute_clashes(tokenizer, "tokenizer")
    if tokenizer.discriminator.stat_groups < 1:
        problems.append(
            f"tokenizer.discriminator.stat_groups is {tokenizer.discriminator.stat_groups}; it "
            "must be at least 1"
        )
    part = tokenizer.train.batch_size // max(tokenizer.compute.accumulate, 1)
    if part % max(tokenizer.discriminator.stat_groups, 1):
        problems.append(
            f"tokenizer.discriminator.stat_groups {tokenizer.discriminator.stat_groups} does not "
            f"divide the {part} images that are computed at once (tokenizer.train.batch_size / "
            "tokenizer.compute.accumulate)"
        )
    if tokenizer.name == "pae":
        problems += _pae_clashes(tokenizer.pae)
    if odd := [pair for pair in tokenizer.from_teacher if len(pair) != 2]:
        problems.append(
            f"tokenizer.from_teacher has {odd[0]!r}; give pairs (path in the tokenizer, path in "
            "the teacher)"
        )
    problems += _dino_clashes(tokenizer.discriminator)
    kind = kind_of(tokenizer)
    if odd := [name for name, w in tokenizer.losses.items() if w and name not in kind.terms]:
        problems.append(
            f"tokenizer.losses has {', '.join(odd)}, which tokenizer {tokenizer.name!r} cannot "
            f"serve; its terms are {', '.join(kind.terms)}"
        )
    if tokenizer.align.target == "snapshot" and tokenizer.align.point == "post":
        problems.append(
            "tokenizer.align.target 'snapshot' compares the tokenizer with itself: set "
            "tokenizer.align.point to 'latent' or 'pre'"
        )
    if tokenizer.align.weight == "adaptive":
        problems += _adaptive_align_clashes(tokenizer, kind)
    if odd := [p for p in tokenizer.phases if len(p) not in (3, 4)]:
        problems.append(
            f"tokenizer.phases has {odd[0]}; give (steps, regex, terms) or (steps, regex, terms, "
            "mode)"
        )
        return problems
    if not tokenizer.phases and "" not in kind.modes:
        problems.append(
            f"tokenizer.phases is empty, but tokenizer {tokenizer.name!r} trains in modes: give "
            f"(steps, regex, terms, mode) with the modes {', '.join(map(repr, kind.modes))}"
        )
    if odd := {p[3] if len(p) > 3 else "" for p in tokenizer.phases} - set(kind.modes):
        problems.append(
            f"tokenizer.phases name the modes {sorted(odd)}; tokenizer {tokenizer.name!r} has "
            f"{', '.join(map(repr, kind.modes))}"
        )
    length = sum(phase[0] for phase in tokenizer.phases)
    if tokenizer.phases and length != tokenizer.train.steps:
        problems.append(
            f"tokenizer.phases have {length} steps in all, tokenizer.train.steps is "
            f"{tokenizer.train.steps}; make them equal"
        )
    unknown = {name for phase in tokenizer.phases for name in phase[2]} - set(tokenizer.losses)
    if unknown:
        problems.append(
            f"tokenizer.phases name unknown terms {sorted(unknown)}; known are "
            f"{', '.join(tokenizer.losses)}"
        )
    return problems
