"""The range of every number in a config, by its dotted path.

A new numeric field needs a row in `RANGES`; a test walks all fields and fails without one.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from gae_jax.runtime.ranges import COUNT, COUNT_OR_NONE, GUIDANCE, SEED, Range, whole

SIZE, PIXELS, LAYERS = whole(1, 2**20), whole(1, 2**16), whole(1, 1000)
WEIGHT, POSITIVE = Range(0, limit=1e6), Range(0, limit=1e6, above=True)
RATE = Range(0, limit=1e3, above=True)
SHARE, FRACTION = Range(0, 1), Range(0, 1, below=True)
REAL = Range(-1e3, 1e3)

# (patterns of dotted paths, range); the first that matches counts. * is any text, # the
# number of an entry of a tuple: tokenizer.phases.0.0 is the first entry of the first phase.
RANGES: tuple[tuple[str, Range], ...] = (
    ("seed", SEED),
    ("mesh.slices", COUNT_OR_NONE),
    ("mesh.*", whole(1, also=(-1,))),
    ("data.holdout", FRACTION),
    ("data.workers", whole(0, 4096)),
    # how a stage is trained
    ("*.train.eval_every", COUNT_OR_NONE),
    ("*.train.*", COUNT),
    ("*optim.learning_rate", RATE),
    ("*optim.end_learning_rate", Range(0, limit=1e3)),
    ("*optim.*_steps", COUNT_OR_NONE),
    ("*optim.b1 *optim.b2", FRACTION),
    ("*optim.weight_decay *optim.clip_norm *optim.scales.#.1", WEIGHT),
    ("*.ema_decay", FRACTION),
    # networks
    ("backbone.shift", whole(0, 1024)),
    ("backbone.label_smoothing", FRACTION),
    ("backbone.efficientnet_lite0.strides.#", whole(2, 32)),
    ("*.interpolate_offset", SHARE),
    ("*.mlp_ratio", Range(0, limit=1e3, above=True)),
    ("*.image_size *.input_size *.patch_size *.decoder_patch_size *.resolution", PIXELS),
    ("*.attn_resolutions.# *.attention_resolutions.#", PIXELS),
    ("*.num_register_tokens *.num_kv_heads *.lora.rank", whole(0, 2**20)),
    ("*.lora.alpha", POSITIVE),
    ("*.num_hidden_layers *.num_layers *.depth *.decoder_layers *.n_layers", LAYERS),
    ("*.decoder_num_hidden_layers *.decoder_depth *.pixel_depth *.delta_depth", LAYERS),
    ("*.num_res_blocks", whole(0, 1000)),
    ("*.ch_mult.# *.channel_mult.#", LAYERS),
    ("*.key_depths.#", whole(0, 1000)),
    ("*.hidden_size *.hidden *.embed_dim *.latent_dim *.intermediate_size *.window_size", SIZE),
    ("*.decoder_hidden_size *.decoder_intermediate_size *.decoder_hidden *.pixel_dim", SIZE),
    ("*.pixel_hidden *.ch *.ndf *.z_channels *.model_channels *.num_head_channels", SIZE),
    ("*.heads *heads *.encoder_head_dim *.ks", SIZE),
    ("*.num_classes", whole(1, 10_000_000)),
    ("*.class_dropout_prob", SHARE),
    ("*.norm_eps", Range(0, 1, above=True)),
    # noise, times and terms
    ("*.time_least *.sigma_min", FRACTION),
    ("*.time_mean", REAL),
    ("*.time_std *.time_shift", Range(0, limit=1e3, above=True)),
    ("*.gamma *.ode.end", Range(0, 1, above=True)),
    ("*.latent_multiplier", POSITIVE),
    ("*.noise_std *.noise_factor *.noise_tau", WEIGHT),
    ("*.cos_margin *.distance_margin", Range(0, 2)),
    ("*_weight tokenizer.losses.*", WEIGHT),
    ("teacher.prior.strength", SHARE),
    ("teacher.prior.*", POSITIVE),
    ("teacher.svd.images", COUNT),
    ("tokenizer.pae.angles.#", Range(0, 90, above=True, below=True)),
    ("tokenizer.pae.jitter", FRACTION),
    ("tokenizer.discriminator.stat_groups tokenizer.dgae.decode_steps", COUNT),
    ("tokenizer.gan.eps", WEIGHT),
    ("tokenizer.gan.*", COUNT_OR_NONE),
    ("tokenizer.health.window", COUNT),
    ("tokenizer.health.*", COUNT_OR_NONE),
    ("tokenizer.phases.#.0", COUNT),
    # samples
    ("sample.classes.#", COUNT_OR_NONE),
    ("*.guidance *.guidance_parts.#.1", GUIDANCE),
    ("*.guidance_start *.guidance_end", SHARE),
    ("*.guidance_parts.#.0", Range(0, 1, above=True)),
    ("*.guidance_channels", COUNT_OR_NONE),
    ("*.rtol *.atol", Range(0, 1, above=True)),
    ("sample.sde.start *.last_step_size", FRACTION),
    ("sample.sde.norm", Range(0, limit=1e3)),
    ("sample.*.steps evaluate.online.steps likelihood.steps likelihood.images", whole(2)),
    # figures and tools
    ("evaluate.noise_levels.#", Range(0, limit=1e3)),
    ("evaluate.decode_steps evaluate.online.images evaluate.nearest", COUNT_OR_NONE),
    ("evaluate.images", whole(2)),
    ("evaluate.sgd_probe.learning_rate", RATE),
    ("evaluate.sgd_probe.momentum", FRACTION),
    ("evaluate.kid_subset_size", whole(2)),
    ("evaluate.inception_splits", COUNT_OR_NONE),
    ("bench.repeats", whole(5)),
    ("bench.feeding.sizes.#", PIXELS),
    ("bench.feeding.workers.#", whole(1, 4096)),
    ("bench.feeding.seconds", Range(0, 3600, above=True)),
    ("bench.chained bench.matmul bench.data.workers doctor.steps plan.batch_size", COUNT_OR_NONE),
    ("bench.data.rates.#", Range(0, limit=1e9, above=True)),
    ("plan.throughput.*", Range(0, limit=1e9)),
    ("*.images *_images *.batch_size *.shard_size *.per_class *.epochs", COUNT),
    ("bench.warmup bench.batches bench.*.steps bench.precision_recall.*", COUNT),
    ("doctor.disk_megabytes", COUNT),
)


@functools.cache
def _regex(patterns: str) -> re.Pattern:
    pattern = "|".join(map(re.escape, patterns.split()))
    return re.compile(pattern.replace(r"\*", ".*").replace(r"\#", r"\d+"))


@functools.cache
def range_of(path: str) -> Range | None:
    """The range of the number at a dotted path, or None if none is declared."""
    for patterns, found in RANGES:
        if _regex(patterns).fullmatch(path):
            return found
    return None


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of a field; of a tuple those of its entries, numbered."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        for index, entry in enumerate(value):
            yield from leaves(f"{path}.{index}", entry)
    else:
        yield path, value


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def range_problems(values: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """List the problems of the kind of every value, and with every number.

    Args:
      values: of a config, by dotted path.
      known: those of `default_config`, whose kinds (number, text, truth value, tuple) are right.
    """
    problems = []
    for path, value in values.items():
        default = known[path]
        if is_number(default):
            problems += _number_problems(path, value)
        elif isinstance(default, list | tuple):
            if not isinstance(value, list | tuple):
                problems.append(f"{path} is {value!r}; it must be a tuple, such as {default!r}")
                continue
            for entry, number in leaves(path, value):
                if is_number(number) or isinstance(number, bool) or range_of(entry):
                    problems += _number_problems(entry, number)
        elif isinstance(default, str) and is_number(value) and range_of(path):
            problems += _number_problems(path, value)  # a number or a word, such as "auto"
        elif isinstance(default, bool | str) and type(value) is not type(default):
            kind = "True or False" if isinstance(default, bool) else "a text"
            problems.append(f"{path} is {value!r}; it must be {kind}")
    return problems


def _number_problems(path: str, value: Any) -> list[str]:
    found = range_of(path)
    name = re.sub(r"\.(\d+)", r"[\1]", path)
    if found is None:
        return [f"{name} is {value!r}; no number belongs there"] if "[" in name else []
    problem = found.problem(value)
    return [f"{name} is {value!r}; it must be {problem}"] if problem else []
