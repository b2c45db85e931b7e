"""Random keys of stages."""

import zlib

import jax

# A stage that was renamed keeps its random numbers.
EARLIER = {"backbone": "teacher-backbone"}


def stage_key(name: str, seed: int) -> jax.Array:
    """Make the random key of a stage, so that stages with one seed do not share their noise."""
    name = EARLIER.get(name, name)
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
