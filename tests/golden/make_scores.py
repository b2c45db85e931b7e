"""Makes scores.safetensors: features and what torch-fidelity makes of them.

Needs torch 2.13.0, torch-fidelity 0.4.0 and torchvision 0.28.0, none of which the tests need:

    python tests/golden/make_scores.py

Features and logits are stored as int16, in 1/256; thus they are exact in float32.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

try:
    import torchvision  # noqa: F401
except RuntimeError:  # built for CUDA, as PyPI has it, beside torch for the CPU
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

COUNTS = {"reference": 400, "generated": 600}
DIMENSIONS, CLASSES, LOGITS = 64, 40, 503  # 503 does not divide by ten splits
KID_SUBSETS, KID_SIZE = 20, 100


def make_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, DIMENSIONS))  # few directions carry most: some points are covered
    inputs = {}
    for shift, (name, count) in enumerate(COUNTS.items()):
        x = rng.normal(size=(count, 6)) * (1 + 0.2 * shift) @ mix
        x = x + 0.3 * rng.normal(size=x.shape) + 0.1 * shift
        inputs[name] = np.maximum(x + 1, 0)
    inputs["logits"] = 2 * rng.normal(size=(LOGITS, CLASSES))
    return {name: np.round(x * 256).astype(np.int16) for name, x in inputs.items()}


def main() -> None:
    inputs = make_inputs()
    reference, generated, logits = (
        torch.from_numpy(inputs[name].astype(np.float32) / 256)
        for name in ("reference", "generated", "logits")
    )
    statistics = [metric_fid.fid_features_to_statistics(x.double()) for x in (generated, reference)]
    isc = metric_isc.isc_features_to_metric(logits, 10, True, 2020)
    kid = metric_kid.kid_features_to_metric(
        generated, reference, kid_subsets=KID_SUBSETS, kid_subset_size=KID_SIZE, verbose=False
    )
    parts = metric_prc.calculate_precision_recall_full(generated, reference, 3)
    results = {
        "fid": [metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]],
        "isc": list(isc.values()),
        "kid": list(kid.values()),
        "precision_recall": parts,
    }
    tensors = inputs | {name: np.array(x, np.float64) for name, x in results.items()}
    print({name: tensors[name] for name in results})
    save_file(tensors, Path(__file__).with_name("scores.safetensors"))


if __name__ == "__main__":
    main()
