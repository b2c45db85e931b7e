"""The parser of commands without a config; `ml_collections.config_flags` parses the others."""

import argparse

from gae_jax.config.tools import at_home
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.ranges import Range


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print and exit.

    Args:
      help_command: what the error tells the user to run.
    """

    def __init__(self, help_command: str):
        super().__init__(add_help=False, allow_abbrev=False)
        self._help_command = help_command
        self._numbers: dict[str, tuple[str, Range]] = {}

    def add_number(self, flag: str, allowed: Range, **how) -> None:
        """Add a flag whose number must be in a range; ``how``: as of `add_argument`."""
        action = self.add_argument(flag, type=int if allowed.whole else float, **how)
        self._numbers[action.dest] = flag, allowed

    def parse_known_args(self, args=None, namespace=None):
        options, rest = super().parse_known_args(args, namespace)
        for name, value in vars(options).items():
            setattr(options, name, at_home(value))
        for dest, (flag, allowed) in self._numbers.items():
            value = getattr(options, dest)
            if value is not None and (problem := allowed.problem(value)):
                self.error(f"{flag} is {value}; it must be {problem}")
        return options, rest

    def error(self, message):
        raise UserError(f"{message}\nsee: {self._help_command}")
