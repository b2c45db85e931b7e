"""The config of a run that is there: what its stages were made with, over the defaults.

``python -m gae_jax evaluate RUN`` reads it in the place of a config file.
"""

from pathlib import Path
from typing import Any

import ml_collections

from gae_jax.config import default_config
from gae_jax.errors import UserError
from gae_jax.files import REMADE, explained, read_object


def get_config(path: str) -> ml_collections.ConfigDict:
    """The config of the run directory ``path``; sections that no stage records are the defaults.

    Raises:
      UserError: if there is no run.
    """
    config, markers = default_config(), sorted(Path(path).glob("*/config.json"))
    if not markers:
        raise UserError(f"{path} is no run directory: no folder in it has a config.json")
    for marker in markers:
        recorded = read_object(marker, config=dict)["config"]
        with explained(marker, "give --config=FILE and --workdir, or " + REMADE):
            for name, section in recorded.items():
                if isinstance(section, dict):
                    config[name].update(_tuples(section))
                else:
                    config[name] = section
    return config


def _tuples(value: Any) -> Any:
    """JSON has lists where the config has tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
