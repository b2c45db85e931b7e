"""Mean and covariance of features in float64, from batches on devices, over processes."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from gae_jax.data.moments import merge_moments
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.mesh import BATCH, check_batch

FLUSH = 16  # batches that are summed in float32 on the device before the host adds them
ROWS = 4096  # rows of features that are widened to float64 at once


def check_features(features: ArrayLike, what: str = "features") -> np.ndarray:
    """Fetch features [n, d] to the host, in the precision that they have.

    Raises:
      UserError: for another shape, or a NaN or an infinity.
    """
    features = np.asarray(features)
    if features.ndim != 2:
        raise UserError(f"{what}: shape {list(features.shape)}; flatten each row to [n, d]")
    for first in range(0, len(features), ROWS):
        bad = ~np.isfinite(features[first : first + ROWS]).all(axis=1)
        if bad.any():
            raise UserError(
                f"{what}: row {first + int(bad.argmax())} has a NaN or an infinity; drop or "
                "repair its image, and leave out rows that are padding"
            )
    return features


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of rows; merging sets loses no digits.

    Attributes:
      count: number of rows.
      mean: [d] float64.
      m2: sum of (x - mean)(x - mean)^T, [d, d] float64.
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Compute the moments of features [n, d], n >= 1, centred before they are multiplied.

        Raises:
          UserError: for features that are not finite, or none.
        """
        features = check_features(features)
        if not len(features):
            raise UserError("moments of 0 rows; give at least one")
        mean = features.mean(axis=0, dtype=np.float64)
        m2 = np.zeros((features.shape[1],) * 2)
        for first in range(0, len(features), ROWS):
            x = features[first : first + ROWS] - mean
            m2 += x.T @ x
        return cls(len(features), mean, m2)

    @property
    def covariance(self) -> np.ndarray:
        """Return the covariance with N - 1, as numpy.cov; [d, d].

        Raises:
          UserError: for fewer than two rows.
        """
        if self.count < 2:
            raise UserError(f"a covariance of {self.count} rows; it needs at least 2")
        return self.m2 / (self.count - 1)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together.

        Raises:
          UserError: for sets of different dimensions.
        """
        if self.mean.shape != other.mean.shape:
            raise UserError(
                f"moments of {len(self.mean)} and {len(other.mean)} dimensions cannot be merged; "
                "use one extractor for both"
            )
        if not other.count:  # of no rows, whose mean says nothing
            return self
        merged = merge_moments(self.count, self.mean, self.m2, other.count, other.mean, other.m2)
        return Moments(*merged)


class Accumulator:
    """Moments of batches of features as they leave a device.

    A batch's sums of (x - c) and (x - c)(x - c)^T are float32 on the device, with c the mean of
    the first batch. Each device keeps its own, of up to `FLUSH` batches; then they set out for
    the host, which adds them in float64 when the next ones follow. Devices never wait for the
    host and only wait for each other if the features' sharding makes them.

    Args:
      mesh: the mesh whose axes data and fsdp share the batch, also one of several processes (each
        then adds the rows of its own devices); None for features on one device.
    """

    def __init__(self, mesh: Mesh | None = None):
        self._mesh = mesh
        # [d] float32: the same numbers on the device and here
        self._centre: np.ndarray | None = None
        self._sums: jax.Array | None = None  # [devices, d + 1, d + 1]
        self._batches = 0
        self._arriving: list[jax.Array] = []
        self._total: np.ndarray | float = 0.0  # [d + 1, d + 1] float64

    def add(self, features: jax.Array, valid: np.ndarray | jax.Array | None = None) -> None:
        """Add a batch.

        Args:
          features: [B, d]; on a mesh, B rows in all.
          valid: [B] booleans, false for rows that are padding, whatever they hold; None for no
            padding. Over several processes a numpy array must be the same on all.

        Raises:
          UserError: for shapes that do not fit.
          ConfigError: if the batch does not divide over the mesh.
        """
        if valid is None:
            valid = np.ones(features.shape[:1], bool)
        if features.ndim != 2 or valid.shape != features.shape[:1]:
            raise UserError(
                f"features {list(features.shape)} with valid {list(valid.shape)}; "
                "they must be [B, d] and [B]"
            )
        if self._mesh is not None:
            check_batch(len(valid), self._mesh, "a batch of features of size")
        if self._centre is None:
            centre = _first_mean(features, valid, mesh=self._mesh)
            self._centre = np.asarray(centre.addressable_data(0))
        if features.shape[1] != len(self._centre):
            raise UserError(
                f"features of {features.shape[1]} dimensions after {len(self._centre)}; "
                "use one accumulator for each kind of features"
            )
        if self._sums is None:
            self._sums = _sums(features, valid, self._centre, mesh=self._mesh)
        else:
            self._sums = _add_sums(self._sums, features, valid, self._centre, mesh=self._mesh)
        self._batches += 1
        if self._batches == FLUSH:
            self._send()

    def _send(self) -> None:
        """Start copying the devices' sums to the host, and add those that arrived."""
        self._receive()
        if self._sums is not None:
            # replicas (of the axis tensor, say) hold the same rows
            shards = [s.data for s in self._sums.addressable_shards if s.replica_id == 0]
            for shard in shards:
                shard.copy_to_host_async()
            self._arriving, self._sums, self._batches = shards, None, 0

    def _receive(self) -> None:
        for shard in self._arriving:
            self._total = self._total + np.asarray(shard).astype(np.float64).sum(axis=0)
        self._arriving = []

    def moments(self, *, expected: int | None = None) -> Moments:
        """Return the moments of all rows added by all processes; each of them must call this.

        Args:
          expected: their number, where it is known.

        Raises:
          UserError: if there are none, or not as many as expected, or values are not finite.
        """
        self._send()
        self._receive()
        if self._centre is None:
            raise UserError("no features were added; every process needs a batch, if of padding")
        total, centre = np.broadcast_to(self._total, (len(self._centre) + 1,) * 2), self._centre
        count = round(total[-1, -1])
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is reported below
            shift = total[:-1, -1] / max(count, 1)
            m2 = total[:-1, :-1] - np.outer(shift, shift) * count
            merged = gather(Moments(count, centre.astype(np.float64) + shift, m2))
        if not merged.count or (expected is not None and merged.count != expected):
            raise UserError(
                f"{merged.count} features were added, expected "
                f"{'at least one' if expected is None else expected}; mask rows that are padding "
                "with `valid`, and give each row to one process alone"
            )
        if not (np.isfinite(merged.mean).all() and np.isfinite(merged.m2).all()):
            raise UserError(
                "features have a NaN or an infinity (or squares that overflow float32); look for "
                "it in the images or the weights of the extractor"
            )
        return merged


@partial(jax.jit, static_argnames="mesh")
def _first_mean(features, valid, mesh):
    x = jnp.where(valid[:, None], features.astype(jnp.float32), 0)
    mean = jnp.sum(x, axis=0) / jnp.maximum(jnp.sum(valid), 1)
    # a NaN is reported with the moments; as a centre it would spoil other rows too
    mean = jnp.where(jnp.isfinite(mean), mean, 0)
    return (
        mean if mesh is None else jax.lax.with_sharding_constraint(mean, NamedSharding(mesh, P()))
    )


def _grams(features, valid, centre, mesh):
    """Compute Gram matrices of (x - c, 1), [devices, d + 1, d + 1]: squares, sums and count."""
    valid = valid[:, None]
    x = jnp.where(valid, features.astype(jnp.float32) - centre, 0)
    x = jnp.concatenate([x, valid.astype(jnp.float32)], axis=1)
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    x = x.reshape(ways, -1, x.shape[1])
    x = _lay(x, mesh, BATCH)  # each device its own rows: nothing is sent
    grams = jnp.einsum("nbi,nbj->nij", x, x, precision=jax.lax.Precision.HIGHEST)
    return _lay(grams, mesh, BATCH)


def _lay(x, mesh, spec):
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


@partial(jax.jit, static_argnames="mesh")
def _sums(features, valid, centre, mesh):
    return _grams(features, valid, centre, mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _add_sums(sums, features, valid, centre, mesh):
    return sums + _grams(features, valid, centre, mesh)


def gather_float64(x: np.ndarray | float) -> np.ndarray:
    """Gather the arrays of all processes, [processes, ...], float64; all must call it.

    process_allgather would turn float64 to float32 (error 1e-7), so each number travels as two:
    48 bits and more of its 53.
    """
    wide = np.asarray(x, np.float64)
    if jax.process_count() == 1:
        return wide[None]
    high = wide.astype(np.float32)
    low = (wide - high).astype(np.float32)
    both = multihost_utils.process_allgather(np.stack([high, low]))
    return both.astype(np.float64).sum(axis=1)


def gather(moments: Moments) -> Moments:
    """Merge the moments of all processes' rows, equal on all; all must call it."""
    counts = gather_float64(moments.count)
    sets = zip(counts, gather_float64(moments.mean), gather_float64(moments.m2), strict=True)
    total = Moments(0, np.zeros_like(moments.mean), np.zeros_like(moments.m2))
    for count, mean, m2 in sets:
        total = total.merge(Moments(round(count), mean, m2))
    return total
