"""Command lines of our own making; those with a config are `ml_collections.config_flags`'."""

import argparse

from gae_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print and exit.

    Args:
      help_command: what the error tells the user to run.
    """

    def __init__(self, help_command: str):
        super().__init__(add_help=False, allow_abbrev=False)
        self._help_command = help_command

    def error(self, message):
        raise UserError(f"{message}\nsee: {self._help_command}")
