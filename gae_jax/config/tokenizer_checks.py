"""The section ``tokenizer``; how it fits images and other networks is looked at in `networks`."""

from gae_jax.config import default_config
from gae_jax.config.checks import compute_clashes, is_tuple, one_of, start_clashes, training_clashes
from gae_jax.objectives.diff_augment import OPERATIONS
from gae_jax.tokenizers import TOKENIZERS, kind_of, section_of
from gae_jax.tokenizers.kind import Kind


def tokenizer_clashes(tokenizer) -> list[str]:
    """What is wrong with the section ``tokenizer``."""
    problems = one_of(
        tokenizer,
        {
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
    kind, section = kind_of(tokenizer), section_of(tokenizer)
    problems += one_of(tokenizer[section], kind.choices, f"tokenizer.{section}")
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
    problems += loss_clashes(tokenizer, kind) + align_clashes(tokenizer, kind)
    problems += discriminator_clashes(tokenizer.discriminator) + statistics_clashes(tokenizer)
    problems += phase_clashes(tokenizer, kind) + compute_clashes(tokenizer, "tokenizer")
    return problems + training_clashes(tokenizer, "tokenizer")


def loss_clashes(tokenizer, kind: Kind) -> list[str]:
    """What is wrong with the terms that have a weight."""
    problems = []
    if odd := [name for name, w in tokenizer.losses.items() if w and name not in kind.terms]:
        problems.append(
            f"tokenizer.losses has {', '.join(odd)}, which tokenizer {tokenizer.name!r} cannot "
            f"serve; its terms are {', '.join(kind.terms)}"
        )
    return problems


def align_clashes(tokenizer, kind: Kind) -> list[str]:
    """What is wrong with what the latents are aligned with, and with the weight of that."""
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


def discriminator_clashes(section) -> list[str]:
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


def statistics_clashes(tokenizer) -> list[str]:
    """What is wrong with the parts of a batch that the discriminator's statistics are of."""
    problems = []
    part = tokenizer.train.batch_size // tokenizer.compute.accumulate
    if part % tokenizer.discriminator.stat_groups:
        problems.append(
            f"tokenizer.discriminator.stat_groups {tokenizer.discriminator.stat_groups} does not "
            f"divide the {part} images that are computed at once (tokenizer.train.batch_size / "
            "tokenizer.compute.accumulate)"
        )
    return problems


def phase_clashes(tokenizer, kind: Kind) -> list[str]:
    """What is wrong with ``tokenizer.phases``."""
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
