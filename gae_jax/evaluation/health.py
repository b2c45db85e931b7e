"""Health of a tokenizer in training: metrics, pictures and warnings."""

import math
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np

from gae_jax.evaluation.latent import spectral_rank

# Accuracies from which it wins and below which it loses; distance of its loss from that of one
# that knows nothing. (A coin is right on half of the patches.)
WINS, LOSES, STALLS = 0.95, 0.45, 0.02
KNOWS_NOTHING = {"hinge": 1.0, "vanilla": math.log(2)}


def effective_rank(tokens: jax.Array) -> float:
    """Return exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007).

    Between 1 and C for tokens [N, C]: how many directions the latents use.
    """
    centred = tokens - jnp.mean(tokens, axis=0)
    return spectral_rank(jnp.linalg.eigvalsh(centred.T @ centred / len(tokens)))


class GanWatch:
    """Warn once of a discriminator that wins, loses or stalls, with the remedy.

    Args:
      loss: "hinge" or "vanilla".
      window: steps that it must last.
      rate, end_rate: learning rate of the discriminator, at the peak and the end of its schedule.
      weight: of the generator's term.
      start: updates after which the generator sees the discriminator; the checkpoint of this step
        is retained, if it is not 0.
    """

    def __init__(
        self,
        *,
        loss: str,
        window: int,
        rate: float = 1e-5,
        end_rate: float = 1e-6,
        weight: float = 0.5,
        start: int = 0,
    ):
        self._neutral, self._window = KNOWS_NOTHING[loss], window
        self._seen: deque[tuple[int, float, float]] = deque()
        self._said = ""
        self._rates, self._weight, self._start = (rate, end_rate), weight, start

    def _other_rate(self, factor: float) -> str:
        path = "--config.tokenizer.discriminator_optim"
        # the end of the schedule as well: it must not lie above its peak
        peak, end = (rate * factor for rate in self._rates)
        return f"--amend {path}.learning_rate={peak:g} {path}.end_learning_rate={end:g}"

    def _is_kept(self, step: int) -> bool:
        """Return whether a checkpoint from before the generator's GAN term is retained."""
        return 0 < self._start <= step

    def _head_start(self, step: int) -> str:
        later = (self._start or step) + self._window
        back = f" --from-step={self._start}" if self._is_kept(step) else ""
        return (
            "let it learn alone for longer before the generator sees it (--amend"
            f"{back} --config.tokenizer.gan.start={later})"
        )

    def __call__(self, step: int, values: dict[str, float]) -> list[str]:
        """Log warnings on the metrics of a report."""
        if "discriminator/accuracy" not in values:
            return []
        self._seen.append((step, values["discriminator/accuracy"], values["discriminator/loss"]))
        while self._seen[0][0] <= step - self._window:
            self._seen.popleft()
        if step - self._seen[0][0] < self._window * 0.9:
            return []  # not long enough to tell
        _, accuracy, loss = np.asarray(self._seen).T
        what = ""
        if accuracy.min() > WINS:
            weight = f"--amend --config.tokenizer.losses.gan={self._weight / 2:g}"
            back = (
                f", or any of them with --from-step={self._start}, the checkpoint kept from before "
                "the generator saw it"
            )
            what = (
                f"the discriminator has won: over {self._window} steps it was right on at least "
                f"{accuracy.min():.0%} of the patches, so its gradient says little; stop, and run "
                f"the same command again with a lower learning rate ({self._other_rate(0.5)}) or a "
                f"lower weight ({weight})" + (back if self._is_kept(step) else "")
            )
        elif accuracy.max() < LOSES:
            what = (
                f"the discriminator loses: over {self._window} steps it was right on at most "
                f"{accuracy.max():.0%} of the patches, so the generator runs away from the real "
                "images along what it does not know; stop, and run the same command again with a "
                f"higher learning rate ({self._other_rate(2)}), or {self._head_start(step)}"
            )
        elif np.abs(loss - self._neutral).max() < STALLS:
            what = (
                f"the discriminator has stalled: over {self._window} steps its loss stayed at "
                f"{self._neutral:.2f}, which is that of one that knows nothing; stop, and run the "
                f"same command again with a higher learning rate ({self._other_rate(2)}), or "
                f"{self._head_start(step)}"
            )
        new = what.split(":")[0]
        if new == self._said:
            return []
        self._said = new
        return [what] if what else []


def pairs(real: np.ndarray, restored: np.ndarray) -> np.ndarray:
    """Join real images above their reconstructions, both uint8 [n, S, S, 3]: [2 S, n S, 3]."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in (real, restored)], axis=0)
