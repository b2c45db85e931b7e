"""Optimizers from config sections."""

import re
from collections.abc import Sequence
from itertools import accumulate

import jax
import optax


def make_schedule(
    *, steps: int, learning_rate: float, end_learning_rate: float, warmup_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine from the peak to the end value at ``steps``.

    Without a warm-up the peak comes first; equal peak and end value make a constant.
    """
    if end_learning_rate == learning_rate:
        constant = optax.constant_schedule(learning_rate)
        if not warmup_steps:  # optax's warm-up of no steps would stay at 0 for ever
            return constant
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        return optax.join_schedules([warmup, constant], [warmup_steps])
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps, warmup_steps + 1),
        end_value=end_learning_rate,
    )


def decayed(params) -> dict:
    """True for the leaves that weight decay applies to: those of two and more dimensions."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(
    steps: int,
    *,
    learning_rate: float,
    end_learning_rate: float,
    warmup_steps: int,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    scales: Sequence[tuple[str, float]] = (),
    restart: bool = False,
    phases: Sequence[int] = (),
) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay over ``steps``, optionally clipped.

    Args:
      scales: (regex, factor) of the learning rate, searched in paths such as
        ``encoder/blocks/0/attn/qkv/kernel``; the first that matches counts.
      restart: the schedule starts anew in each of the ``phases``, given by their steps.
    """

    def over(steps: int) -> optax.Schedule:
        return make_schedule(
            steps=steps,
            learning_rate=learning_rate,
            end_learning_rate=end_learning_rate,
            warmup_steps=warmup_steps,
        )

    if restart and phases:
        schedule = optax.join_schedules(list(map(over, phases)), list(accumulate(phases))[:-1])
    else:
        schedule = over(steps)
    found = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    if scales:
        found = optax.chain(found, scale_by_path(scales))
    return optax.chain(optax.clip_by_global_norm(clip_norm), found) if clip_norm else found


def scale_by_path(scales: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies updates by the factor of the first regex that is found in their path, or by 1."""
    patterns = [(re.compile(pattern), factor) for pattern, factor in scales]

    def scaled(path, update):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return update * next((f for pattern, f in patterns if pattern.search(name)), 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))
