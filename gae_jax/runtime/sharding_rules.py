"""Sharding rules that networks add to those of `runtime.sharding`, declared without JAX."""

Rule = tuple[str, tuple[str | None, ...]]
_added: dict[Rule, None] = {}


def add_rules(rules: tuple[Rule, ...]) -> None:
    """Add rules (regex of a parameter's path, mesh axis or None per dimension).

    They are tried before `sharding.RULES`, in the order in which they were added.
    """
    _added.update(dict.fromkeys(rules))


def added_rules() -> tuple[Rule, ...]:
    """Return the rules added so far."""
    return tuple(_added)
