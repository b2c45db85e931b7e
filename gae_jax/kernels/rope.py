"""q, k and v of the heads from tokens: matmul, bias and rotation, for attention by cuDNN or XLA.

Forward, v is a matmul of its own, whose output has the layout that the attention needs; XLA rotates
q and k in one pass. Backward, XLA would make several passes (inverse rotation, concatenation, the
bias's gradient): a kernel (Pallas, compiled by Triton) reads and writes every array once.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gae_jax.kernels.norm import Tile, call, powers_of_2
from gae_jax.runtime.mesh import by_rows

# Rows are images here: a program processes the same token of several images, with the same angles.
BACKWARD = Tile(32, warps=8)  # as measured on an H100, see docs/performance/log.md
UNIT = 4  # channels that a thread reads and writes at once; half a head must be a multiple


@dataclasses.dataclass(frozen=True)
class RotatedHeads:
    """Static settings: number of heads, channels of each, a name in `norm.KERNELS`."""

    count: int
    width: int
    kernels: str


def rotation_obstacle(width: int, qk_norm: str | None, rope, bias) -> str | None:
    """Return why `rotated_heads` cannot process these heads, or None if it can.

    Args:
      width: channels of a head.
      qk_norm: as `attention.Attention`.
      rope, bias: of q and k, or None.
    """
    if qk_norm is not None:
        return f"q and k have a norm of the kind {qk_norm!r} before they are rotated"
    if rope is None:
        return "q and k are not rotated"
    if bias is None:
        return "q, k and v have no bias"
    if width % (2 * UNIT):
        return f"heads have {width} channels, not a multiple of {2 * UNIT}"
    return None


def rotated_heads(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, rope, static: RotatedHeads
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute (q, k, v), each [B, N, heads, width]: x W + bias with q and k rotated.

    Args:
      x: tokens [B, N, C].
      kernel: W [C, 3 heads width], cast to the dtype of x.
      bias: [3 heads width].
      rope: a `layers.rope_table`.
    """
    tables = tuple(jnp.asarray(part, jnp.float32) for part in rope)
    return _rotated_heads(x, kernel, bias, tables, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rotated_heads(x, kernel, bias, tables, static: RotatedHeads):
    return _forward(x, kernel, bias, tables, static)[0]


def _product(x, kernel):
    return x @ kernel.astype(x.dtype)


def _forward(x, kernel, bias, tables, static: RotatedHeads):
    count, width = static.count, static.width
    both, shape = 2 * count * width, (*x.shape[:2], -1, width)
    qk, v = (
        _product(x, kernel[:, part]) + bias[part].astype(x.dtype)
        for part in (slice(both), slice(both, None))
    )
    cos, sin = (part[None, :, None] for part in tables)

    def turned(part):
        first, second = jnp.split(part.astype(jnp.float32), 2, axis=-1)
        halves = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(halves, axis=-1).astype(x.dtype)

    # q and k apart: together they took XLA twice as long
    q, k = (turned(part) for part in jnp.split(qk.reshape(shape), 2, axis=2))
    return (q, k, v.reshape(shape)), (x, kernel, bias, tables)


def _backward(static: RotatedHeads, saved, on):
    x, kernel, bias, tables = saved

    def run(on_q, on_k, on_v, cos, sin):
        batch, tokens = on_q.shape[:2]
        channels = static.count * static.width
        images = math.gcd(batch, BACKWARD.rows)
        grid = (tokens, batch // images)
        shapes = [
            jax.ShapeDtypeStruct((batch, tokens, 3 * channels), on_q.dtype),
            jax.ShapeDtypeStruct((batch // images, tokens, 3 * channels), jnp.float32),
        ]
        body = functools.partial(
            _backward_kernel, channels=channels, half=static.width // 2, images=images
        )
        flat = (part.reshape(batch, tokens, channels) for part in (on_q, on_k, on_v))
        return call(body, shapes, grid, static.kernels, BACKWARD.warps, "rotation_backward")(
            *flat, cos, sin
        )

    on_qkv, sums = by_rows(run, [True, True, True, False, False])(*on, *tables)
    # gradients of one matmul: larger matrices, which fill the GPU better
    on_x, on_kernel = jax.vjp(_product, x, kernel)[1](on_qkv)
    on_bias = jnp.sum(sums, axis=(0, 1)).astype(bias.dtype)
    return on_x, on_kernel, on_bias, jax.tree.map(jnp.zeros_like, tables)


_rotated_heads.defvjp(_forward, _backward)


class _Part(NamedTuple):
    """Channels of a token in units [units, UNIT], with the factors of the inverse rotation."""

    channels: jax.Array
    partners: jax.Array  # channels that they are rotated with
    cos: jax.Array
    sin: jax.Array  # with the sign for these channels


def _part(cos_ref, sin_ref, token, first: int, size: int, half: int) -> _Part:
    units, within = first + jnp.arange(size), jnp.arange(UNIT)[None]
    # lax.div and lax.rem, since nothing is negative: the compiler sees that units stay contiguous
    per_half = jnp.full_like(units, half // UNIT)
    second = jax.lax.rem(jax.lax.div(units, per_half), jnp.full_like(units, 2))
    other = units + (1 - 2 * second) * per_half
    angle = (jax.lax.rem(units, per_half) * UNIT)[:, None] + within
    cos, sin = (plgpu.load(ref.at[token, angle]) for ref in (cos_ref, sin_ref))
    sign = (1 - 2 * second).astype(jnp.float32)[:, None]
    return _Part(
        (units * UNIT)[:, None] + within, (other * UNIT)[:, None] + within, cos, sign * sin
    )


def _backward_kernel(
    q_ref, k_ref, v_ref, cos_ref, sin_ref, qkv_ref, sum_ref, *, channels, half, images
):
    """Process, in one program, one token of some images."""
    token, block = pl.program_id(0), pl.program_id(1)
    parts = [
        _part(cos_ref, sin_ref, token, first, size, half)
        for first, size in powers_of_2(channels // UNIT)
    ]

    def step(index, totals):
        b = block * images + index

        def load(ref, at):
            return plgpu.load(ref.at[b, token, at]).astype(jnp.float32)

        # all loads come first: the compiler does not move loads before stores
        turned = [
            (part, load(ref, part.channels), load(ref, part.partners))
            for ref in (q_ref, k_ref)
            for part in parts
        ]
        copied = [load(v_ref, part.channels) for part in parts]
        grads = [channel * part.cos + other * part.sin for part, channel, other in turned] + copied
        for number, on in enumerate(grads):
            at = parts[number % len(parts)].channels + number // len(parts) * channels
            plgpu.store(qkv_ref.at[b, token, at], on.astype(qkv_ref.dtype))
        return jax.tree.map(jnp.add, totals, grads)

    zeros = [jnp.zeros(part.channels.shape, jnp.float32) for part in parts] * 3
    totals = jax.lax.fori_loop(0, images, step, zeros)
    for number, total in enumerate(totals):
        at = parts[number % len(parts)].channels + number // len(parts) * channels
        plgpu.store(sum_ref.at[block, token, at], total)
