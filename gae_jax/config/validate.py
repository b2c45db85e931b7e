"""Config validation, before any work is done."""

import difflib

import ml_collections

from gae_jax.config.checks import training_clashes
from gae_jax.config.choices import choice_problems, declared
from gae_jax.config.consistency import alignment_clashes, image_clashes
from gae_jax.config.data import data_clashes, mesh_clashes
from gae_jax.config.default import default_config
from gae_jax.config.diffusion import diffusion_clashes
from gae_jax.config.evaluation import evaluate_clashes
from gae_jax.config.precision import precision_clashes
from gae_jax.config.ranges import range_problems
from gae_jax.config.renamed import hint
from gae_jax.config.sample import sample_clashes
from gae_jax.config.teacher import teacher_clashes
from gae_jax.config.tokenizer import tokenizer_clashes
from gae_jax.config.tools import flatten
from gae_jax.runtime.errors import ConfigError
from gae_jax.tokenizers import kind_of, latent_shape, section_of


def validate(config: ml_collections.ConfigDict) -> None:
    """Check the keys of a config, the ranges of its numbers, and settings that may clash.

    Raises:
      ConfigError: naming each field, its nearest known neighbour and what to do.
    """
    default = default_config()
    known, given = flatten(default), flatten(config)
    problems = []
    for path in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(path, known, n=1)
        now = hint(path) or (f"did you mean {near[0]}?" if near else "")
        problems.append(f"unknown key {path}" + (f" ({now})" if now else ""))
    problems += [f"missing key {path}" for path in sorted(set(known) - set(given))]
    if not problems:
        problems += range_problems(given, known) or _clashes(config, given, default)
    if problems:
        raise ConfigError("the config cannot be used:\n  " + "\n  ".join(problems))


def _clashes(config, given, default) -> list[str]:
    """List the problems of a config with all fields, in the order of its sections.

    Args:
      given: its values by dotted path.
      default: the default config, which declares the choices.
    """
    names = choice_problems(given, declared(default))
    networks = [names[path] for path in ("backbone.name", "tokenizer.name") if path in names]
    if networks:  # their sizes are not known
        return networks
    problems = image_clashes(config)
    if problems and config.backbone.name == "efficientnet_lite0":  # nor are these
        return problems
    try:
        grid, _, latent_dim = latent_shape(config)
    except ValueError as error:
        # networks name their arguments, which are fields of the section
        path = f"tokenizer.{section_of(config.tokenizer)}"
        known = f"{path}.{str(error).split(' ')[0]}" in flatten(config)
        return [*names.values(), *problems, f"{path}{'.' if known else ': '}{error}"]
    return [
        *names.values(),
        *problems,
        *precision_clashes(config),
        *mesh_clashes(config.mesh),
        *data_clashes(config.data),
        *alignment_clashes(config, grid, latent_dim),
        *training_clashes(config.backbone, "backbone"),
        *teacher_clashes(config),
        *kind_of(config.tokenizer).checks(config),
        *tokenizer_clashes(config.tokenizer),
        *diffusion_clashes(config.diffusion, grid),
        *sample_clashes(config),
        *evaluate_clashes(config),
    ]
