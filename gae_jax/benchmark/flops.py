"""Floating-point operations of a traced function: its matrix products and convolutions.

A multiplication and an addition count as two, so a product of [M, K] and [K, N] as 2 M N K, the
convention of "model FLOPs". Element-wise work and reductions are left out.
"""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def count(function: Callable, *arguments) -> int:
    """Operations of one call; nothing is computed.

    Args:
      arguments: arrays, or ShapeDtypeStructs in their place.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr, asked: list[bool] | None = None) -> int:
    """Of a jaxpr with all that it calls, without what nobody reads, which XLA leaves out.

    ``asked``: which results are read; None: all.

    A scan counts its body as often as it runs; a while loop, whose length nobody knows, once; of
    the branches of a cond the dearest counts. What is computed again in a backward pass
    (`jax.checkpoint`) counts again.
    """
    asked = [True] * len(jaxpr.outvars) if asked is None else asked
    # literals among the results are no variables, and nobody makes them
    read = {id(v) for v, wanted in zip(jaxpr.outvars, asked, strict=True) if wanted}
    total = 0
    for equation in reversed(jaxpr.eqns):
        results = [id(v) in read for v in equation.outvars]
        if any(results) or equation.effects:
            read |= {id(v) for v in equation.invars}
            total += _of_equation(equation, results)
    return total


def _of_equation(equation, asked: list[bool]) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_general(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    # what a loop gives may be what its next round reads
    own = None if name in ("scan", "while") else asked

    def of_inner(jaxpr):
        return of_jaxpr(jaxpr, own if own and len(own) == len(jaxpr.outvars) else None)

    inner = [[of_inner(jaxpr) for jaxpr in _jaxprs(value)] for value in params.values()]
    if name == "cond":
        return max(max(found) for found in inner if found)
    once = sum(map(sum, inner))
    if name == "scan":
        return once * params["length"]
    if name == "pallas_call":  # the kernel of one program
        return once * math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # shapes inside are those of one device
        mesh, key = params["mesh"], next(key for key in params if key.endswith("manual_axes"))
        return once * math.prod(mesh.shape[axis] for axis in params[key])
    return once


def _jaxprs(value) -> list[core.Jaxpr]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []


def _dot_general(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _convolution(equation) -> int:
    """2 x outputs x taps x channels in; taps on padding count, on zeros of a dilated input not.

    A transposed convolution, which is the gradient of a strided one, so counts as the latter.
    """
    kernel = equation.invars[1].aval
    features_out = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    taps = kernel.size // features_out
    outputs = equation.outvars[0].aval.size
    return 2 * outputs * taps // math.prod(equation.params["lhs_dilation"])
