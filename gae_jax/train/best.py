"""Retaining the checkpoint with the best score of the evaluations."""

import dataclasses
import math
from collections.abc import Iterable

from orbax.checkpoint.checkpoint_managers import preservation_policy


@dataclasses.dataclass(frozen=True)
class Best(preservation_policy.PreservationPolicy):
    """Retains the checkpoint with the best score; of equal scores the latest.

    A step is saved before it is evaluated, so its score is added later (`add`). On resuming, the
    scores of earlier sessions are added first.

    Attributes:
      metric: the metric of an evaluation that is the score.
      mode: "min" or "max".
      scores: step -> score.
    """

    metric: str
    mode: str
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def add(self, step: int, score: float) -> None:
        """Add the score of a step; a NaN is no score."""
        if not math.isnan(score):
            self.scores[step] = score

    def of(self, steps: Iterable[int]) -> int | None:
        """Return the best of these steps, or None if none has a score."""
        sign = -1 if self.mode == "min" else 1
        ranked = [(sign * self.scores[step], step) for step in steps if step in self.scores]
        return max(ranked)[1] if ranked else None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        best = self.of(info.step for info in checkpoints)
        return [info.step == best for info in checkpoints]
