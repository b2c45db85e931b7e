"""Checks that several sections have in common."""

import re


def start_clashes(section, where: str) -> list[str]:
    """List the problems of the weights that a section starts from."""
    if section.init_optimizer and not section.init_from:
        field = f"{where}.init_optimizer"
        return [f"{field} is True, but {where}.init_from is empty; set it, or {field}=False"]
    return []


def training_clashes(section, where: str) -> list[str]:
    """List the problems of the optimizers of a section that trains."""
    problems = []
    for name in ("optim", "discriminator_optim"):
        problems += scale_clashes(section.get(name, {}).get("scales", ()), f"{where}.{name}")
    return problems


def scale_clashes(scales, where: str) -> list[str]:
    """List the problems of the factors of an optimizer's learning rate."""
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


def accumulation_clashes(section, where: str) -> list[str]:
    """List the problems of the parts that a section's batch is computed in."""
    if section.train.batch_size % section.train.accumulate:
        parts = f"{where}.train.accumulate {section.train.accumulate} parts"
        size = section.train.batch_size
        return [f"{where}.train.batch_size {size} does not divide into {parts}"]
    return []
