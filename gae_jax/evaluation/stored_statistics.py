"""Means and covariances of features in files: ADM's, pytorch-fid's, MeanFlow's, EDM2's, ours."""

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gae_jax.evaluation.frechet import Reference
from gae_jax.evaluation.image_zip import (
    ZIP,
    new_archive,
    reading,
    start_of,
    write_array,
    write_images,
)
from gae_jax.interop.pickles import read_arrays
from gae_jax.runtime.errors import DataError, UserError
from gae_jax.runtime.files import read_member

PICKLE = b"\x80"  # how pickles begin, from protocol 2 on

# The names of a space's mean and covariance in an npz; ADM's first, "cls" ours.
NPZ_NAMES = {
    "pool": (("mu", "sigma"), ("ref_mu", "ref_sigma")),
    "spatial": (("mu_s", "sigma_s"),),
    "cls": (("mu_cls", "sigma_cls"),),
}
EDM2_NAMES = {"fid": "pool", "fd_dinov2": "cls"}

# Space -> (mean [d], covariance [d, d]), float64.
MeansAndCovariances = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Statistics:
    """Means and covariances of features of a set of images.

    Attributes:
      path: the file.
      spaces: by "pool" (Inception, d = 2048), "spatial" (2023) or "cls" (DINOv2): the mean [d]
        and the covariance [d, d], float64.
      count: of images, 0 if the file does not say.
      front_end: "tf", "pytorch_fid" or another extractor's name; "" if the file does not say.
      has_images: whether ``arr_0`` is inside, for precision and recall.
      facts: other values given to `write_statistics`.
    """

    path: Path
    spaces: MeansAndCovariances
    count: int = 0
    front_end: str = ""
    has_images: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def is_statistics(path: Path) -> bool:
    """Return whether a file has stored statistics, also ADM's references with images."""
    path = Path(path)
    if not path.is_file():
        return False
    try:
        if start_of(path).startswith(PICKLE):
            content = read_arrays(path)
            return isinstance(content, dict) and not EDM2_NAMES.keys().isdisjoint(content)
        with reading(path), zipfile.ZipFile(path) as archive:
            return has_statistics(name.removesuffix(".npy") for name in archive.namelist())
    except DataError:
        return False


def has_statistics(keys: Iterable[str]) -> bool:
    """Return whether an npz of arrays with these names has the mean of a space."""
    return not {pair[0] for pairs in NPZ_NAMES.values() for pair in pairs}.isdisjoint(keys)


def load_statistics(path: Path) -> Statistics:
    """Load statistics of ADM's npz, pytorch-fid's, MeanFlow's, EDM2's pickle, or our own npz.

    ADM's (``mu``, ``sigma``, ``mu_s``, ``sigma_s``) come from the TF front end. An npz of ``mu``
    and ``sigma`` alone (pytorch-fid's, MAR's, JiT's), ``ref_mu``, ``ref_sigma`` (MeanFlow, iMF)
    and EDM2's pickle of ``fid`` and ``fd_dinov2`` do not say theirs. CLIP's ``mu_clip``,
    ``sigma_clip`` are ignored. A pickle runs no code: it may hold arrays and plain containers.

    Raises:
      DataError: naming the file and the array: damaged, missing, of wrong shape, not finite, not
        symmetric, or a pickle that asks for anything else.
    """
    path = Path(path)
    if not (start := start_of(path)).startswith((ZIP, PICKLE)):
        raise DataError(f"{path} is neither an npz nor a pickle; give a file of statistics")
    if start.startswith(PICKLE):
        return Statistics(path, _edm2_spaces(path, read_arrays(path)))
    with reading(path), zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        keys = {key for key in members if not re.fullmatch(r"arr_\d+", key)}
        arrays = {key: read_member(archive, members[key]) for key in keys}
        has_images = "arr_0" in members
    spaces: MeansAndCovariances = {}
    for space, pairs in NPZ_NAMES.items():
        for names in pairs:
            if any(name in arrays for name in names) and space not in spaces:
                spaces[space] = _moments(path, arrays, names)
    if not spaces:
        what = "; it holds samples: compute statistics of them" if has_images else ""
        raise DataError(f"{path} has no mu and sigma but {sorted(arrays)}{what}")
    if "manifest" in arrays:
        return Statistics(path, spaces, has_images=has_images, **_manifest(path, arrays))
    front_end = "tf" if "spatial" in spaces else ""
    return Statistics(path, spaces, front_end=front_end, has_images=has_images)


def _manifest(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    try:
        values = json.loads(arrays["manifest"].tobytes())
        return {
            "count": int(values["count"]),
            "front_end": str(values["front_end"]),
            "facts": dict(values["facts"]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: its manifest cannot be read ({error!r}); write it again"
        ) from None


def _moments(path: Path, arrays: Mapping, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance of these names, checked."""
    what = f"{path}: {' and '.join(names)}"
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"{what}: {missing[0]} is missing, there are {sorted(arrays)}; give both")
    try:
        values = [np.asarray(arrays[name]) for name in names]
    except ValueError as error:  # lists of lists that are no rectangle
        raise DataError(f"{what} are no arrays ({error}); compute them again") from None
    if any(array.dtype.kind not in "fiu" for array in values) or not values[0].size:
        raise DataError(
            f"{what}: {values[0].dtype} {list(values[0].shape)} and {values[1].dtype} "
            f"{list(values[1].shape)} are no real numbers; compute them again"
        )
    if half := [x.dtype.name for x in values if x.dtype.kind == "f" and x.dtype.itemsize < 4]:
        raise DataError(
            f"{what}: {half[0]} keeps too few digits of a covariance for its root; save them in "
            "float64"
        )
    mean, covariance = (array.astype(np.float64) for array in values)
    try:
        Reference.of_statistics(mean, covariance)
    except UserError as error:
        raise DataError(f"{what}: {error}") from None
    return mean, covariance


def _edm2_spaces(path: Path, content: Any) -> MeansAndCovariances:
    known = EDM2_NAMES.keys() & content.keys() if isinstance(content, dict) else ()
    if not known:
        has = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} has none of {sorted(EDM2_NAMES)} but {has}; give EDM2's statistics"
        )
    for name in known:
        if not isinstance(content[name], dict):
            raise DataError(f"{path}: {name} is no dictionary of mu and sigma; give EDM2's file")
    return {
        EDM2_NAMES[name]: _moments(path, content[name], ("mu", "sigma")) for name in sorted(known)
    }


def write_statistics(
    path: Path,
    spaces: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    count: int,
    front_end: str,
    facts: Mapping[str, Any],
    images: np.ndarray | Iterable[np.ndarray] | None = None,
) -> None:
    """Write an npz that ADM's evaluator reads as a reference, atomically.

    ``manifest`` in it is JSON as uint8 (``bytes(file["manifest"])``): count, front_end, facts.

    Args:
      spaces: as those of `Statistics`; ADM needs "pool", and "spatial" for sFID.
      count: of images behind the statistics, at least 2.
      front_end: "tf" or "pytorch_fid" (ADM's published numbers are comparable with "tf" only).
      facts: other JSON values to store.
      images: as ``batches`` of `write_samples`; precision and recall need them.

    Raises:
      DataError: for a space that is not known, statistics that `load_statistics` would refuse, or
        images that `write_samples` would.
    """
    path = Path(path)
    if not spaces or not spaces.keys() <= NPZ_NAMES.keys() or count < 2:
        raise DataError(
            f"{path}: statistics of {count} images in the spaces {sorted(spaces)}; give at least 2 "
            f"images and some of {sorted(NPZ_NAMES)}"
        )
    arrays: dict[str, np.ndarray] = {}
    for space, pair in spaces.items():
        names = NPZ_NAMES[space][0]
        checked = _moments(path, dict(zip(names, pair, strict=True)), names)
        arrays |= zip(names, checked, strict=True)
    manifest = json.dumps({"count": count, "front_end": front_end, "facts": dict(facts)})
    arrays["manifest"] = np.frombuffer(manifest.encode(), np.uint8)
    with new_archive(path) as archive:
        for name, array in arrays.items():
            write_array(archive, name, array)
        if images is not None:
            write_images(archive, path, images, None)
