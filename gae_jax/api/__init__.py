"""The Python API: finished runs as objects that encode, decode and sample (docs/api.md).

``gae_jax.load`` and ``gae_jax.metrics`` lead here. Nothing here knows the command line.
"""
