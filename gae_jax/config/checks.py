"""Checks that several sections have in common."""

import re

from gae_jax.config import flatten
from gae_jax.kernels.norm import KERNELS
from gae_jax.nn.attention import ATTENTIONS
from gae_jax.nn.layers import REMAT


def one_of(config, known: dict[str, tuple[str, ...]], where: str) -> list[str]:
    """What is wrong with fields that are names. ``known``: dotted path -> the names there are."""
    values = {path: flatten(config)[path] for path in known}
    return [
        f"{where}.{path} is {value!r}; use one of {', '.join(known[path])}"
        for path, value in values.items()
        if value not in known[path]
    ]


def start_clashes(section, where: str) -> list[str]:
    """What is wrong with the weights that a section starts from."""
    if section.init_optimizer and not section.init_from:
        field = f"{where}.init_optimizer"
        return [f"{field} is True, but {where}.init_from is empty; set it, or {field}=False"]
    return []


def training_clashes(section, where: str) -> list[str]:
    """What is wrong with how long a section is trained, and by which optimizer."""
    known = {"train.best_mode": ("min", "max"), "optim.decay": ("cosine", "linear")}
    problems = one_of(section, known, where)
    for name in ("optim", "discriminator_optim"):
        problems += scale_clashes(section.get(name, {}).get("scales", ()), f"{where}.{name}")
    return problems


def scale_clashes(scales, where: str) -> list[str]:
    """What is wrong with the factors of an optimizer's learning rate."""
    problems = []
    for pair in scales:
        if not is_tuple(pair, 2) or not isinstance(pair[0], str):
            problems.append(f"{where}.scales has {pair!r}; give pairs (regex of paths, factor)")
            continue
        try:
            re.compile(pair[0])
        except re.error as error:
            problems.append(f"{where}.scales has the regex {pair[0]!r}, which is none: {error}")
    return problems


def is_tuple(value, *lengths: int) -> bool:
    """Whether a value is a tuple or list of one of these lengths."""
    return isinstance(value, tuple | list) and len(value) in lengths


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
    if section.train.batch_size % section.compute.accumulate:
        problems.append(
            f"{where}.train.batch_size {section.train.batch_size} does not divide into "
            f"{where}.compute.accumulate {section.compute.accumulate} parts"
        )
    return problems
