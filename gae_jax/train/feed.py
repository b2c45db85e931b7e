"""Batches on the devices, read ahead of use, and the time that the device waits for them."""

import queue
import time
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from gae_jax.data.batches import Batches, ReadAhead
from gae_jax.runtime.mesh import local_rows, put_rows

LOOK = 0.002  # seconds between two checks whether the device is idle
WARM_UP = 10  # first steps of a session, in which waiting does not count: processes start
SHARE = 0.05  # of the time; more waiting for data than that is worth a warning
MEASURED = 2.0  # seconds over which the share must have been measured for a warning


class Feed:
    """Endless global batches from number ``start`` on, read ahead of use.

    A batch is put on the devices when it is asked for, between two steps. A thread that did so
    during a step would place it behind the step's scratch memory and so fragment the free memory
    (LightningDiT-XL at batch 256 ran out of memory on an H200 that way, with 94 GiB free for 73).
    The transfer overlaps the steps in flight.

    Attributes:
      waited: seconds that the device was idle because a batch was not ready.
    """

    def __init__(self, batches: Batches, mesh: Mesh, start: int = 0):
        self._mesh, self._size, self.waited = mesh, batches.size, 0.0
        rows = local_rows(mesh, batches.size)
        self._ahead = ReadAhead(batches.read(rows.tolist(), start))

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        return self.take()

    def take(self, idle: Callable[[], bool] = lambda: True):
        """Return the next batch, on the devices.

        Args:
          idle: whether the device has finished all steps sent to it; only then is waiting lost
            time.
        """
        return put_rows(self._get(idle), self._mesh, self._size)

    def _get(self, idle: Callable[[], bool]):
        try:
            return self._ahead.get(timeout=0)
        except queue.Empty:
            pass
        since = None
        while True:
            if since is None and idle():
                since = time.perf_counter()
            try:
                batch = self._ahead.get(timeout=LOOK if since is None else None)
            except queue.Empty:
                continue
            if since is not None:
                self.waited += time.perf_counter() - since
            return batch

    def close(self) -> None:
        """End the threads and processes that read the batches."""
        self._ahead.close()


class Waiting:
    """Measures the share of a loop's time in which the device waited for data.

    Args:
      remedy: what a user can do about it.
    """

    def __init__(self, feed: Feed, remedy: str):
        self._feed, self._remedy, self._steps = feed, remedy, 0
        self._reported = self._measured = (0.0, 0.0)  # waited and elapsed until then
        self._elapsed, self._warned = 0.0, False
        self._since: float | None = time.perf_counter()  # None: the clock is stopped

    def step(self) -> None:
        """Count a step that was sent."""
        self._steps += 1
        if self._steps == WARM_UP:
            self._measured = self._now()

    def pause(self) -> None:
        """Stop the clock: what follows, an evaluation say, is not training."""
        self._elapsed = self._now()[1]
        self._since = None

    def resume(self) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def share(self) -> float:
        """Return the share since the last call."""
        now, before = self._now(), self._reported
        self._reported = now
        return _share(before, now)

    def warnings(self) -> list[str]:
        """Return a warning if the device waits too much, once; else nothing."""
        now = self._now()
        enough = self._steps > WARM_UP and now[1] - self._measured[1] > MEASURED
        if self._warned or not enough or (share := _share(self._measured, now)) <= SHARE:
            return []
        self._warned = True
        return [f"waits for data {share:.0%} of the time; {self._remedy}"]

    def _now(self) -> tuple[float, float]:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._feed.waited, self._elapsed + running


def _share(before: tuple[float, float], now: tuple[float, float]) -> float:
    waited, elapsed = (b - a for a, b in zip(before, now, strict=True))
    return min(1.0, waited / elapsed) if elapsed > 0 else 0.0
