"""Metrics of arrays in memory, as `gae_jax.metrics`."""

from typing import Any

from gae_jax.api.loaded_run import LoadedRun
from gae_jax.evaluation.frechet import frechet_distance
from gae_jax.runtime.errors import UserError


def frechet(
    a: Any,
    b: Any,
    *,
    features: str | None = None,
    run: LoadedRun | None = None,
    batch_size: int | None = None,
) -> float:
    """Compute the Frechet distance between two sets, in float64.

    With the features "inception" it is FID; with few images all of these are too large.

    Args:
      a, b: features [n, d] and [m, d]; with ``features`` images, as `LoadedRun.features` takes
        them. At least two each.
      features: by which images are compared, as of `LoadedRun.features`; None: a and b are
        features.
      run: that has the network of ``features``.
      batch_size: as of `LoadedRun.encode`.

    Raises:
      UserError: for fewer than two rows, different d, other than finite values, or images or
        features that the run does not take.
    """
    if features is None:
        return frechet_distance(a, b)
    if run is None:
        raise UserError(
            f"features is {features!r}, but no run is given that has the network; pass "
            "run=gae_jax.load(PATH), or features [n, d] instead of images"
        )
    sets = (run.features(images, features, batch_size=batch_size) for images in (a, b))
    return frechet_distance(*sets)
