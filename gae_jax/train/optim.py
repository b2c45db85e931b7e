"""Optimizers and learning-rate schedules from config sections."""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate

import jax
import optax


def make_schedule(
    *,
    steps: int,
    learning_rate: float,
    end_learning_rate: float,
    warmup_steps: int,
    decay: str = "cosine",
    hold_steps: int = 0,
) -> optax.Schedule:
    """Make a schedule: linear warm-up from 0, then decay from the peak to the end at ``steps``.

    The decay begins ``hold_steps`` after the warm-up. Equal peak and end make a constant.

    Args:
      learning_rate, end_learning_rate: peak and end.
      decay: "cosine" or "linear".
    """
    if end_learning_rate == learning_rate:
        constant = optax.constant_schedule(learning_rate)
        if not warmup_steps:  # optax's warm-up of no steps would stay at 0
            return constant
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        return optax.join_schedules([warmup, constant], [warmup_steps])
    if hold_steps or decay == "linear":
        parts, ends = [optax.constant_schedule(learning_rate)], [warmup_steps + hold_steps]
        if warmup_steps:
            parts.insert(0, optax.linear_schedule(0.0, learning_rate, warmup_steps))
            ends.insert(0, warmup_steps)
        left = max(steps - ends[-1], 1)
        if decay == "linear":
            last = optax.linear_schedule(learning_rate, end_learning_rate, left)
        else:
            last = optax.cosine_decay_schedule(
                learning_rate, left, alpha=end_learning_rate / learning_rate
            )
        return optax.join_schedules([*parts, last], ends)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps, warmup_steps + 1),
        end_value=end_learning_rate,
    )


def schedule_of(
    steps: int, *, phases: Sequence[int] = (), restart: bool = False, **shape
) -> optax.Schedule:
    """Make a schedule over ``steps``; with ``restart``, a new one in each of the ``phases``."""
    if not (restart and phases):
        return make_schedule(steps=steps, **shape)
    parts = [make_schedule(steps=length, **shape) for length in phases]
    return optax.join_schedules(parts, list(accumulate(phases))[:-1])


def learning_rate_at(step: int, steps: int, section: Mapping, phases: Sequence[int] = ()) -> float:
    """Return the learning rate of update number ``step``, counted from 0.

    Args:
      steps: of all the training.
      section: of a config, as `config.training.optim` makes it.
      phases: as of `make_optimizer`.
    """
    of_adam = ("b1", "b2", "weight_decay", "clip_norm", "scales")
    shape = {name: section[name] for name in section if name not in of_adam}
    return float(schedule_of(steps, phases=phases, **shape)(step))


def decayed(params) -> dict:
    """Mark the leaves that weight decay applies to: those of two and more dimensions."""
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
    decay: str = "cosine",
    hold_steps: int = 0,
    scales: Sequence[tuple[str, float]] = (),
    restart: bool = False,
    phases: Sequence[int] = (),
) -> optax.GradientTransformation:
    """Make AdamW with the schedule of `make_schedule`, gradients clipped if ``clip_norm`` > 0.

    Args:
      scales: (regex, factor of the learning rate) for paths such as
        ``encoder/blocks/0/attn/qkv/kernel``; the first regex that matches a path counts.
      restart: restart the schedule in each of the ``phases``, given by their steps.
    """
    schedule = schedule_of(
        steps,
        phases=phases,
        restart=restart,
        learning_rate=learning_rate,
        end_learning_rate=end_learning_rate,
        warmup_steps=warmup_steps,
        decay=decay,
        hold_steps=hold_steps,
    )
    optimizer = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    if scales:
        optimizer = optax.chain(optimizer, scale_by_path(scales))
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def scale_by_path(scales: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiply updates by the factor of the first regex that matches their path, else by 1."""
    patterns = [(re.compile(pattern), factor) for pattern, factor in scales]

    def scaled(path, update):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return update * next((f for pattern, f in patterns if pattern.search(name)), 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))
