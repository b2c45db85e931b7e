"""Ranges of numbers, for config fields and command-line flags."""

import dataclasses
import math
from numbers import Integral, Real
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a field may have.

    Attributes:
      low, high: smallest and largest value that make sense.
      limit: technical bound for a field without ``high``.
      above, below: whether ``low`` and ``high`` themselves are excluded.
      whole: whether only integers are allowed.
      also: special values outside of the range.
    """

    low: float
    high: float = math.inf
    limit: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    also: tuple[int, ...] = ()

    def problem(self, value: Any) -> str:
        """Say what ``value`` must be; empty if it is in the range."""
        number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        # isfinite fails for integers that are too large for a float
        if not number or not (isinstance(value, Integral) or math.isfinite(value)):
            return f"a {'whole' if self.whole else 'finite'} number, {self._interval()}"
        if value in self.also:
            return ""
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        if not (low and high):
            return self._interval()
        return "" if value <= self.limit else f"at most {self.limit:,.0f}"

    def _interval(self) -> str:
        if math.isinf(self.high):
            text = f"> {self.low:g}" if self.above else f"at least {self.low:g}"
        elif self.whole:
            text = f"from {self.low:.0f} to {self.high:.0f}"
        else:
            ends = "([", self.above, f"{self.low:g}, {self.high:g}", ")]", self.below
            text = f"in {ends[0][not ends[1]]}{ends[2]}{ends[3][not ends[4]]}"
        return text + "".join(f", or {value}" for value in self.also)


def whole(low: int, limit: float = 2**31 - 1, **options) -> Range:
    """Make a range of integers; ``options``: other attributes of `Range`."""
    return Range(low, limit=limit, whole=True, **options)


COUNT, COUNT_OR_NONE = whole(1), whole(0)
SEED = Range(0, 2**32 - 1, whole=True)
GUIDANCE = Range(0, limit=1e3)
