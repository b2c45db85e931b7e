"""Optimizers from config sections."""

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
) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay over ``steps``, optionally clipped."""
    schedule = make_schedule(
        steps=steps,
        learning_rate=learning_rate,
        end_learning_rate=end_learning_rate,
        warmup_steps=warmup_steps,
    )
    adamw = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
