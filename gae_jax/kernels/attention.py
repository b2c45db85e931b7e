"""Self-attention of a few hundred tokens with norm and rotation of q and k fused, and its gradient.

XLA computes norm, rotation and the bias's gradient in separate passes over memory. The kernels
(Pallas, compiled by Triton) save only input, output and the logarithms of the softmax's sums. q and
k are processed as the two halves that `layers.apply_rope` rotates against each other.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gae_jax.runtime.mesh import by_rows

LOG2E = math.log2(math.e)
SIZES = 128  # the number of tokens is a multiple
# Channels of a head. Others would have to be padded to powers of 2 (72, of LightningDiT-XL, was
# slower than cuDNN's kernels and XLA's rotation together: 0.51 against 0.35 ms).
WIDTHS = (32, 64)


class Tile(NamedTuple):
    """Numbers of tokens that a program processes, and its settings.

    A program of queries loops over keys, one of keys loops over queries.
    """

    tokens: int  # of the program
    other: int  # tokens of one step of its loop
    warps: int
    stages: int


# As measured on an H100, see docs/performance/log.md.
FORWARD = Tile(128, 64, warps=4, stages=3)
BACKWARD = Tile(64, 32, warps=4, stages=1)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Static settings: number of heads, channels of each, norm of q and k ("fixed" or None)."""

    count: int
    width: int
    qk_norm: str | None = None
    eps: float = 1e-6


def attention_obstacle(dtype, tokens: int, heads: Heads) -> str | None:
    """Return why the kernels cannot run, or None if they can."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype)}, not bfloat16"
    if tokens % SIZES:
        return f"there are {tokens} tokens, not a multiple of {SIZES}"
    if heads.width not in WIDTHS:
        return f"heads have {heads.width} channels, none of {WIDTHS}"
    if heads.qk_norm not in (None, "fixed"):
        return f"q and k have a norm of the kind {heads.qk_norm!r}"
    return None


def attend(
    qkv: jax.Array, bias: jax.Array | None, rope, heads: Heads, *, interpret: bool = False
) -> jax.Array:
    """Compute softmax(q k^T / sqrt(width)) v: [B, N, 3 heads width] -> [B, N, heads width].

    Args:
      qkv: q, k and v, each with channels [heads, width].
      bias: [3 heads width], added to qkv, or None.
      rope: a `layers.rope_table` or None.
      interpret: without a GPU, for tests.
    """
    return _attend(qkv, bias, _tables(rope), heads, interpret)


def attend_fp8(
    qkv: jax.Array, factors: tuple[jax.Array, jax.Array], rope, heads: Heads, *, interpret=False
) -> jax.Array:
    """Compute `attend` of an fp8 matmul that is not yet scaled; has no gradient.

    Args:
      factors: its scales of tokens [B, N, 1] and of channels [3 heads width].
    """
    return _run_forward(qkv, factors, _tables(rope), heads, interpret)[0]


def _tables(rope) -> tuple[jax.Array, ...]:
    return () if rope is None else tuple(jnp.asarray(part, jnp.float32) for part in rope)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(qkv, bias, tables, heads: Heads, interpret: bool):
    return _forward(qkv, bias, tables, heads, interpret)[0]


def _forward(qkv, bias, tables, heads: Heads, interpret: bool):
    if bias is not None:
        qkv = qkv + bias.astype(qkv.dtype)
    out, logs = _run_forward(qkv, (), tables, heads, interpret)
    return out, (qkv, bias, tables, out, logs)


def _run_forward(qkv, factors, tables, heads: Heads, interpret: bool):
    """Return (output, base-2 logarithms of the softmax's sums [B, heads, N])."""

    def run(qkv, *extra):
        batch, tokens, channels = qkv.shape
        body = functools.partial(_forward_kernel, heads=heads, tokens=tokens, scaled=bool(factors))
        return pl.pallas_call(
            body,
            grid=(tokens // FORWARD.tokens, heads.count, batch),
            out_shape=[
                jax.ShapeDtypeStruct((batch, tokens, channels // 3), qkv.dtype),
                jax.ShapeDtypeStruct((batch, heads.count, tokens), jnp.float32),
            ],
            compiler_params=plgpu.CompilerParams(
                num_warps=FORWARD.warps, num_stages=FORWARD.stages
            ),
            interpret=interpret,
            name="attention",
        )(qkv, *extra)

    extra = *factors, *tables
    return by_rows(run, [True, *(array.ndim == 3 for array in extra)])(qkv, *extra)


def _backward(heads: Heads, interpret: bool, saved, on_out):
    qkv, bias, tables, out, logs = saved

    def run(qkv, out, logs, on_out, *tables):
        batch, tokens, channels = qkv.shape
        steps = tokens // BACKWARD.tokens
        return pl.pallas_call(
            functools.partial(_backward_kernel, heads=heads, tokens=tokens),
            grid=(2 * steps, heads.count, batch),
            out_shape=[
                jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
                jax.ShapeDtypeStruct((batch, steps, channels), jnp.float32),
            ],
            compiler_params=plgpu.CompilerParams(
                num_warps=BACKWARD.warps, num_stages=BACKWARD.stages
            ),
            interpret=interpret,
            name="attention_backward",
        )(qkv, out, logs, on_out, *tables)

    split = [True] * 4 + [False] * len(tables)
    on_qkv, sums = by_rows(run, split)(qkv, out, logs, on_out, *tables)
    on_bias = None if bias is None else jnp.sum(sums, axis=(0, 1)).astype(bias.dtype)
    return on_qkv, on_bias, tuple(jnp.zeros_like(table) for table in tables)


_attend.defvjp(_forward, _backward)


def _dot(a: jax.Array, b: jax.Array, across: tuple[int, int] = (1, 0)) -> jax.Array:
    """Multiply in fp32, summing over one axis of each."""
    return jax.lax.dot_general(
        a,
        b,
        (((across[0],), (across[1],)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _at(ref, b, rows, first, size: int):
    """Index [rows, size] from channel ``first`` on, of ref [B, N, C], or [N, C] if b is None."""
    index = (rows[:, None], (first + jnp.arange(size))[None])
    return ref.at[index if b is None else (b, *index)]


def _load(ref, b, rows, first, size: int) -> jax.Array:
    return plgpu.load(_at(ref, b, rows, first, size))


class _Head:
    """One head of one image: reads q, k and v, and backpropagates through norm and rotation."""

    def __init__(self, qkv_ref, tables, heads: Heads, factors=()):
        self.ref, self.tables, self.heads, self.factors = qkv_ref, tables, heads, factors
        self.head, self.b = pl.program_id(1), pl.program_id(2)
        self.half = heads.width // 2

    def base(self, which: int):
        """Return the first channel of q, k or v (0, 1, 2)."""
        return (which * self.heads.count + self.head) * self.heads.width

    def read(self, rows, first, size: int) -> jax.Array:
        """Load [rows, size] of q, k or v, scaled if there are factors."""
        part = _load(self.ref, self.b, rows, first, size)
        if not self.factors:
            return part
        of_tokens = plgpu.load(self.factors[0].at[self.b, rows, 0])
        of_channels = plgpu.load(self.factors[1].at[first + jnp.arange(size)])
        return part.astype(jnp.float32) * (of_tokens[:, None] * of_channels[None])

    def raw(self, which: int, rows) -> list[jax.Array]:
        """Load both halves of q or k, [rows, half] in fp32, before norm and rotation."""
        base = self.base(which)
        return [self.read(rows, base + at, self.half).astype(jnp.float32) for at in (0, self.half)]

    def scale(self, halves) -> jax.Array:
        """Compute 1 / rms of each row, [rows, 1]."""
        square = jnp.sum(halves[0] * halves[0] + halves[1] * halves[1], axis=1)
        return jax.lax.rsqrt(square / self.heads.width + self.heads.eps)[:, None]

    def table(self, rows) -> list[jax.Array]:
        return [_load(part, None, rows, 0, self.half) for part in self.tables]

    def turned(self, which: int, rows) -> list[jax.Array]:
        """Load both halves of q or k, normed, rotated and rounded."""
        first, second = self.raw(which, rows)
        if self.heads.qk_norm == "fixed":
            scale = self.scale((first, second))
            first, second = first * scale, second * scale
        if self.tables:
            cos, sin = self.table(rows)
            first, second = first * cos - second * sin, second * cos + first * sin
        return [part.astype(self.ref.dtype) for part in (first, second)]

    def turned_back(self, which: int, rows, on: list[jax.Array]) -> list[jax.Array]:
        """Backpropagate gradients with respect to `turned` to gradients with respect to `raw`."""
        if self.tables:
            cos, sin = self.table(rows)
            on = [on[0] * cos + on[1] * sin, on[1] * cos - on[0] * sin]
        if self.heads.qk_norm == "fixed":
            raw = self.raw(which, rows)
            scale = self.scale(raw)
            n = [part * scale for part in raw]
            mean = jnp.sum(on[0] * n[0] + on[1] * n[1], axis=1)[:, None] / self.heads.width
            on = [(g - part * mean) * scale for g, part in zip(on, n, strict=True)]
        return on

    def values(self, rows) -> jax.Array:
        """Load v [rows, width]."""
        return self.read(rows, self.base(2), self.heads.width).astype(self.ref.dtype)


def _logits(q: list[jax.Array], k: list[jax.Array], width: int) -> jax.Array:
    """Compute q k^T / sqrt(width) times log2(e), for softmax by exp2."""
    s = _dot(q[0], k[0], (1, 1)) + _dot(q[1], k[1], (1, 1))
    return s * (LOG2E / math.sqrt(width))


def _forward_kernel(qkv_ref, *refs, heads: Heads, tokens: int, scaled: bool):
    *inputs, out_ref, logs_ref = refs
    factors, tables = (inputs[:2], inputs[2:]) if scaled else ((), inputs)
    this = _Head(qkv_ref, tables, heads, factors)
    rows = FORWARD.tokens
    queries = pl.program_id(0) * rows + jnp.arange(rows)
    q = this.turned(0, queries)

    def step(index, carry):
        largest, total, output = carry
        keys = index * FORWARD.other + jnp.arange(FORWARD.other)
        s = _logits(q, this.turned(1, keys), heads.width)
        new = jnp.maximum(largest, jnp.max(s, axis=1))
        p = jnp.exp2(s - new[:, None])
        shrink = jnp.exp2(largest - new)
        total = total * shrink + jnp.sum(p, axis=1)
        output = output * shrink[:, None] + _dot(p.astype(qkv_ref.dtype), this.values(keys))
        return new, total, output

    none = jnp.zeros((rows, heads.width), jnp.float32)
    start = jnp.full((rows,), -1e30, jnp.float32), jnp.zeros((rows,), jnp.float32), none
    largest, total, output = jax.lax.fori_loop(0, tokens // FORWARD.other, step, start)
    at = _at(out_ref, this.b, queries, this.head * heads.width, heads.width)
    plgpu.store(at, (output / total[:, None]).astype(out_ref.dtype))
    logs_ref[this.b, this.head, pl.ds(pl.program_id(0) * rows, rows)] = largest + jnp.log2(total)


def _backward_kernel(qkv_ref, out_ref, logs_ref, on_out_ref, *refs, heads: Heads, tokens: int):
    """Compute, in one program, gradients of some queries, or of some keys and values."""
    *tables, on_qkv_ref, sum_ref = refs
    this = _Head(qkv_ref, tables, heads)
    steps, rows = tokens // BACKWARD.tokens, BACKWARD.tokens
    dtype = qkv_ref.dtype
    part = pl.program_id(0) % steps
    mine = part * rows + jnp.arange(rows)
    root = 1 / math.sqrt(heads.width)

    def of_queries(queries, start):
        """Load (gradient of the output, its dot product with the output, logarithms)."""
        on_out, out = (
            _load(ref, this.b, queries, this.head * heads.width, heads.width)
            for ref in (on_out_ref, out_ref)
        )
        product = jnp.sum(on_out.astype(jnp.float32) * out.astype(jnp.float32), axis=1)
        logs = logs_ref[this.b, this.head, pl.ds(start, len(queries))]
        return on_out, product, logs

    def halves():
        return [jnp.zeros((rows, this.half), jnp.float32) for _ in range(2)]

    def write(first, on):
        """Store gradients of the channels from ``first`` on, and their sums over the rows."""
        plgpu.store(_at(on_qkv_ref, this.b, mine, first, on.shape[1]), on.astype(dtype))
        plgpu.store(sum_ref.at[this.b, part, first + jnp.arange(on.shape[1])], jnp.sum(on, axis=0))

    def write_halves(which: int, on):
        for index, half in enumerate(this.turned_back(which, mine, on)):
            write(this.base(which) + index * this.half, half)

    @pl.when(pl.program_id(0) < steps)
    def _():
        q = this.turned(0, mine)
        on_out, product, logs = of_queries(mine, part * rows)

        def step(index, on_q):
            keys = index * BACKWARD.other + jnp.arange(BACKWARD.other)
            k, v = this.turned(1, keys), this.values(keys)
            p = jnp.exp2(_logits(q, k, heads.width) - logs[:, None])
            on_s = p * (_dot(on_out, v, (1, 1)) - product[:, None]) * root
            on_s = on_s.astype(dtype)
            return [on + _dot(on_s, other) for on, other in zip(on_q, k, strict=True)]

        write_halves(0, jax.lax.fori_loop(0, tokens // BACKWARD.other, step, halves()))

    @pl.when(pl.program_id(0) >= steps)
    def _():
        k, v = this.turned(1, mine), this.values(mine)

        def step(index, carry):
            on_k, on_v = carry
            start = index * BACKWARD.other
            queries = start + jnp.arange(BACKWARD.other)
            q = this.turned(0, queries)
            on_out, product, logs = of_queries(queries, start)
            p = jnp.exp2(_logits(k, q, heads.width) - logs[None])
            on_v = on_v + _dot(p.astype(dtype), on_out)
            on_s = p * (_dot(v, on_out, (1, 1)) - product[None]) * root
            on_s = on_s.astype(dtype)
            on_k = [on + _dot(on_s, other) for on, other in zip(on_k, q, strict=True)]
            return on_k, on_v

        none = jnp.zeros((rows, heads.width), jnp.float32)
        on_k, on_v = jax.lax.fori_loop(0, tokens // BACKWARD.other, step, (halves(), none))
        write_halves(1, on_k)
        write(this.base(2), on_v)
