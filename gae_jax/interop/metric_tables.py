"""Tables of the networks that metrics are computed with; `gae_jax.interop.tables` explains rows.

Rows with the transform "unused" have a pattern (`fnmatch`) for torch's name and no path: a file
may hold such tensors, and they are left aside.
"""

from gae_jax.interop.tables import Row, Table
from gae_jax.pretrained import inception, lpips


def _unused(*patterns: str) -> tuple[Row, ...]:
    return tuple(Row(pattern, "", "unused") for pattern in patterns)


def _trunk(torch: str) -> tuple[Row, ...]:
    """VGG16's convolutions; ``torch`` is their name with {slice} and {conv}."""
    rows = []
    for name, layers in lpips.SLICES.items():
        for number, _ in layers:
            theirs, ours = torch.format(slice=name, conv=number), f"net.{name}.{number}"
            rows.append(Row(f"{theirs}.weight", f"{ours}.kernel", "conv"))
            rows.append(Row(f"{theirs}.bias", f"{ours}.bias", "same"))
    return tuple(rows)


_HEADS = (Row("lin{n}.model.1.weight", "lin{n}.model.1.kernel", "conv"),)

# The state dict of lpips.LPIPS(net="vgg"): its scaling is a constant here, and `lins` is a second
# name of the heads.
LPIPS = Table(
    lpips.LPIPS, (*_trunk("net.{slice}.{conv}"), *_HEADS, *_unused("scaling_layer.*", "lins.*"))
)

# The two files that lpips reads, as one dict (their names differ): torchvision's VGG16 and
# lpips/weights/v0.1/vgg.pth, the five heads.
LPIPS_FILES = Table(lpips.LPIPS, (*_trunk("features.{conv}"), *_HEADS, *_unused("classifier.*")))


def _conv_unit(prefix: str) -> tuple[Row, ...]:
    statistics = ("weight", "bias", "running_mean", "running_var")
    return (
        Row(f"{prefix}.conv.weight", f"{prefix}.conv.kernel", "conv"),
        *(Row(f"{prefix}.bn.{x}", f"{prefix}.bn.{x}", "same") for x in statistics),
    )


# pt_inception-2015-12-05-6726825d.pth (pytorch-fid) and weights-inception-2015-12-05-6726825d.pth
# (torch-fidelity) have the same names.
INCEPTION = Table(
    inception.FIDInception,
    (
        *(row for name in inception.unit_names() for row in _conv_unit(name)),
        Row("fc.weight", "fc.kernel", "linear"),
        Row("fc.bias", "fc.bias", "same"),
        *_unused("*.bn.num_batches_tracked"),
    ),
)
