"""Checks that several sections have in common."""

from collections.abc import Mapping
from typing import Any

from gae_jax.config import flatten
from gae_jax.models.attention import ATTENTIONS
from gae_jax.models.kernels import KERNELS
from gae_jax.models.layers import REMAT

# Sizes by which checks and networks divide.
DIVISORS = ("patch_size", "window_size", "heads", "num_heads", "num_attention_heads")


def one_of(config, known: dict[str, tuple[str, ...]], where: str) -> list[str]:
    """What is wrong with fields that are names. ``known``: dotted path -> the names there are."""
    values = {path: flatten(config)[path] for path in known}
    return [
        f"{where}.{path} is {value!r}; use one of {', '.join(known[path])}"
        for path, value in values.items()
        if value not in known[path]
    ]


def no_divisors(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with sizes by which the other checks divide.

    Args:
      values: of the whole config, by dotted path.
    """
    return [
        f"{path} is {value}; it must be at least 1"
        for path, value in values.items()
        if path.split(".")[-1] in DIVISORS and isinstance(value, int) and value < 1
    ]


def time_shift_clashes(section, where: str) -> list[str]:
    """What is wrong with the shift of a section's times."""
    if section.time_shift > 0:
        return []
    return [f"{where}.time_shift is {section.time_shift}; it must be > 0 (1.0 = none)"]


def start_clashes(section, where: str) -> list[str]:
    """What is wrong with the weights that a section starts from."""
    if section.init_optimizer and not section.init_from:
        field = f"{where}.init_optimizer"
        return [f"{field} is True, but {where}.init_from is empty; set it, or {field}=False"]
    return []


def training_clashes(section, where: str) -> list[str]:
    """What is wrong with how long a section is trained, and by which optimizer."""
    known = {"train.best_mode": ("min", "max"), "optim.decay": ("cosine", "linear")}
    return one_of(section, known, where)


def compute_clashes(section, where: str) -> list[str]:
    """What is wrong with a trained section's batch and how it is computed."""
    problems = one_of(
        section,
        {
            "compute.dtype": ("float32", "bfloat16"),
            "compute.remat": REMAT,
            "compute.attention": ATTENTIONS,
            "compute.kernels": KERNELS,
        },
        where,
    )
    for path in ("train.batch_size", "compute.accumulate"):
        if (value := flatten(section)[path]) < 1:
            problems.append(f"{where}.{path} is {value}; it must be at least 1")
    if section.train.batch_size % max(section.compute.accumulate, 1):
        problems.append(
            f"{where}.train.batch_size {section.train.batch_size} does not divide into "
            f"{where}.compute.accumulate {section.compute.accumulate} parts"
        )
    return problems
