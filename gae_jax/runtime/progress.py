"""Progress bars with rate and remaining time, and measuring time."""

import collections
import logging
import math
import sys
import time

from tqdm import tqdm

from gae_jax.runtime.distributed import is_first

RECENT = 30.0  # seconds over which the rate of a log line is measured


class Progress:
    """A progress bar on a terminal; a log line now and then elsewhere.

    The rate is that of the last `RECENT` seconds. The remaining time follows from the average since
    the first update: it counts evaluations in between, and not the compilation before.

    Args:
      what: name of the work.
      total: units of work in all.
      done: units that earlier sessions did.
      unit: name of a unit.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, unit: str = "step"):
        self._what, self._total, self._unit = what, total, unit
        self._said = time.monotonic()
        self.done = done
        self._first: tuple[float, int] | None = None  # time and units done at the first update
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._bar = None
        if sys.stderr.isatty() and is_first():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True)

    def update(self, count: int = 1) -> None:
        self.done += count
        if self._bar:
            self._bar.update(count)
            return
        now = time.monotonic()
        self._first = self._first or (now, self.done)
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append((now, self.done))
        if now - self._said > 60:
            self.say(self.done, {})

    def _rate(self, since: tuple[float, int], now: float) -> float:
        """Units per second since a mark; 0 before there is a second one."""
        return (self.done - since[1]) / max(now - since[0], 1e-9)

    def say(self, at: int, values: dict[str, float]) -> None:
        """Show metrics of step ``at`` beside the progress."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar:
            self._bar.set_postfix_str(text)
            return
        now = self._said = time.monotonic()
        while len(self._marks) > 1 and now - self._marks[1][0] >= RECENT:
            self._marks.popleft()
        rate = self._rate(self._marks[0], now) if self._marks else 0.0
        average = self._rate(self._first, now) if self._first else 0.0
        left = (self._total - self.done) / average if average else math.inf
        logging.info(
            "%s %d/%d %ss  %s %ss/s  %s left  %s",
            *(self._what, at, self._total, self._unit, f"{rate:.3g}" if rate else "?", self._unit),
            *(duration(left), text),
        )

    def close(self) -> None:
        if self._bar:
            self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _short(value: float) -> str:
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Format seconds: 75 -> "1:15", 3675 -> "1:01:15"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Stopwatch:
    """Measures seconds spent on a stage, starting from those of earlier sessions."""

    def __init__(self, before: float = 0.0):
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
