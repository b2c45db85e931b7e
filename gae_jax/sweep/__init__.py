"""Sweeps: runs that differ in a few fields, and one table of them (``launch/sweep.py``).

A file in ``configs/sweeps/`` has a function ``get_sweep`` that returns a `Sweep`. Every point of
it is run with every seed in a run directory of its own, ``WORKDIR/NAME-seedS``, by the same
commands as any other run.
"""

from gae_jax.sweep.command_line import main
from gae_jax.sweep.definition import Metric, Point, Sweep

__all__ = ["Metric", "Point", "Sweep", "main"]
