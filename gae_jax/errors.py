"""Errors that a user can mend.

The command line prints a `UserError` as one message without a traceback, so each names the
thing, its value and the remedy.
"""


class UserError(Exception):
    """Bad input, or a state of the disk, that the message explains and says how to mend."""


class ConfigError(UserError):
    """A config that does not fit the code that reads it."""


class DataError(UserError):
    """Images or latents that are missing, unreadable or do not belong together."""


class NonFiniteError(UserError):
    """Training produced a NaN or an infinity and was stopped."""


class CheckpointError(UserError):
    """A checkpoint that is missing or could not be written."""


class Preempted(BaseException):
    """The machine asked the process to stop, and what it did is saved.

    No error, and so not caught by who goes on after one, such as a sweep.
    """
