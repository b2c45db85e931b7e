"""Name tables of the networks that metrics are computed with."""

from gae_jax.nn.torch_names import Row, Table, biased, unused
from gae_jax.pretrained import inception, lpips


def _trunk(torch: str) -> tuple[Row, ...]:
    """Return the rows of VGG16's convolutions; ``torch`` is their name with {slice} and {conv}."""
    rows: list[Row] = []
    for name, layers in lpips.SLICES.items():
        for number, _ in layers:
            released = torch.format(slice=name, conv=number)
            rows += biased(released, f"net.{name}.{number}", "conv")
    return tuple(rows)


_HEADS = (Row("lin{n}.model.1.weight", "lin{n}.model.1.kernel", "conv"),)

# The state dict of lpips.LPIPS(net="vgg"): its scaling is a constant here, and `lins` is a second
# name of the heads.
LPIPS = Table(
    lpips.LPIPS, (*_trunk("net.{slice}.{conv}"), *_HEADS, *unused("scaling_layer.*", "lins.*"))
)

# The two files that lpips reads, as one dict (their names differ): torchvision's VGG16 and
# lpips/weights/v0.1/vgg.pth, the five heads.
LPIPS_FILES = Table(lpips.LPIPS, (*_trunk("features.{conv}"), *_HEADS, *unused("classifier.*")))


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
        *biased("fc"),
        *unused("*.bn.num_batches_tracked"),
    ),
)
