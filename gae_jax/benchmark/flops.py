"""Count floating-point operations of a traced function: its matmuls and convolutions.

A multiplication and an addition count as two, so a matmul of [M, K] and [K, N] as 2 M N K, the
convention of "model FLOPs". Elementwise operations and reductions are left out.
"""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def count(function: Callable, *arguments) -> int:
    """Count the operations of one call; nothing is computed.

    Args:
      arguments: arrays or ShapeDtypeStructs.
    """
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr, asked: list[bool] | None = None) -> int:
    """Count the operations of a jaxpr and all that it calls.

    Unused results are left out, as XLA does. The body of a scan counts as often as it runs, that of
    a while loop, whose length is unknown, once, and of a cond the most expensive branch. What a
    backward pass computes again (`jax.checkpoint`) counts again.

    Args:
      asked: whether each result is used; None: all are.
    """
    asked = [True] * len(jaxpr.outvars) if asked is None else asked
    # literals among the results are no variables, and no equation makes them
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
    # the next iteration of a loop may read every result
    own = None if name in ("scan", "while") else asked

    def of_inner(jaxpr):
        return of_jaxpr(jaxpr, own if own and len(own) == len(jaxpr.outvars) else None)

    inner = [[of_inner(jaxpr) for jaxpr in _jaxprs(value)] for value in params.values()]
    if name == "cond":
        return max(max(counts) for counts in inner if counts)
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
    """List the jaxprs in a parameter of an equation."""
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
    """2 x outputs x taps x input channels, with taps on padding, without zeros of dilated inputs.

    So a transposed convolution counts as the strided one whose gradient it is.
    """
    kernel = equation.invars[1].aval
    features_out = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    taps = kernel.size // features_out
    outputs = equation.outvars[0].aval.size
    return 2 * outputs * taps // math.prod(equation.params["lhs_dilation"])
