"""Published peak rates of accelerators, which programs do not reach.

Units are decimal, as the vendors' (1 GB/s = 1e9 bytes/s), except memory, which is in powers of two;
where a figure is ambiguous, the smaller reading is taken.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a mesh.

    Attributes:
      flops: operations per second of bf16 matmuls without sparsity.
      memory: bytes of HBM.
      memory_rate: bytes per second from and to HBM.
      link_rate: bytes per second sent over all fast links (ICI, NVLink) together; as many are
        received at the same time.
      source: where the figures are from.
    """

    flops: float
    memory: int
    memory_rate: float
    link_rate: float
    source: str


# "Bidirectional" bandwidth is both directions together, so half of it leaves the device.
CHIPS: dict[str, Chip] = {
    # quoted, vendor: cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s. The page has no
    # rate of the links; recalled: six of 50 GB/s each way
    "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9, "cloud.google.com/tpu/docs/v4; links recalled"),
    # quoted, vendor: cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s
    # bidirectional
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
    # quoted, vendor: cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, 1200 GB/s
    # bidirectional
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, "cloud.google.com/tpu/docs/v5p"),
    # quoted, vendor: cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, 800 GB/s
    # bidirectional
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, "cloud.google.com/tpu/docs/v6e"),
    # recalled, vendor's data sheets of the SXM modules: 989 TFLOP/s (1979 with sparsity), 80 GB,
    # 3.35 TB/s, NVLink 900 GB/s both ways; torch shows 79.1 GiB of an H100, 139.8 of an H200
    "h100": Chip(989e12, 79 * GIB, 3350e9, 450e9, "NVIDIA H100 SXM data sheet, recalled"),
    "h200": Chip(989e12, 139 * GIB, 4800e9, 450e9, "NVIDIA H200 SXM data sheet, recalled"),
}

# `jax.Device.device_kind` -> name of the chip.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device kind; None if it is not in the table, such as a CPU."""
    name = KINDS.get(device_kind)
    return CHIPS[name] if name else None
