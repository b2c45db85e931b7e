"""Residual sum, gate, RMSNorm and modulation between matmuls, fused into one kernel.

XLA computes a residual sum, the norm after it and their gradients in several kernels, each of
which reads the tokens again. The kernels here (Pallas, compiled by Triton) read and write every
array of tokens once. They compute in fp32 and round once; the plain path, with which the tests
compare them, may round after every operation.

Tokens are [B, N, C]; arrays per image are [B, C], per channel [C].
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gae_jax.kernels.fp8 import scaled_like, store_scaled
from gae_jax.runtime.mesh import by_rows, splits_channels

# Implementation of norms, gates and gated units: XLA, kernels ("triton"), or kernels where they can
# run ("auto"). "interpret" runs the kernels without a GPU, slowly, for tests.
KERNELS = ("auto", "xla", "triton", "interpret")


class Tile(NamedTuple):
    """The part of an array that one program of a kernel processes.

    Attributes:
      rows: number of tokens, all of one image.
      at_once: tokens whose loads are in flight together.
      columns: number of channels; 0: all of them.
      warps: number of warps of the program.
    """

    rows: int
    at_once: int = 1
    columns: int = 0
    warps: int = 4


# As measured on an H100, see docs/performance/log.md.
FORWARD = Tile(16)
BACKWARD = Tile(64, at_once=2)
ROWS = 64  # the number of tokens is a multiple


def check_kernels(kernels: str) -> str:
    """Return the name; raise ValueError if it is not one of `KERNELS`."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels is {kernels!r}; use one of {', '.join(KERNELS)}")
    return kernels


def kernel_obstacle(dtype, shape: tuple[int, ...]) -> str | None:
    """Return why the kernels cannot process tokens of this dtype and shape, or None if they can."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype)}, not bfloat16"
    if len(shape) != 3 or shape[1] % ROWS:
        return f"tokens are {list(shape)}, their number not a multiple of {ROWS}"
    if shape[2] % 128 or len(powers_of_2(shape[2])) > 3:
        return f"a width of {shape[2]} is not the sum of up to three powers of 2 from 128 on"
    return None


def use_kernels(kernels: str, dtype, shape: tuple[int, ...], obstacle: str | None = None) -> bool:
    """Decide whether kernels process tokens of this dtype and shape.

    Args:
      obstacle: why the network itself cannot use kernels, or None.

    Raises:
      ValueError: for "triton" and "interpret" where kernels cannot run, or an unknown name.
    """
    if check_kernels(kernels) == "xla":
        return False
    obstacle = obstacle or kernel_obstacle(dtype, shape)
    if splits_channels():
        obstacle = "mesh.tensor splits the channels"
    if kernels != "interpret" and jax.default_backend() != "gpu":
        obstacle = f"the device is a {jax.default_backend()}, not a gpu"
    if obstacle and kernels != "auto":
        raise ValueError(f"kernels is {kernels!r}, but {obstacle}; use 'auto' or 'xla'")
    return obstacle is None


def powers_of_2(width: int) -> list[tuple[int, int]]:
    """Split a width into powers of 2, largest first; return (first, size) of each."""
    chunks, first = [], 0
    while first < width:
        size = 1 << ((width - first).bit_length() - 1)
        chunks.append((first, size))
        first += size
    return chunks


def call(
    kernel: Callable, shapes: list, grid: tuple[int, ...], kernels: str, warps: int, name: str
):
    """Return a Triton kernel as a function of arrays; ``kernels`` as in `KERNELS`."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=kernels == "interpret",
        name=name,
    )


def wide(ref, *index) -> jax.Array:
    """Load a part of a reference as fp32."""
    return ref[index].astype(jnp.float32)


def add_and_norm(
    x: jax.Array,
    y: jax.Array | None = None,
    *,
    gate: jax.Array | None = None,
    bias: jax.Array | None = None,
    weight: jax.Array | None = None,
    shift: jax.Array | None = None,
    scale: jax.Array | None = None,
    eps: float = 1e-6,
    kernels: str = "triton",
) -> tuple[jax.Array, jax.Array]:
    """Compute u = x + gate * (y + bias) and h = u / rms(u) * weight * (1 + scale) + shift.

    Args:
      x: the residual stream [B, N, C].
      y: output of a branch [B, N, C]; None: nothing is added, u is x.
      gate, shift, scale: [B, C], or None.
      bias, weight: [C], or None.

    Returns:
      (u, h), both [B, N, C] in the dtype of x.
    """
    arrays = dict(x=x, y=y, gate=gate, bias=bias, weight=weight, shift=shift, scale=scale)
    return _add_and_norm(_given(arrays), eps, kernels)


def add_and_norm_fp8(
    *, eps: float = 1e-6, kernels: str, fp8: bool = False, **arrays: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Compute `add_and_norm` after or before an fp8 matmul; has no gradient.

    Args:
      arrays: as `add_and_norm`, and the scales of y: rows [B, N, 1] and columns [C], both or none.
      fp8: quantise h as `fp8.quantize` does.

    Returns:
      (u, h), or with ``fp8`` (u, h in fp8 [B, N, C], its scale [B, N, 1]).
    """
    return _norm_forward(_given(arrays), eps, kernels, fp8)


def _given(arrays: dict) -> dict:
    return {name: array for name, array in arrays.items() if array is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _add_and_norm(given: dict, eps: float, kernels: str):
    return _norm_forward(given, eps, kernels)


def _norm_forward(given: dict, eps: float, kernels: str, fp8: bool = False):
    names = tuple(given)

    def run(*arrays):
        x = arrays[names.index("x")]
        batch, tokens, width = x.shape
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        shapes = [like] if "y" in names else []
        shapes += scaled_like(x.shape) if fp8 else [like]
        body = functools.partial(_norm_forward_kernel, names=names, width=width, eps=eps, fp8=fp8)
        grid = (batch, tokens // FORWARD.rows)
        return call(body, shapes, grid, kernels, FORWARD.warps, "add_and_norm")(*arrays)

    outputs = by_rows(run, [array.ndim > 1 for array in given.values()])(*given.values())
    return tuple(outputs) if "y" in names else (given["x"], *outputs)


def _norm_forward_kernel(*refs, names: tuple[str, ...], width: int, eps: float, fp8: bool):
    of, outputs = dict(zip(names, refs[: len(names)], strict=True)), refs[len(names) :]
    b, first = pl.program_id(0), pl.program_id(1) * FORWARD.rows
    chunks = powers_of_2(width)

    vector = functools.partial(_vector, of, b, chunks)
    gate, bias, shift = vector("gate"), vector("bias"), vector("shift")
    factor, columns = _factor(vector("weight"), vector("scale")), vector("columns")

    def rows(index, _):
        loaded = []
        for k in range(FORWARD.at_once):
            row = first + index * FORWARD.at_once + k
            x = [wide(of["x"], b, row, pl.ds(*chunk)) for chunk in chunks]
            y = [wide(of["y"], b, row, pl.ds(*chunk)) for chunk in chunks] if "y" in of else None
            loaded.append((row, x, y))
        for row, u, y in loaded:
            if y is not None:
                if columns is not None:
                    of_token = wide(of["rows"], b, row, 0)
                    y = [a * (c * of_token) for a, c in zip(y, columns, strict=True)]
                if bias is not None:
                    y = [a + c for a, c in zip(y, bias, strict=True)]
                if gate is not None:
                    y = [a * c for a, c in zip(y, gate, strict=True)]
                # rounded before the norm, since the backward pass reads the rounded sum
                u = [(a + c).astype(outputs[0].dtype) for a, c in zip(u, y, strict=True)]
                for part, chunk in zip(u, chunks, strict=True):
                    outputs[0][b, row, pl.ds(*chunk)] = part
                u = [part.astype(jnp.float32) for part in u]
            scale = jax.lax.rsqrt(sum(jnp.sum(part * part) for part in u) / width + eps)
            normed = []
            for number, (part, chunk) in enumerate(zip(u, chunks, strict=True)):
                h = part * scale
                if factor is not None:
                    h = h * factor[number]
                if shift is not None:
                    h = h + shift[number]
                if fp8:
                    normed.append(h)
                else:
                    outputs[-1][b, row, pl.ds(*chunk)] = h.astype(outputs[-1].dtype)
            if fp8:
                store_scaled(outputs[-2:], normed, chunks, b, row)

    jax.lax.fori_loop(0, FORWARD.rows // FORWARD.at_once, rows, None)


def _vector(of: dict, b, chunks: list, name: str) -> list | None:
    """Load an array [C] or a row of an array [B, C] in chunks; None if it is not given."""
    if name not in of:
        return None
    at = (b,) if name in ("gate", "shift", "scale") else ()
    return [wide(of[name], *at, pl.ds(*chunk)) for chunk in chunks]


def _factor(weight: list | None, scale: list | None) -> list | None:
    """Compute weight (1 + scale) in chunks, leaving out what is None."""
    if scale is None:
        return weight
    scale = [1 + part for part in scale]
    return scale if weight is None else [a * c for a, c in zip(weight, scale, strict=True)]


def _norm_saved(given: dict, eps: float, kernels: str):
    u, h = _norm_forward(given, eps, kernels)
    return (u, h), (u, {name: array for name, array in given.items() if name != "x"})


def _norm_backward(eps: float, kernels: str, saved, cotangents):
    u, given = saved
    du, dh = cotangents
    names = tuple(name for name in ("y", "gate", "weight", "scale") if name in given)
    # whether gradients of vectors need sums over tokens, see `_norm_backward_kernel`
    sums = bool(given.keys() - {"y"})

    def run(u, du, dh, *arrays):
        batch, tokens, width = u.shape
        like = jax.ShapeDtypeStruct(u.shape, u.dtype)
        shapes = [like, like] if "gate" in names else [like]
        if sums:
            parts = (batch, tokens // BACKWARD.rows, 4 if "y" in names else 2, width)
            shapes.append(jax.ShapeDtypeStruct(parts, jnp.float32))
        body = functools.partial(
            _norm_backward_kernel, names=names, width=width, eps=eps, sums=sums
        )
        grid = (batch, tokens // BACKWARD.rows)
        return call(body, shapes, grid, kernels, BACKWARD.warps, "add_and_norm_backward")(
            u, du, dh, *arrays
        )

    arrays = [given[name] for name in names]
    split = [True, True, True, *(array.ndim > 1 for array in arrays)]
    dx, *outputs = by_rows(run, split)(u, du, dh, *arrays)
    grads = {"x": dx}
    if "y" in given:
        grads["y"] = outputs[0] if "gate" in given else dx
    if sums:
        grads |= _vector_gradients(jnp.sum(outputs[-1], axis=1), given)
    return (grads,)


def _vector_gradients(sums: jax.Array, given: dict) -> dict:
    """Compute gradients from sums over tokens [B, 2 or 4, C] of dh, dh n, and dx y, dx."""
    wide = {name: array.astype(jnp.float32) for name, array in given.items() if name != "y"}
    on_h, on_hn = sums[:, 0], sums[:, 1]
    grads = {}
    if "shift" in wide:
        grads["shift"] = on_h
    if "scale" in wide:
        grads["scale"] = on_hn * wide.get("weight", 1.0)
    if "weight" in wide:
        grads["weight"] = jnp.sum(on_hn * (1 + wide.get("scale", 0.0)), axis=0)
    if "gate" in wide:
        grads["gate"] = sums[:, 2] + wide.get("bias", 0.0) * sums[:, 3]
    if "bias" in wide:
        grads["bias"] = jnp.sum(wide.get("gate", 1.0) * sums[:, 3], axis=0)
    return {name: grad.astype(given[name].dtype) for name, grad in grads.items()}


def _norm_backward_kernel(u_ref, du_ref, dh_ref, *refs, names, width: int, eps: float, sums: bool):
    """Compute, in one program for some tokens of an image, the gradients and sums over tokens.

    dx = du + (g - n mean(g n)) / rms with g = dh weight (1 + scale); dy = gate dx.
    """
    of, outputs = dict(zip(names, refs[: len(names)], strict=True)), refs[len(names) :]
    b, first = pl.program_id(0), pl.program_id(1) * BACKWARD.rows
    chunks = powers_of_2(width)

    vector = functools.partial(_vector, of, b, chunks)
    gate, factor = vector("gate"), _factor(vector("weight"), vector("scale"))
    branch = "y" in of and sums
    count = (4 if branch else 2) if sums else 0

    def rows(index, totals):
        loaded = []
        for k in range(BACKWARD.at_once):
            row = first + index * BACKWARD.at_once + k
            wanted = [u_ref, du_ref, dh_ref, *([of["y"]] if branch else [])]
            loaded.append((row, [[wide(ref, b, row, pl.ds(*c)) for c in chunks] for ref in wanted]))
        for row, (u, du, dh, *y) in loaded:
            g = dh if factor is None else [a * c for a, c in zip(dh, factor, strict=True)]
            # both sums independently: the second need not wait for the first
            square = sum(jnp.sum(part * part) for part in u)
            mean = sum(jnp.sum(a * c) for a, c in zip(g, u, strict=True)) / width
            scale = jax.lax.rsqrt(square / width + eps)
            n, mean = [part * scale for part in u], mean * scale
            dx = [d + (a - c * mean) * scale for d, a, c in zip(du, g, n, strict=True)]
            for number, chunk in enumerate(chunks):
                outputs[0][b, row, pl.ds(*chunk)] = dx[number].astype(outputs[0].dtype)
                if gate is not None:
                    dy = (dx[number] * gate[number]).astype(outputs[1].dtype)
                    outputs[1][b, row, pl.ds(*chunk)] = dy
            if sums:
                new = [dh, [a * c for a, c in zip(dh, n, strict=True)]]
                if branch:
                    new += [[a * c for a, c in zip(dx, y[0], strict=True)], dx]
                totals = jax.tree.map(jnp.add, totals, new)
        return totals

    zeros = [[jnp.zeros(size, jnp.float32) for _, size in chunks] for _ in range(count)]
    totals = jax.lax.fori_loop(0, BACKWARD.rows // BACKWARD.at_once, rows, zeros)
    for number, total in enumerate(totals):
        for part, chunk in zip(total, chunks, strict=True):
            outputs[-1][b, pl.program_id(1), number, pl.ds(*chunk)] = part


_add_and_norm.defvjp(_norm_saved, _norm_backward)
