"""Metrics of arrays in memory."""

from gae_jax.evaluation.frechet import frechet_distance as frechet

__all__ = ["frechet"]
