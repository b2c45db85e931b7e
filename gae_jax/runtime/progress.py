"""Progress bars with rate and remaining time, and measuring time."""

import logging
import math
import sys
import time

from tqdm import tqdm

from gae_jax.runtime.distributed import is_first


class Progress:
    """A progress bar on a terminal; a log line now and then elsewhere.

    Args:
      what: name of the work.
      total: units of work in all.
      done: units that earlier sessions did.
      unit: name of a unit.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, unit: str = "step"):
        self._what, self._total, self._unit = what, total, unit
        self._first, self._start, self._said = done, time.monotonic(), time.monotonic()
        self.done = done
        self._bar = None
        if sys.stderr.isatty() and is_first():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True)

    def update(self, count: int = 1) -> None:
        self.done += count
        if self._bar:
            self._bar.update(count)
        elif time.monotonic() - self._said > 60:
            self.say(self.done, {})

    def say(self, at: int, values: dict[str, float]) -> None:
        """Show metrics of step ``at`` beside the progress."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar:
            self._bar.set_postfix_str(text)
            return
        self._said = time.monotonic()
        rate = (self.done - self._first) / max(self._said - self._start, 1e-9)
        left = (self._total - self.done) / rate if rate else math.inf
        logging.info(
            "%s %d/%d %ss  %.3g %ss/s  %s left  %s",
            *(self._what, at, self._total, self._unit, rate, self._unit),
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
