"""Quantisation to fp8 with a scale per row, by XLA or at the end of a kernel.

float8_e4m3fn has four bits of exponent and three of mantissa; its largest number is 448. The scale
of a row maps the largest of its absolute values to that.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

FP8 = jnp.float8_e4m3fn
LARGEST = 448.0
LEAST = float(jnp.finfo(jnp.float32).tiny) * LARGEST  # maximum that rows of zeros are given


class Scaled(NamedTuple):
    """``values`` [..., C] in fp8 times ``scale`` [..., 1] in fp32."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def quantize(x: jax.Array) -> Scaled:
    """Quantise numbers [..., C] with a scale for each row."""
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    most = jnp.maximum(most, LEAST)
    return Scaled((x.astype(jnp.float32) * (LARGEST / most)).astype(FP8), most / LARGEST)


def unscaled(x: jax.Array | Scaled) -> jax.Array:
    """Return an array; raise TypeError for fp8 numbers, which only `QuantizedLinear` takes."""
    if isinstance(x, Scaled):
        raise TypeError("fp8 numbers entered a layer that is no QuantizedLinear")
    return x


def scaled_like(shape: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """Return the outputs of a kernel that stores rows with `store_scaled`: values and scale."""
    scale = jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32)
    return [jax.ShapeDtypeStruct(shape, FP8), scale]


def store_scaled(refs, parts: list[jax.Array], chunks: list[tuple[int, int]], b, row) -> None:
    """Store a row of an image in a kernel, quantised as by `quantize`.

    Args:
      refs: outputs of the kernel, as `scaled_like`.
      parts: the row in fp32, in chunks of channels.
      chunks: (first channel, size) of each part.
      b, row: image and token.
    """
    most = jnp.max(jnp.abs(parts[0]))
    for part in parts[1:]:
        most = jnp.maximum(most, jnp.max(jnp.abs(part)))
    most = jnp.maximum(most, LEAST)
    for part, chunk in zip(parts, chunks, strict=True):
        refs[0][b, row, pl.ds(*chunk)] = (part * (LARGEST / most)).astype(FP8)
    refs[1][b, row, 0] = most / LARGEST
