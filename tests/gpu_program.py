"""What XLA makes of a network for an H200 that need not be there: matmuls, kernels, passes.

    pip install jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12
    PYTHONPATH=. python tests/gpu_program.py same fp8 --network=velocity --depth=2 --batch_size=256

Compiles LightningDiT-XL/1 (velocity), or GAE-L's encoder or decoder (encode, decode), in bf16 with
kernels, on a CPU, and runs nothing. Counts calls of the compiled program by name, and fusions that
give an array of all tokens. With --dump=FOLDER what XLA compiled stays there, PTX among it.
"""

import argparse
import collections
import os
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies

# As NVIDIA says of the H200.
LIMITS = dict(
    threads_per_block_limit=1024,
    threads_per_warp=32,
    threads_per_core_limit=2048,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_core=228 * 2**10,
    registers_per_core_limit=2**16,
    registers_per_block_limit=2**16,
    block_dim_limit_x=2**31 - 1,
    block_dim_limit_y=2**16 - 1,
    block_dim_limit_z=2**16 - 1,
    thread_dim_limit_x=1024,
    thread_dim_limit_y=1024,
    thread_dim_limit_z=64,
    core_count=132,
    fpus_per_core=128,
    clock_rate_ghz=1.98,
    l2_cache_size=50 * 2**20,
    memory_bandwidth=4_800_000_000_000,
    device_memory_size=141 * 10**9,
)
NAMES = dict(
    name="NVIDIA H200", driver_version="12.9.0", runtime_version="12.9.0", dnn_version="9.10.0"
)


def description() -> str:
    """The device as XLA's compiler reads it."""
    lines = [f"{key}: {value}" for key, value in LIMITS.items()]
    lines += [f'{key}: "{value}"' for key, value in NAMES.items()]
    lines += ['compile_time_toolkit_version: "12.9.0"']
    lines += ["cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"]
    own = 'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }'
    return "gpu_device_info {\n" + "\n".join(lines) + "\n}\n" + own


def pretend(device) -> None:
    """What asks for the devices of this machine is told of the other."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from gae_jax.nn import attention

    jax.default_backend, jax.local_devices = (lambda: "gpu"), (lambda **_: [device])
    attention.cudnn_obstacle = lambda dtype, head_dim: None
    cudnn.check_cudnn_version = lambda *_, **__: 91000
    cudnn.check_compute_capability = lambda *_, **__: True


def compiled(network: str, matmuls: str, depth: int, size: int, device) -> str:
    """The program's text."""
    from gae_jax.generators.dit import LightningDiT
    from gae_jax.nn.network import Network
    from gae_jax.nn.quantized import with_matmuls
    from gae_jax.tokenizers.gae import GAE

    own = jax.sharding.SingleDeviceSharding(device)
    fast = dict(dtype=jnp.bfloat16, attention="auto", kernels="auto")
    x, t = jnp.zeros((size, 16, 16, 32)), jnp.zeros(size)
    if network == "velocity":
        build, inputs = (lambda rngs: LightningDiT(depth=depth, **fast, rngs=rngs)), (x, t, t)
    else:
        build = lambda rngs: GAE(num_layers=depth, **fast, rngs=rngs)  # noqa: E731
        inputs = (jnp.zeros((size, 256, 256, 3)) if network == "encode" else x,)
    made = with_matmuls(Network(build), matmuls)

    def run(arrays, x, *more):
        model = made(*arrays)
        if network == "velocity":
            time, labels = more
            return model(x, time, labels.astype(jnp.int32))
        return getattr(model, network)(x)

    def of(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    shapes = jax.tree.map(of, (made.abstract, *inputs))
    return jax.jit(run).lower(*shapes).compile().as_text()


def main() -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("matmuls", nargs="+", choices=("same", "fp8"))
    parser.add_argument("--network", choices=("velocity", "encode", "decode"), default="velocity")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--dump", default="")
    options = parser.parse_args()
    flags = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
    flags += f" --xla_dump_to={options.dump}" * bool(options.dump)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    jax.config.update("jax_platforms", "cpu")
    found = topologies.get_topology_desc(
        platform="cuda", target_config=description(), topology="1x1x1"
    )
    device = found.devices[0]
    pretend(device)
    for matmuls in options.matmuls:
        text = compiled(options.network, matmuls, options.depth, options.batch_size, device)
        calls = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))
        tokens = options.batch_size * 256
        whole = rf"= \w+\[({options.batch_size},256|{tokens}),[\d,]+\]\S* fusion\("
        passes = len(re.findall(whole, text[text.index("ENTRY") :]))
        print(f"{matmuls}: {dict(sorted(calls.items()))}, {passes} fusions of all tokens")


if __name__ == "__main__":
    main()
