"""The one config of the whole pipeline: its fields, defaults, choices and checks.

A file per section holds these side by side; `default.default_config` puts the sections together.
"""

from gae_jax.config.changes import is_operational, why_fixed
from gae_jax.config.default import default_config
from gae_jax.config.tools import at_home, bind, expand_home, flatten, load_config, plain, preset
from gae_jax.config.training import optim

__all__ = [
    "at_home",
    "bind",
    "default_config",
    "expand_home",
    "flatten",
    "is_operational",
    "load_config",
    "optim",
    "plain",
    "preset",
    "why_fixed",
]
