"""What a changed field means for a stage that has begun: nothing, another course, or a new start.

Patterns of dotted paths, as of `fnmatch`; a test checks that each matches a field.
"""

from fnmatch import fnmatchcase

from gae_jax import tokenizers

# How a run is watched, fed and computed, not what it computes: results are the same for all values
# of these fields, so a stage resumes with any of them.
OPERATIONAL = (
    *(
        f"*.train.{name}"
        for name in ("log_every", "eval_every", "save_every", "keep", "best_metric", "best_mode")
    ),
    *("precision.*.remat", "precision.*.attention", "precision.*.kernels"),
    "tokenizer.health.*",
    *("data.workers", "data.cache", "data.cache_dir"),
    "data.root",  # images are known by what they are, wherever they lie (`run.contents`)
    "data.on_corrupt",  # what was read so far could be read, or was skipped
    # images do not depend on those that they are computed with
    *("latents.batch_size", "sample.batch_size", "evaluate.batch_size", "likelihood.batch_size"),
    # an evaluator that runs while diffusion trains; the stage `evaluate` does not read it
    "evaluate.online.*",
)

# The networks themselves. Some of these change no shape, but make trained weights another network
# (the number of heads).
NETWORK = (
    *("backbone.name", "backbone.dinov2.*", "backbone.dinov3.*", "backbone.mae.*"),
    *("backbone.siglip.*", "backbone.vit.*", "backbone.efficientnet_lite0.*"),
    *("teacher.kind", "teacher.model.*"),
    "tokenizer.name",
    *("tokenizer.discriminator.name", "tokenizer.discriminator.ndf"),
    *("tokenizer.discriminator.n_layers", "tokenizer.discriminator.dino.*"),
    *("diffusion.name", "diffusion.model.*", "diffusion.head.*", "diffusion.latent_multiplier"),
    "data.image_size",
)
# Read at step 0 alone.
START = (
    "tokenizer.from_teacher",
    *("*.init_from", "*.init_optimizer"),
)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns matches this field."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def is_operational(path: str) -> bool:
    """Whether a stage's results are the same for all values of this field."""
    return matches(path, OPERATIONAL)


def why_fixed(path: str) -> str:
    """Why a training that has begun cannot resume with another value; "" if it can."""
    if matches(path, (*START, *tokenizers.fields_of_kinds("start_fields"))):
        return "it is read at step 0 alone"
    networks = (*NETWORK, *tokenizers.network_fields())
    if matches(path, networks) and path not in tokenizers.fields_of_kinds("training_fields"):
        return "the network would be another one"
    return ""
