"""A matmul with SwiGLU fused into its end, for the forward pass on NVIDIA's Hopper GPUs.

Otherwise the matmul writes two halves, which SwiGLU reads again to write half as much; here
(Pallas, compiled by Mosaic GPU) it is applied before they leave the multiprocessor. The structure
is that of JAX's own matmul for these GPUs (jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu):
one persistent program on every multiprocessor, two warpgroups multiply, a third fetches.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gae_jax.kernels.swiglu import swiglu
from gae_jax.runtime.mesh import by_rows

ROWS = 128  # of a tile; each warpgroup has half of them
COLUMNS = 128  # of a tile, in either half of the output
DEPTH = 64  # of the summed axis, fetched at once
BUFFERS = 4  # number of fetches in flight
STORED = 64  # columns that are written at once
BAND = 32  # columns of tiles that are traversed together, as measured, see docs/performance/log.md
WAVES = 8  # least number of tiles for each multiprocessor; with 23 it beat cuBLAS


def multiprocessors() -> int:
    """Return the number of multiprocessors of the first GPU."""
    return getattr(jax.local_devices()[0], "core_count", None) or 132


def swiglu_matmul_obstacle(dtype, shape: tuple[int, ...], hidden: int) -> str | None:
    """Return why `swiglu_matmul` cannot process tokens of this dtype and shape, or None.

    Args:
      hidden: columns of the output.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype)}, not bfloat16"
    if shape[-1] % DEPTH or hidden % COLUMNS:
        return f"widths of {shape[-1]} and {hidden} are no multiples of {DEPTH} and {COLUMNS}"
    device = jax.local_devices()[0]
    if str(getattr(device, "compute_capability", "")) != "9.0":
        return "the device is no Hopper GPU"
    tiles = shape[0] * shape[1] // ROWS * (hidden // COLUMNS)
    if shape[1] % ROWS or tiles < WAVES * multiprocessors():
        return f"tokens are {list(shape[:2])}, too few or their number no multiple of {ROWS}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul_swiglu(x: jax.Array, kernel: jax.Array, bias: jax.Array, kernels: str) -> jax.Array:
    """Compute `swiglu` of x W, [B, N, C] x [C, 2 H], in one kernel if nothing is differentiated.

    The backward pass needs x W, which the kernel does not write.
    """
    if swiglu_matmul_obstacle(x.dtype, x.shape, kernel.shape[1] // 2):
        return swiglu(x @ kernel.astype(x.dtype), bias, kernels)
    return swiglu_matmul(x, kernel.astype(x.dtype), bias)


def _saved(x, kernel, bias, kernels):
    def apart(x, kernel, bias):
        return swiglu(x @ kernel.astype(x.dtype), bias, kernels)

    return jax.vjp(apart, x, kernel, bias)


matmul_swiglu.defvjp(_saved, lambda kernels, back, on: back(on))


def swiglu_matmul(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, interpret=None, programs: int = 0
) -> jax.Array:
    """Compute silu(a) * b with (a, b) = split(x W + bias) in one kernel.

    Args:
      x, kernel, bias: [B, N, C] and [C, 2 H] in bf16, and [2 H].
      interpret: parameters of Pallas's interpreter of such kernels, for tests without a GPU.
      programs: number of programs; 0: one for each multiprocessor.

    Returns:
      [B, N, H] in bf16.
    """

    def run(x, kernel, bias):
        rows, half = x.shape[0] * x.shape[1], kernel.shape[1] // 2
        output = plgpu.kernel(
            functools.partial(_kernel, direct=interpret is not None),
            out_type=jax.ShapeDtypeStruct((rows, half), x.dtype),
            grid=(programs or multiprocessors(),),
            grid_names=("program",),
            num_threads=3,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **({} if interpret is None else {"interpret": interpret}),
        )(x.reshape(rows, -1), kernel, bias)
        return output.reshape(*x.shape[:2], half)

    return by_rows(run, [True, False, False])(x, kernel, bias.astype(jnp.float32))


def _kernel(x_ref, kernel_ref, bias_ref, out_ref, *, direct: bool):
    """``direct``: load vectors without a layout, which the interpreter does not support."""
    half = out_ref.shape[1]
    grid = out_ref.shape[0] // ROWS, half // COLUMNS
    tiling = (plgpu.TilingTransform((8, STORED)), plgpu.SwizzleTransform(128))
    mine = pl.ds(lax.axis_index("warpgroup") * (ROWS // 2), ROWS // 2)

    def block(shape, index):
        return plgpu.BlockSpec(shape, index, transforms=tiling, memory_space=plgpu.SMEM)

    def pipeline(body, context):
        matrix = block((DEPTH, COLUMNS), lambda k: (k, 0))
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(x_ref.shape[1] // DEPTH,),
            in_specs=[block((ROWS, DEPTH), lambda k: (0, k)), matrix, matrix],
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=BUFFERS,
            compute_context=context,
        )

    def vector(first):
        """Load a part of the bias in the layout of a row of the accumulators."""
        at = pl.ds(first, STORED)
        if direct:
            return bias_ref[at]
        layout = plgpu.Layout.WGMMA.reduce(0)
        return plgpu.load(bias_ref, at, layout=layout, optimized=False)

    def nothing(*_, **__):
        """Stand in for the body, on which the allocations do not depend."""

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(nothing, nothing).get_allocations(x_ref, kernel_ref, kernel_ref),
        stored=plgpu.SMEM(
            (2, COLUMNS // STORED, ROWS // 2, STORED), out_ref.dtype, transforms=tiling
        ),
        collective_axes="warpgroup",
    )
    def _(buffers, stored):
        mine_stored = stored.at[lax.axis_index("warpgroup")]

        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="program")
        def _(loop):
            row, column = plgpu.planar_snake(loop.index[0], grid, 0, BAND)
            rows, first = pl.ds(row * ROWS, ROWS), column * COLUMNS

            def context(multiply):
                accumulator = plgpu.ACC((ROWS // 2, COLUMNS), jnp.float32)

                @functools.partial(pl.run_scoped, a_ref=accumulator, b_ref=accumulator)
                def _(a_ref, b_ref):
                    multiply((a_ref, b_ref))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for part in range(COLUMNS // STORED):
                        columns = slice(part * STORED, (part + 1) * STORED)
                        a, b = a_ref[:, columns], b_ref[:, columns]
                        start = first + part * STORED
                        a = a + lax.broadcast_in_dim(vector(start), a.shape, (1,))
                        b = b + lax.broadcast_in_dim(vector(half + start), b.shape, (1,))
                        # 1 / (1 + exp(-a)) as a square: roots are cheaper than divisions
                        root = lax.rsqrt(1.0 + jnp.exp(-a))
                        mine_stored[part] = (a * root * root * b).astype(out_ref.dtype)
                    plgpu.commit_smem()
                    for part in range(COLUMNS // STORED):
                        at = pl.ds(first + part * STORED, STORED)
                        plgpu.copy_smem_to_gmem(mine_stored.at[part], out_ref.at[rows, at].at[mine])

            def body(_, x_part, a_part, b_part, accumulators):
                plgpu.wgmma(accumulators[0], x_part.at[mine], a_part)
                plgpu.wgmma(accumulators[1], x_part.at[mine], b_part)
                plgpu.wgmma_wait(0)
                return accumulators

            left, right = pl.ds(first, COLUMNS), pl.ds(half + first, COLUMNS)
            pipeline(body, context)(
                x_ref.at[rows], kernel_ref.at[:, left], kernel_ref.at[:, right], allocations=buffers
            )

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
