"""SwiGLU with a backward kernel that reads and writes every array once, bias gradient included."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gae_jax.kernels.fp8 import scaled_like, store_scaled
from gae_jax.kernels.norm import Tile, call, powers_of_2, wide
from gae_jax.runtime.mesh import by_rows

SWIGLU = Tile(64, at_once=4, columns=128)  # as measured on an H100, see docs/performance/log.md
ROUNDED = Tile(16, warps=8)  # not measured


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu(x: jax.Array, bias: jax.Array, kernels: str = "triton") -> jax.Array:
    """Compute silu(a) * b with (a, b) = split(x + bias): [B, N, 2 H], [2 H] -> [B, N, H].

    Only the backward pass is a kernel; it also sums the gradient of the bias.
    """
    del kernels  # XLA's forward pass already reads and writes every array once
    a, b = jnp.split(x.astype(jnp.float32) + bias.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(a) * b).astype(x.dtype)


def _swiglu_saved(x, bias, kernels):
    return swiglu(x, bias, kernels), (x, bias)


def _swiglu_backward(kernels, saved, dy):
    def run(x, dy, bias):
        batch, tokens, width = x.shape
        half = width // 2
        columns = SWIGLU.columns
        grid = (batch, tokens // SWIGLU.rows, half // columns)
        shapes = [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, tokens // SWIGLU.rows, width), jnp.float32),
        ]
        body = functools.partial(_swiglu_backward_kernel, half=half, columns=columns)
        return call(body, shapes, grid, kernels, SWIGLU.warps, "swiglu_backward")(x, dy, bias)

    x, bias = saved
    dx, sums = by_rows(run, [True, True, False])(x, dy, bias)
    return dx, jnp.sum(sums, axis=(0, 1)).astype(bias.dtype)


def _swiglu_backward_kernel(x_ref, dy_ref, bias_ref, dx_ref, sum_ref, *, half, columns):
    b, part = pl.program_id(0), pl.program_id(1)
    first = pl.program_id(2) * columns
    left, right = pl.ds(first, columns), pl.ds(half + first, columns)
    biases = wide(bias_ref, left)[None], wide(bias_ref, right)[None]

    def step(index, totals):
        rows = pl.ds(part * SWIGLU.rows + index * SWIGLU.at_once, SWIGLU.at_once)
        a = wide(x_ref, b, rows, left) + biases[0]
        c = wide(x_ref, b, rows, right) + biases[1]
        dy = wide(dy_ref, b, rows, left)
        sigmoid = 1 / (1 + jnp.exp(-a))
        silu = a * sigmoid
        da, dc = dy * c * (sigmoid + silu * (1 - sigmoid)), dy * silu
        dx_ref[b, rows, left] = da.astype(dx_ref.dtype)
        dx_ref[b, rows, right] = dc.astype(dx_ref.dtype)
        return totals[0] + da, totals[1] + dc

    zeros = (jnp.zeros((SWIGLU.at_once, columns), jnp.float32),) * 2
    totals = jax.lax.fori_loop(0, SWIGLU.rows // SWIGLU.at_once, step, zeros)
    for columns_of, total in zip((left, right), totals, strict=True):
        sum_ref[b, part, columns_of] = jnp.sum(total, axis=0)


swiglu.defvjp(_swiglu_saved, _swiglu_backward)


def swiglu_fp8(
    x: jax.Array, bias: jax.Array, rows: jax.Array, columns: jax.Array, kernels: str
) -> tuple[jax.Array, jax.Array]:
    """Compute silu(a) * b with (a, b) = split(x rows columns + bias), quantised to fp8.

    Args:
      x: output of an fp8 matmul that is not yet scaled, [B, N, 2 H].
      bias: [2 H].
      rows, columns: its scales, [B, N, 1] and [2 H].

    Returns:
      (values [B, N, H] in fp8, scale [B, N, 1]).
    """

    def run(x, rows, columns, bias):
        batch, tokens, width = x.shape
        shapes = scaled_like((batch, tokens, width // 2))
        body = functools.partial(_swiglu_fp8_kernel, half=width // 2)
        grid = (batch, tokens // ROUNDED.rows)
        return call(body, shapes, grid, kernels, ROUNDED.warps, "swiglu_fp8")(
            x, rows, columns, bias
        )

    return tuple(by_rows(run, [True, True, False, False])(x, rows, columns, bias))


def _swiglu_fp8_kernel(x_ref, rows_ref, columns_ref, bias_ref, *outputs, half: int):
    b, first, chunks = pl.program_id(0), pl.program_id(1) * ROUNDED.rows, powers_of_2(half)
    parts = [(pl.ds(start, size), pl.ds(half + start, size)) for start, size in chunks]
    # read once for all rows
    vectors = [[(wide(columns_ref, at), wide(bias_ref, at)) for at in pair] for pair in parts]

    def step(index, _):
        row = first + index
        of_token, outs = wide(rows_ref, b, row, 0), []
        for pair, known in zip(parts, vectors, strict=True):
            a, c = (
                wide(x_ref, b, row, at) * (column * of_token) + bias
                for at, (column, bias) in zip(pair, known, strict=True)
            )
            outs.append(a / (1 + jnp.exp(-a)) * c)
        store_scaled(outputs, outs, chunks, b, row)

    jax.lax.fori_loop(0, ROUNDED.rows, step, None)


def swiglu_obstacle(half: int) -> str | None:
    """Return why `swiglu` cannot process this hidden width, or None if it can."""
    return f"a hidden width of {half} is no multiple of 128" if half % SWIGLU.columns else None
