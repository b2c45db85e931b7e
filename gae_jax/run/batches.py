"""Computing any number of rows in batches of few sizes, so that little is compiled."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gae_jax.run.sampling_config import BATCH_SIZE, LIMITS
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.mesh import batch_of, put_batch, to_host

# What a caller gives to follow the work: (rows that are done, rows in all) -> None.
Callback = Callable[[int, int], Any]


def bucket_of(count: int, batch_size: int | None, mesh: Mesh, *, most: int = BATCH_SIZE) -> int:
    """Return the size that batches are padded to.

    Args:
      count: of rows.
      batch_size: the size, rounded up to a multiple of the devices; None: the number of devices
        times the smallest power of two that holds all rows, at most ``most``.

    Raises:
      UserError: for a batch size that is no positive integer.
    """
    if batch_size is not None:
        if problem := LIMITS["batch_size"].problem(batch_size):
            raise UserError(f"batch_size is {batch_size!r}; it must be {problem}")
        return batch_of(batch_size, batch_size, mesh)
    most, size = batch_of(most, most, mesh), batch_of(1, 1, mesh)
    while size < min(count, most):
        size *= 2
    return min(size, most)


def in_batches(
    program: Callable[..., Any],
    fixed: tuple,
    columns: tuple[np.ndarray, ...],
    *,
    mesh: Mesh,
    batch_size: int | None,
    most: int = BATCH_SIZE,
    callback: Callback | None = None,
) -> np.ndarray:
    """Compute ``program(*fixed, *batch)`` [size, ...] over the rows of columns, on the host.

    A batch is computed while the one before is fetched. The last one is padded with its last row.

    Args:
      program: jitted.
      fixed: arguments that are the same for all batches, on the devices.
      columns: [n, ...] each, n > 0.
      batch_size, most: as of `bucket_of`.

    Returns:
      [n, ...].
    """
    count = len(columns[0])
    size = bucket_of(count, batch_size, mesh, most=most)
    waiting: list[tuple[int, Any]] = []
    rows: list[np.ndarray] = []

    def fetch() -> None:
        end, output = waiting.pop(0)
        rows.append(to_host(output)[: end - len(rows) * size])
        if callback:
            callback(end, count)

    for first in range(0, count, size):
        at = np.minimum(np.arange(first, first + size), count - 1)
        batch = put_batch(tuple(column[at] for column in columns), mesh)
        waiting.append((min(first + size, count), program(*fixed, *batch)))
        if len(waiting) > 1:
            fetch()
    while waiting:
        fetch()
    return np.concatenate(rows)
