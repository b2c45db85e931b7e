"""What shows while a tokenizer trains whether it is well: figures, pictures and warnings."""

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
    """exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007).

    Between 1 and C for tokens [N, C]: how many directions the latents use.
    """
    centred = tokens - jnp.mean(tokens, axis=0)
    return spectral_rank(jnp.linalg.eigvalsh(centred.T @ centred / len(tokens)))


class GanWatch:
    """Notices a discriminator that wins, loses or stalls, and says once what to do.

    Args:
      loss: "hinge" or "vanilla".
      window: steps that it must last.
    """

    def __init__(self, *, loss: str, window: int):
        self._neutral, self._window = KNOWS_NOTHING[loss], window
        self._seen: deque[tuple[int, float, float]] = deque()
        self._said = ""

    def __call__(self, step: int, values: dict[str, float]) -> list[str]:
        """Warnings on the metrics of a report."""
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
            what = (
                f"the discriminator has won: over {self._window} steps it was right on at least "
                f"{accuracy.min():.0%} of the patches, so its gradient says little; lower "
                "tokenizer.discriminator_optim.learning_rate or tokenizer.losses.gan, or go back "
                "to the checkpoint kept at tokenizer.gan.start"
            )
        elif accuracy.max() < LOSES:
            what = (
                f"the discriminator loses: over {self._window} steps it was right on at most "
                f"{accuracy.max():.0%} of the patches, so the generator runs away from the real "
                "images along what it does not know; raise tokenizer.discriminator_optim."
                "learning_rate, shorten its warmup_steps, or let it begin earlier "
                "(tokenizer.gan.discriminator_start before tokenizer.gan.start)"
            )
        elif np.abs(loss - self._neutral).max() < STALLS:
            what = (
                f"the discriminator has stalled: over {self._window} steps its loss stayed at "
                f"{self._neutral:.2f}, which is that of one that knows nothing; raise "
                "tokenizer.discriminator_optim.learning_rate or give it a longer head start "
                "(tokenizer.gan.discriminator_start before tokenizer.gan.start)"
            )
        new = what.split(":")[0]
        if new == self._said:
            return []
        self._said = new
        return [what] if what else []


def pairs(real: np.ndarray, found: np.ndarray) -> np.ndarray:
    """uint8 images [n, S, S, 3] twice -> one picture, the real ones above."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in (real, found)], axis=0)
