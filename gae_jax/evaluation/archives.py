"""Sets of images and statistics on disk, read as streams: 50,000 images of 256 x 256 are 9.8 GB."""

import collections.abc
import dataclasses
import hashlib
import json
import os
import pickle
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from gae_jax.errors import DataError
from gae_jax.interop.files import digest

JPEG = (".jpg", ".jpeg")
PNG_NAME = re.compile(r"(\d+)(?:_(\d+))?\.png")  # number of the sample, and its class

# Keys of files of statistics -> our space: ADM's and pytorch-fid's, and MeanFlow's.
KEYS = {
    "pool": (("mu", "sigma"), ("ref_mu", "ref_sigma")),
    "spatial": (("mu_s", "sigma_s"),),
    "cls": (("mu_cls", "sigma_cls"),),  # ours
}
# EDM2's dict of dicts: theirs -> ours.
PICKLED = {"fid": "pool", "fd_dinov2": "cls"}


@dataclasses.dataclass(frozen=True)
class Samples:
    """A set of uint8 images.

    Attributes:
      path: of the file or folder.
      count, shape: images, and (H, W, 3).
      labels: int32 [n], or None where nothing tells.
      kind: npz | npy | png.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    kind: str
    files: tuple[Path, ...] = ()

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Images [n, H, W, 3], n <= size, in the order of their numbers.

        Raises:
          DataError: for a file that is damaged or whose images are not alike.
        """
        if self.kind == "npz":
            yield from _npz_batches(self, size)
        elif self.kind == "npy":
            images = np.load(self.path, mmap_mode="r")
            for first in range(0, self.count, size):
                yield np.asarray(images[first : first + size])
        else:
            for first in range(0, self.count, size):
                part = self.files[first : first + size]
                yield np.stack([_read_png(path, self.shape) for path in part])


def open_samples(path: Path) -> Samples:
    """The images of an ``.npz`` with ``arr_0`` (labels in ``arr_1``), an ``.npy`` or a folder.

    A folder holds PNG files that are called by the numbers of the samples: ``000012.png``, or
    ``000012_0207.png`` with the class.

    Raises:
      DataError: naming what cannot be used and what to do about it.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise DataError(f"there are no samples {path}")
    if path.suffix == ".npy":
        try:
            images = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        return Samples(path, len(images), _checked(path, images.shape, images.dtype), None, "npy")
    if path.suffix != ".npz":
        raise DataError(
            f"{path} is no set of samples: give an .npz with arr_0, an .npy, or a folder of PNGs"
        )
    with _zip(path) as archive:
        names = archive.namelist()
        if "arr_0.npy" not in names:
            keys = sorted(name.removesuffix(".npy") for name in names)
            what = (
                "it is a file of statistics, not of samples"
                if {"mu", "sigma"} <= set(keys)
                else "samples are in arr_0, uint8 [N, H, W, 3]"
            )
            raise DataError(f"{path} has no arr_0 but {keys}: {what}")
        with archive.open("arr_0.npy") as file:
            shape, dtype = _header(path, file)
        image = _checked(path, shape, dtype)
        labels = None
        if "arr_1.npy" in names:
            with archive.open("arr_1.npy") as file:
                found = np.lib.format.read_array(file)
            if found.shape == shape[:1] and np.issubdtype(found.dtype, np.integer):
                labels = found.astype(np.int32)
    return Samples(path, shape[0], image, labels, "npz")


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}): it is damaged or cut off") from None


def _header(path: Path, file) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: arr_0 is no array ({error})") from None
    if fortran and len(shape) > 1:
        raise DataError(f"{path}: arr_0 is stored column by column; save it again in C order")
    return shape, dtype


def _checked(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or not shape[0]:
        raise DataError(
            f"{path} holds {dtype} {list(shape)}; samples are uint8 [N, H, W, 3] (quantise floats "
            "with data.images.to_uint8, put channels last)"
        )
    return shape[1:]


def _npz_batches(samples: Samples, size: int) -> Iterator[np.ndarray]:
    pixels = int(np.prod(samples.shape))
    try:
        with _zip(samples.path) as archive, archive.open("arr_0.npy") as file:
            _header(samples.path, file)
            for first in range(0, samples.count, size):
                count = min(size, samples.count - first)
                content = file.read(count * pixels)
                if len(content) < count * pixels:
                    raise DataError(
                        f"{samples.path} is cut off: image {first + len(content) // pixels} of "
                        f"{samples.count} is not whole; write it again"
                    )
                yield np.frombuffer(content, np.uint8).reshape(count, *samples.shape)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{samples.path} is damaged ({error}); write it again") from None


def _open_folder(path: Path) -> Samples:
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    if jpegs := [name for name in names if name.lower().endswith(JPEG)]:
        raise DataError(
            f"{path} holds JPEG files ({jpegs[0]}): their compression moves the FID by more than "
            "models differ; save PNG or npz"
        )
    found = {}
    for name in names:
        if match := PNG_NAME.fullmatch(name):
            number = int(match[1])
            if number in found:
                raise DataError(f"{path} has sample {number} twice: {found[number][0]} and {name}")
            found[number] = name, match[2]
    if not found:
        raise DataError(
            f"{path} holds no samples: PNG files are called by their numbers, 000012.png or "
            "000012_0207.png with the class"
        )
    numbers = sorted(found)
    if numbers != list(range(len(numbers))):
        missing = next(n for n in range(len(numbers) + 1) if n not in found)
        raise DataError(
            f"{path} has {len(numbers)} samples up to number {numbers[-1]}, but none with number "
            f"{missing}: an interrupted or mixed set; draw the missing ones, or number from 0 on"
        )
    classes = [found[n][1] for n in numbers]
    labels = None if None in classes else np.array(list(map(int, classes)), np.int32)
    files = tuple(path / found[n][0] for n in numbers)
    with Image.open(files[0]) as image:
        shape = (image.height, image.width, 3)
    return Samples(path, len(files), shape, labels, "png", files)


def _read_png(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode != "RGB" or (image.height, image.width, 3) != shape:
                raise DataError(
                    f"{path} is {image.mode} {image.width} x {image.height}; the others are RGB "
                    f"{shape[1]} x {shape[0]}"
                )
            return np.asarray(image)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def samples_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files, in hexadecimal."""
    if path.is_file():
        return digest(path)
    hasher = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix == ".png":
            hasher.update(f"{file.name} {digest(file)}\n".encode())
    return hasher.hexdigest()


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Means and covariances of a set of images.

    Attributes:
      spaces: "pool", "spatial", "cls" -> (mean [d], covariance [d, d]), float64.
      count: images they are of; 0 where the file does not say.
      front_end: of the Inception network; "" where the file does not say.
      has_images: whether images lie beside them, for `open_samples`.
    """

    path: Path
    spaces: dict[str, tuple[np.ndarray, np.ndarray]]
    count: int
    front_end: str
    has_images: bool


def is_statistics(path: Path) -> bool:
    """Whether a file holds means and covariances; images may lie beside them."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix in (".pkl", ".pickle"):
        return True
    if path.suffix != ".npz":
        return False
    with _zip(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    return any(mean in names for pairs in KEYS.values() for mean, _ in pairs)


def load_statistics(path: Path) -> Statistics:
    """Of ADM's files, pytorch-fid's, MeanFlow's, EDM2's, or of `write_statistics`.

    ADM's are of TensorFlow's front end; what has nothing but a mean and a covariance is taken for
    pytorch-fid's.

    Raises:
      DataError: for a file that holds none, or other than a mean and a covariance.
    """
    path = Path(path)
    if path.suffix in (".pkl", ".pickle"):
        content = _unpickle(path)
        spaces = {
            ours: (content[theirs]["mu"], content[theirs]["sigma"])
            for theirs, ours in PICKLED.items()
            if isinstance(content.get(theirs), Mapping)
        }
        return Statistics(path, _valid(path, spaces), 0, "", has_images=False)
    try:
        with np.load(path, allow_pickle=False) as file:
            spaces = {
                space: (file[mean], file[covariance])
                for space, pairs in KEYS.items()
                for mean, covariance in pairs
                if mean in file.files and covariance in file.files
            }
            facts = json.loads(str(file["manifest"])) if "manifest" in file.files else {}
            has_images, names = "arr_0" in file.files, file.files
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    front_end = facts.get("front_end", "")
    if not front_end and "mu" in names:
        front_end = "tf" if "mu_s" in names else "pytorch_fid"
    return Statistics(path, _valid(path, spaces), facts.get("count", 0), front_end, has_images)


def _valid(path: Path, spaces: Mapping[str, tuple]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if not spaces:
        raise DataError(f"{path} holds no statistics: a mean (mu) and a covariance (sigma)")
    found = {}
    for name, pair in spaces.items():
        mean, covariance = (np.asarray(x, np.float64) for x in pair)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise DataError(
                f"{path}: {name} has a mean {list(mean.shape)} and a covariance "
                f"{list(covariance.shape)}; they must be [d] and [d, d]"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DataError(f"{path}: {name} has numbers that are not finite")
        largest = np.abs(covariance).max()
        if np.abs(covariance - covariance.T).max() > 1e-5 * largest:
            raise DataError(f"{path}: the covariance of {name} is not symmetric")
        found[name] = mean, covariance
    return found


class _Unpickler(pickle.Unpickler):
    """Arrays and plain containers; whatever else a pickle would call is refused, not called."""

    ALLOWED = frozenset(
        {
            *(("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")),
            *(("numpy._core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar")),
            *(("numpy._core.multiarray", "scalar"), ("collections", "OrderedDict")),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path: Path) -> Mapping:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises anything
        raise DataError(
            f"{path} cannot be read as a dict of arrays ({error}); save its mu and sigma as npz"
        ) from None
    if not isinstance(content, collections.abc.Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}, not a dict of statistics")
    return content


def write_samples(path: Path, batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """An ``.npz`` in the ADM evaluator's format, whole or not at all, never all in memory.

    Args:
      batches: uint8 [n, H, W, 3], as many images in all as there are labels.

    Raises:
      ValueError: if they are not.
    """
    with _replacing(path) as archive:
        _write_images(archive, batches, len(labels))
        _write_array(archive, "arr_1", labels)


def write_statistics(
    path: Path,
    spaces: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    count: int,
    front_end: str,
    facts: Mapping,
    images: np.ndarray | None = None,
) -> None:
    """A reference that `load_statistics` and ADM's evaluator read.

    Args:
      spaces: as of `Statistics`.
      count: images that they are of.
      facts: further entries of the manifest, JSON values.
      images: uint8 [k, H, W, 3] to lie beside them, for precision and recall.
    """
    manifest = json.dumps({**facts, "count": count, "front_end": front_end})
    with _replacing(path) as archive:
        for space, pair in spaces.items():
            for name, array in zip(KEYS[space][0], pair, strict=True):
                _write_array(archive, name, array)
        if images is not None:
            _write_images(archive, [images], len(images))
        _write_array(archive, "manifest", np.array(manifest))


class _replacing:
    """A zip file beside ``path`` that takes its place when all of it is written."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> zipfile.ZipFile:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        os.close(handle)
        self._temporary = Path(name)
        self._archive = zipfile.ZipFile(name, "w", allowZip64=True)
        return self._archive

    def __exit__(self, kind, *_):
        self._archive.close()
        if kind is None:
            self._temporary.chmod(0o644)
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink()


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def _write_images(archive: zipfile.ZipFile, batches: Iterable[np.ndarray], count: int) -> None:
    written = 0
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
        for images in batches:
            if not written:
                header = {"descr": "|u1", "fortran_order": False}
                shape = (count, *images.shape[1:])
                np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            file.write(np.ascontiguousarray(images, np.uint8))
            written += len(images)
    if written != count:
        raise ValueError(f"{written} images were given for {count} labels")
