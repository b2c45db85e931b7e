"""The networks and compiled functions of a loaded run, kept for the next call."""

from collections.abc import Callable
from typing import Any, TypeVar

from jax.sharding import Mesh, NamedSharding

from gae_jax.nn.network import Loaded
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.runtime.mesh import BATCH, jit_on

PROGRAMS = 32  # compiled functions that are kept; the oldest is dropped

T = TypeVar("T")


class Programs:
    """Loads networks and compiles functions of them once, on a mesh."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._loaded: dict[Any, Any] = {}
        self._jitted: dict[str, Callable[..., Any]] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what ``make`` made at the first call with this key."""
        if key not in self._loaded:
            self._loaded[key] = make()
        return self._loaded[key]

    def network(self, folder: StageFolder, mesh: Mesh, **how) -> Loaded:
        """Load the network of a stage as `run.load.load`, once for each precision."""
        key = folder.path, repr(sorted(how.items()))
        return self.once(key, lambda: load(folder, mesh, **how))

    def jitted(
        self, key: tuple, function: Callable[..., Any], *, batch: bool = True
    ) -> Callable[..., Any]:
        """Return ``function`` jitted on the mesh, the same for the same key.

        Args:
          key: of everything that ``function`` depends on besides its arguments.
          batch: whether its result is an array [B, ...].
        """
        if (text := repr(key)) not in self._jitted:
            if len(self._jitted) >= PROGRAMS:
                del self._jitted[next(iter(self._jitted))]
            options = {"out_shardings": NamedSharding(self.mesh, BATCH)} if batch else {}
            self._jitted[text] = jit_on(self.mesh, **options)(function)
        return self._jitted[text]
