"""Protocols of published figures under the names that results carry; none can be changed.

What each repository computes was read in its source: ADM's TensorFlow evaluator
(openai/guided-diffusion), torch-fidelity 0.4.0, pytorch-fid 0.3.0; those of reconstructions are
`evaluation.reconstruction`'s.
"""

import dataclasses

from gae_jax.evaluation import reconstruction
from gae_jax.runtime.errors import ConfigError

STANDARD = 50_000  # images that a metric's plain name stands for


@dataclasses.dataclass(frozen=True)
class Preset:
    """How a set of images is compared with a reference.

    Attributes:
      front_end: of the Inception network, a name of `pretrained.inception.FRONT_ENDS`.
      inception_score: "consecutive": splits of 5,000 in the order of the file | "shuffled": 10
        splits of a fixed permutation, with their std.
      precision_recall: "f16_adm": distances in half precision, as ADM has them | "f32".
      metrics: that the repository reports.
    """

    front_end: str
    inception_score: str
    precision_recall: str
    metrics: tuple[str, ...]


PRESETS = {
    "adm": Preset(
        *("tf", "consecutive", "f16_adm"),
        ("fid", "sfid", "inception_score", "precision", "recall"),
    ),
    "torch_fidelity": Preset("tf", "shuffled", "f32", ("fid", "inception_score", "kid")),
    "pytorch_fid": Preset("pytorch_fid", "shuffled", "f32", ("fid",)),
    # rFID of reconstructions against the images themselves
    **{
        name: Preset(preset.front_end, "shuffled", "f32", ("fid",))
        for name, preset in reconstruction.PRESETS.items()
    },
}
# The names of protocols that configs choose from, written out: help does not import this module.
RECONSTRUCTION = ("lightningdit_recon", "rae_recon")
GENERATION = ("adm", "torch_fidelity", "pytorch_fid")


def preset_of(name: str) -> Preset:
    """Return the preset of a name; raise ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def counted(metric: str, count: int) -> str:
    """Return the metric's name, with the number of images in it unless they are `STANDARD`.

    ``fid`` of 5,000 images is ``fid_5k``, of 1,797 ``fid_1797``.
    """
    if count == STANDARD:
        return metric
    return f"{metric}_{count // 1000}k" if count % 1000 == 0 else f"{metric}_{count}"
