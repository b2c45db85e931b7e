"""Self-attention of a few hundred tokens on a TPU, from the product qkv to the heads' output.

XLA writes the scores of all heads to memory in fp32, several times, and turns qkv around so that
tokens lie along the chip's lanes. Here (Pallas, compiled by Mosaic) a program has one image: qkv
lies in the core's memory, heads are cut out of its channels where they are, and scores never leave.
Scores are held transposed, [keys, queries]: sums over keys are then sums over sublanes, and all
products but one take their operands as they lie. Norm and rotation of q and k happen on the way.
Tokens need not fill the chip's tiles: what lies beyond the 257 of an image with a CLS token Mosaic
masks, in sums and in products.

Nobody has run it on a TPU: it is compiled for v5p and v6e (docs/performance_tpu.md), and the tests
hold it on the plain path, interpreted.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gae_jax.kernels.attention import Heads
from gae_jax.runtime.mesh import by_rows

LANES = 128  # the most channels of a head
MOST = 512  # tokens, whose scores of one head fit beside the rest
SPARE = 16 * 2**20  # bytes of a core's memory beside the blocks: scores and what is spilled


def mosaic_obstacle(dtype, tokens: int, heads: Heads, platform: str) -> str | None:
    """Why the kernels cannot run, or None if they can.

    Args:
      platform: of the devices; "": nobody knows yet, as where operations are counted.
    """
    if platform not in ("", "tpu"):
        return f"the device is a {platform}, not a tpu"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype)}, not bfloat16"
    if tokens > MOST:
        return f"there are {tokens} tokens, more than {MOST}"
    if heads.width % 8 or heads.width > LANES:
        return f"heads have {heads.width} channels, not a multiple of 8 up to {LANES}"
    if heads.qk_norm not in (None, "fixed"):
        return f"q and k have a norm of the kind {heads.qk_norm!r}"
    return None


def attend(qkv: jax.Array, rope, heads: Heads, *, interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v: [B, N, 3 heads width] -> [B, N, heads width].

    Args:
      qkv: q, k and v, each [heads, width] in its channels, with their bias.
      rope: a `layers.rope_table` or None.
      interpret: without a TPU, for tests.
    """
    return _attend(qkv, _tables(rope, qkv.dtype), heads, interpret)


def _tables(rope, dtype) -> tuple[jax.Array, ...]:
    """(cos, sin, swap) such that x cos + (x swap) sin rotates, each as wide as a head.

    ``swap`` exchanges the halves of a head's channels: a product, which the matrix units have time
    for, where a cut at half a head would go through the lanes' shuffles.
    """
    if rope is None:
        return ()
    cos, sin = (jnp.asarray(part, jnp.float32) for part in rope)
    swap = np.roll(np.eye(2 * cos.shape[1], dtype=np.float32), cos.shape[1], axis=1)
    return (
        jnp.concatenate([cos, cos], axis=1),
        jnp.concatenate([-sin, sin], axis=1),
        jnp.asarray(swap, dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(qkv, tables, heads: Heads, interpret: bool):
    out = heads.count * heads.width
    return _call(_forward_kernel, (qkv,), out, tables, heads, interpret, products=2)


def _saved(qkv, tables, heads: Heads, interpret: bool):
    return _attend(qkv, tables, heads, interpret), (qkv, tables)


def _backward(heads: Heads, interpret: bool, saved, on_out):
    qkv, tables = saved
    width = qkv.shape[-1]
    found = _call(_backward_kernel, (qkv, on_out), width, tables, heads, interpret, products=5)
    return found, jax.tree.map(jnp.zeros_like, tables)


_attend.defvjp(_saved, _backward)


def _call(
    kernel: Callable, arrays, width: int, tables, heads: Heads, interpret: bool, *, products: int
):
    """A kernel on arrays [B, N, channels] -> [B, N, width], image by image.

    Args:
      products: of [N, head] and [head, N], or of that size, for every head; the compiler's
        scheduler is told, which cannot look inside.
    """

    def rows(array):
        return pl.BlockSpec((1, *array.shape[1:]), lambda image: (image, 0, 0))

    def run(*given):
        batch, tokens, _ = given[0].shape
        like = jax.ShapeDtypeStruct((batch, tokens, width), given[0].dtype)
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (like, *given[: len(arrays)]))
        scores = batch * heads.count * tokens**2
        more = {}
        if not interpret:
            more["compiler_params"] = pltpu.CompilerParams(
                dimension_semantics=("parallel",),
                vmem_limit_bytes=2 * moved // batch + SPARE,  # of two images at a time
            )
        return pl.pallas_call(
            functools.partial(kernel, heads=heads),
            grid=(batch,),
            in_specs=[
                *map(rows, given[: len(arrays)]),
                *(pl.BlockSpec(x.shape, lambda image: (0, 0)) for x in given[len(arrays) :]),
            ],
            out_specs=rows(like),
            out_shape=like,
            cost_estimate=pl.CostEstimate(
                flops=2 * products * scores * heads.width,
                bytes_accessed=moved,
                transcendentals=scores,
            ),
            interpret=interpret,
            name="attention",
            **more,
        )(*given)

    return by_rows(run, [*(True for _ in arrays), *(False for _ in tables)])(*arrays, *tables)


def _product(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """Over one axis of each; in fp32."""
    axes = (((over_a,), (over_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _cut(ref, part: int, head: int, heads: Heads) -> jax.Array:
    """[N, width] of q (0), k (1), or v (2)."""
    return ref[0, :, pl.ds((part * heads.count + head) * heads.width, heads.width)]


def _scale_of(x: jax.Array, heads: Heads) -> jax.Array | None:
    """1 / rms of every token, of q or k before their norm; None if they have none."""
    if heads.qk_norm is None:
        return None
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + heads.eps)


def _prepared(x: jax.Array, tables, heads: Heads) -> jax.Array:
    """q or k, normed and rotated, rounded where the plain path does."""
    wide = x.astype(jnp.float32)
    scale = _scale_of(wide, heads)
    if scale is not None:
        x = (wide * scale).astype(x.dtype)
        wide = x.astype(jnp.float32)
    if not tables:
        return x
    cos, sin, swap = tables
    return (wide * cos + _product(x, swap, 1, 0) * sin).astype(x.dtype)


def _unprepared(d: jax.Array, x: jax.Array, tables, heads: Heads) -> jax.Array:
    """The gradient of q or k from that of what `_prepared` makes of it, in fp32."""
    if tables:
        cos, sin, swap = tables
        d = d * cos + _product((d * sin).astype(swap.dtype), swap, 1, 1)
    wide = x.astype(jnp.float32)
    scale = _scale_of(wide, heads)
    if scale is None:
        return d
    n = wide * scale
    return (d - n * jnp.mean(d * n, axis=1, keepdims=True)) * scale


def _shares(q: jax.Array, k: jax.Array, heads: Heads) -> jax.Array:
    """The softmax over keys, [keys, queries] in fp32."""
    scores = _product(k, q, 1, 1) * (1 / math.sqrt(heads.width))
    found = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    return found * (1 / jnp.sum(found, axis=0, keepdims=True))


def _forward_kernel(qkv, *refs, heads: Heads):
    *tables, out = refs
    tables = [table[...] for table in tables]
    for head in range(heads.count):
        q, k, v = (_cut(qkv, part, head, heads) for part in range(3))
        q, k = _prepared(q, tables, heads), _prepared(k, tables, heads)
        shares = _shares(q, k, heads).astype(v.dtype)
        found = _product(shares, v, 0, 0)
        out[0, :, pl.ds(head * heads.width, heads.width)] = found.astype(out.dtype)


def _backward_kernel(qkv, on_out, *refs, heads: Heads):
    *tables, out = refs
    tables = [table[...] for table in tables]
    for head in range(heads.count):
        given = [_cut(qkv, part, head, heads) for part in range(3)]
        q, k = (_prepared(x, tables, heads) for x in given[:2])
        v, on_o = given[2], _cut(on_out, 0, head, heads)
        shares = _shares(q, k, heads)
        on_v = _product(shares.astype(v.dtype), on_o, 1, 0)
        on_shares = _product(v, on_o, 1, 1)
        mean = jnp.sum(on_shares * shares, axis=0, keepdims=True)
        on_scores = (shares * (on_shares - mean) * (1 / math.sqrt(heads.width))).astype(q.dtype)
        on_q, on_k = _product(on_scores, k, 0, 0), _product(on_scores, q, 1, 0)
        found = (
            _unprepared(on_q, given[0], tables, heads),
            _unprepared(on_k, given[1], tables, heads),
            on_v,
        )
        for part, grad in enumerate(found):
            place = pl.ds((part * heads.count + head) * heads.width, heads.width)
            out[0, :, place] = grad.astype(out.dtype)
