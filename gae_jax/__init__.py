"""gae_jax: semantically aligned image tokenizers for latent diffusion, in JAX and Flax NNX.

``gae_jax.load("runs/demo")`` loads a run (docs/api.md); ``python -m gae_jax --help`` lists the
commands; docs/architecture.md says how the parts meet.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gae_jax.api import metrics as metrics
    from gae_jax.api.loaded_run import LoadedRun as LoadedRun
    from gae_jax.api.loaded_run import load as load
    from gae_jax.runtime.errors import UserError as UserError

__version__ = "0.1.0"

# Name -> its module. They are imported at first use: `import gae_jax` alone imports no JAX.
_LAZY = {
    "LoadedRun": "gae_jax.api.loaded_run",
    "UserError": "gae_jax.runtime.errors",
    "load": "gae_jax.api.loaded_run",
}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module("gae_jax.api.metrics")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "metrics"})
