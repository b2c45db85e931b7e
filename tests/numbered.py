"""A source for tests of worker processes, which import this module and little else."""

import io
import os
import signal
import sys

from PIL import Image

from gae_jax.data.sources.base import Encoded
from gae_jax.runtime.errors import ConfigError


class Numbers(Encoded):
    """Twelve grey images. Image 5 does to its process what the test asks for.

    The labels say whether the process has imported JAX or grain.
    """

    class_names = ("a",)

    def __init__(self, does: str = ""):
        super().__init__("numbers", 12, "error")
        self._does = does

    def _encoded(self, index):
        if index == 5 and self._does == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 5 and self._does == "raise":
            raise ConfigError("of a worker")
        file = io.BytesIO()
        Image.new("L", (20, 20), index).save(file, "png")
        file.seek(0)
        return file, int("jax" in sys.modules or "grain" in sys.modules)

    def _name(self, index):
        return f"number {index}"
