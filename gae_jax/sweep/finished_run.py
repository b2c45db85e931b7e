"""Sweeps over a finished run (``--run=DIR``): its trained stages are linked, never retrained."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_collections

from gae_jax.config import expand_home, flatten, is_operational
from gae_jax.run import recorded_config
from gae_jax.run.run import Run
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.sweep.definition import Sweep

# Commands that make what a sweep over a finished run takes from it.
TRAINING = frozenset({"import-torch", "backbone", "teacher", "tokenizer", "latents", "diffusion"})
# Sections that no trained stage depends on, and the seed of the samples' noise.
FREE = ("sample", "evaluate", "likelihood", "reference", "mesh", "seed")


def on_run(sweep: Sweep, path: Path) -> Sweep:
    """Make a sweep vary a finished run: its config, its seed, and the commands after training.

    Raises:
      UserError: if there is no such run, its diffusion model or tokenizer is not finished, or the
        sweep runs nothing but training.
    """
    run = Run(path)
    seed = recorded_config.get_config(str(path)).seed  # refuses what is no run directory
    for name in ("tokenizer", "diffusion"):
        if not run.stage(name).done:
            raise UserError(
                f"--run={path}: its stage {name} is not finished; finish it first: python -m "
                f"gae_jax {name} {path}"
            )
    for name in ("latents", "diffusion"):
        if run.stage(name).done:
            run.stage(name).require_up_to_date()
    commands = tuple(command for command in sweep.commands if command not in TRAINING)
    if not commands:
        raise UserError(
            f"--run={path}: every command of this sweep trains ({', '.join(sweep.commands)}), and "
            "a finished run is not trained again; leave --run out"
        )
    config = f"{recorded_config.__file__}:{path}"
    return dataclasses.replace(sweep, config=config, seeds=(seed,), commands=commands)


def field_check(path: Path) -> Callable[[str, ml_collections.ConfigDict], None]:
    """Make the check of `configs_of` that a point differs from a run in sampling alone.

    The check raises ConfigError, which names the fields and both values.
    """
    base = recorded_config.get_config(str(path))
    expand_home(base)
    recorded = flatten(base)

    def check(name: str, config: ml_collections.ConfigDict) -> None:
        changed = [
            f"{field}={value!r}, which is {recorded.get(field)!r} in {path}"
            for field, value in flatten(config).items()
            if value != recorded.get(field)
            and field.split(".")[0] not in FREE
            and not is_operational(field)
        ]
        if changed:
            raise ConfigError(
                f"--run={path}: {name} sets {'; '.join(changed)}. The trained stages of a finished "
                f"run are used as they are, so only fields of {', '.join(FREE)} can vary; to train "
                "with other values, leave --run out"
            )

    return check
