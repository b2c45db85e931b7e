"""Refuses configs that cannot be run, before any work is done."""

import difflib

import ml_collections

from gae_jax.config import default_config, flatten
from gae_jax.config.checks import training_clashes
from gae_jax.config.command_checks import bench_clashes, import_clashes
from gae_jax.config.consistency import (
    alignment_clashes,
    data_clashes,
    image_clashes,
    mesh_clashes,
    unknown_networks,
)
from gae_jax.config.diffusion_checks import diffusion_clashes, latents_clashes
from gae_jax.config.evaluation_checks import evaluate_clashes, reference_clashes
from gae_jax.config.ranges import range_problems
from gae_jax.config.sample_checks import sample_clashes
from gae_jax.config.teacher_checks import teacher_clashes
from gae_jax.config.tokenizer_checks import tokenizer_clashes
from gae_jax.runtime.errors import ConfigError
from gae_jax.tokenizers import kind_of, latent_shape, section_of


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses keys that `default_config` does not have, missing keys, numbers
    that make no sense and settings that clash.

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
        problems += range_problems(given, known) or _clashes(config)
    if problems:
        raise ConfigError("the config cannot be used:\n  " + "\n  ".join(problems))


def _clashes(config) -> list[str]:
    """What is wrong with a config whose fields are all there, in the order of its sections."""
    if unknown := unknown_networks(config):  # no size can be asked of them
        return unknown
    problems = image_clashes(config)
    try:
        grid, _, latent_dim = latent_shape(config)
    except ValueError as error:
        # networks name their arguments, which are fields of the section
        path = f"tokenizer.{section_of(config.tokenizer)}"
        known = f"{path}.{str(error).split(' ')[0]}" in flatten(config)
        return [*problems, f"{path}{'.' if known else ': '}{error}"]
    return [
        *problems,
        *mesh_clashes(config.mesh),
        *data_clashes(config.data),
        *alignment_clashes(config, grid, latent_dim),
        *training_clashes(config.backbone, "backbone"),
        *teacher_clashes(config),
        *tokenizer_clashes(config.tokenizer),
        *kind_of(config.tokenizer).checks(config),
        *latents_clashes(config.latents),
        *diffusion_clashes(config.diffusion, grid),
        *sample_clashes(config),
        *evaluate_clashes(config),
        *reference_clashes(config.make_reference),
        *bench_clashes(config.bench),
        *import_clashes(config.import_torch),
    ]
