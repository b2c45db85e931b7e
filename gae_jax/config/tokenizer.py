"""The section ``tokenizer`` and its checks; `consistency` has how it fits other networks."""

from gae_jax.config.checks import (
    accumulation_clashes,
    is_tuple,
    start_clashes,
    training_clashes,
)
from gae_jax.config.choices import Choice, choice, choices
from gae_jax.config.training import optim, train
from gae_jax.tokenizers import TOKENIZERS, default_sizes, kind_of, section_of
from gae_jax.tokenizers.kind import Kind

# The frozen network of the discriminator "dino", as RAE's code has it.
DINO = dict(
    embed_dim=384,
    depth=12,
    num_heads=6,
    mlp_ratio=4.0,
    image_size=224,  # pixels that images are resized to
    patch_size=8,
    key_depths=(2, 5, 8, 11),  # blocks that it looks at, from 0, beside the last
    ks=9,  # tokens that the heads' middle convolution spans
    norm_eps=1e-6,
)


def tokenizer_sizes() -> dict[str, dict]:
    """The sizes of all tokenizers, with the choices that each declares."""
    sizes = default_sizes()
    for name, kind in TOKENIZERS.items():
        section = sizes[section_of({"name": name})]
        for field, names in kind.choices.items():
            section[field] = Choice(section[field], names)
    return sizes


def tokenizer_section() -> dict:
    """The autoencoder, its terms and its training; the sizes of all tokenizers lie side by side."""
    return dict(
        # gae, whose sizes are in ``model``, or another of gae_jax/tokenizers/*_kind.py, with its
        # sizes in the section of its name
        name=choice(*TOKENIZERS),
        **tokenizer_sizes(),
        discriminator=dict(
            # patch: PatchGAN, of the next three | dino: RAE's, heads on a frozen DINO, of dino
            name=choice("patch", "dino"),
            ndf=64,  # [code]
            n_layers=3,  # [code]
            stat_groups=1,  # batch statistics over the global batch, or over so many parts of it
            # (RAE's code) dino: ViT-S/8, from import-torch | random weights, which stay; the sizes
            dino=dict(weights=choice("dino", "random"), **DINO),
            # operations of gae_jax/objectives/diff_augment.py on all that it sees; RAE's code has
            # translation, brightness, saturation and contrast
            augment=choices((), "objectives.diff_augment:OPERATIONS"),
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
        perceptual=dict(name=choice("lpips", "lpips_random", "backbone")),
        align=dict(
            # teacher: its latents, or the backbone's features where the point is no latent |
            # snapshot: the tokenizer itself, as it was when the first phase with this term began
            target=choice("teacher", "snapshot"),  # [paper]
            # [paper] latent | pre: encoder's features | post: linear of the latent
            point=choice("latent", "pre", "post"),
            loss=choice("mse", "cosine", "vf"),  # [code] vf: that of VA-VAE, with the fields below
            # constant | adaptive, of VA-VAE: losses.align times the ratio of the reconstruction's
            # gradient to this term's, at the encoder's last layer
            weight=choice("constant", "adaptive"),
            cos_margin=0.5,
            distance_margin=0.25,
            cos_weight=1.0,
            distance_weight=1.0,
        ),
        gan=dict(
            loss=choice("hinge", "vanilla"),  # [code]
            weight=choice("constant", "adaptive"),  # [code] adaptive: by gradients
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
        # Weights to start from instead of random ones: a run directory whose tokenizer is
        # trained or imported, RUN@STEP for one of its kept checkpoints, or a folder of export-torch
        init_from="",
        init_optimizer=False,  # takes Adam's moments along; the schedule starts anew
        ema_decay=0.0,  # 0: no moving average; else later stages use it
        optim=optim(phases=True),  # [paper]
        discriminator_optim=optim(  # [code] peak
            phases=True, learning_rate=1e-5, end_learning_rate=1e-6
        ),
        train=train(),  # [paper] 200 epochs
        health=dict(
            pictures=8,  # held-out images whose reconstructions TensorBoard shows; 0: none
            probe=2_000,  # images of either split for the probe while training; 0: none
            window=2_000,  # steps over which a discriminator that wins or stalls is noticed
        ),
    )


def tokenizer_clashes(tokenizer) -> list[str]:
    """List the problems of the section ``tokenizer``."""
    problems = []
    if odd := [pair for pair in tokenizer.from_teacher if not is_tuple(pair, 2)]:
        problems.append(
            f"tokenizer.from_teacher has {odd[0]!r}; give pairs (path in the tokenizer, path in "
            "the teacher)"
        )
    if tokenizer.from_teacher and tokenizer.init_from:
        problems.append(
            "tokenizer.from_teacher and tokenizer.init_from both say what the tokenizer starts "
            "from; pass --config.tokenizer.from_teacher='()' to start from the latter"
        )
    problems += start_clashes(tokenizer, "tokenizer")
    if odd := [p for p in tokenizer.phases if not is_tuple(p, 3, 4)]:
        what = "give (steps, regex, terms) or (steps, regex, terms, mode)"
        return [*problems, f"tokenizer.phases has {odd[0]!r}; {what}"]
    kind = kind_of(tokenizer)
    problems += loss_clashes(tokenizer, kind) + align_clashes(tokenizer, kind)
    problems += discriminator_clashes(tokenizer.discriminator) + statistics_clashes(tokenizer)
    problems += phase_clashes(tokenizer, kind) + accumulation_clashes(tokenizer, "tokenizer")
    return problems + training_clashes(tokenizer, "tokenizer")


def loss_clashes(tokenizer, kind: Kind) -> list[str]:
    """List the problems of the terms that have a weight."""
    problems = []
    if odd := [name for name, w in tokenizer.losses.items() if w and name not in kind.terms]:
        problems.append(
            f"tokenizer.losses has {', '.join(odd)}, which tokenizer {tokenizer.name!r} cannot "
            f"serve; its terms are {', '.join(kind.terms)}"
        )
    return problems


def align_clashes(tokenizer, kind: Kind) -> list[str]:
    """List the problems of what the latents are aligned with, and with the weight of that."""
    problems = []
    if tokenizer.align.target == "snapshot" and tokenizer.align.point == "post":
        problems.append(
            "tokenizer.align.target 'snapshot' compares the tokenizer with itself: set "
            "tokenizer.align.point to 'latent' or 'pre'"
        )
    if tokenizer.align.weight == "adaptive":
        problems += adaptive_align_clashes(tokenizer, kind)
    return problems


def adaptive_align_clashes(tokenizer, kind: Kind) -> list[str]:
    """List the problems of a weight of the alignment that follows the reconstruction's gradient."""
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


def discriminator_clashes(section) -> list[str]:
    """List the problems of ``tokenizer.discriminator``, as far as it is not PatchGAN's."""
    problems, dino = [], section.dino
    changed = [name for name, size in DINO.items() if dino[name] != size and name != "ks"]
    if dino.weights == "dino" and changed:
        problems.append(
            f"tokenizer.discriminator.dino.weights are DINO's own, but {', '.join(changed)} differ "
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


def statistics_clashes(tokenizer) -> list[str]:
    """List the problems of the parts of a batch that the discriminator's statistics are of."""
    problems = []
    part = tokenizer.train.batch_size // tokenizer.train.accumulate
    if part % tokenizer.discriminator.stat_groups:
        problems.append(
            f"tokenizer.discriminator.stat_groups {tokenizer.discriminator.stat_groups} does not "
            f"divide the {part} images that are computed at once (tokenizer.train.batch_size / "
            "tokenizer.train.accumulate)"
        )
    return problems


def phase_clashes(tokenizer, kind: Kind) -> list[str]:
    """List the problems of ``tokenizer.phases``."""
    problems = []
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
