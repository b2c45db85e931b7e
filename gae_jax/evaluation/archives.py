"""Files of samples and of reference statistics, read and written as streams.

Samples are an npz in the format of ADM's evaluator (``arr_0`` uint8 [N, H, W, 3], ``arr_1``
labels), an npy file, or a folder of PNG files named by the global id of their sample. Never JPEG:
its compression moves the FID.
"""

import hashlib
import io
import itertools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from gae_jax.evaluation.image_zip import (
    ZIP,
    check_images,
    images_header,
    new_archive,
    reading,
    start_of,
    write_array,
    write_images,
)
from gae_jax.evaluation.stored_statistics import (
    has_statistics,
    is_statistics,
)
from gae_jax.interop.files import digest
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import explained, read_json, read_member

NPY, PNG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"  # how files begin
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
PNG_NAME = re.compile(r"(\d+)(?:_(\d+))?\.png", re.IGNORECASE)


@dataclass(frozen=True)
class Samples:
    """Images of one archive; `open_samples` makes it and reads none of them.

    Attributes:
      path: the file or folder.
      count: number of images.
      shape: (H, W, 3).
      labels: int32 [count] in the order of the images, or None.
      kind: "npz", "npy" or "png".
      files: of a folder, in the order of the images.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    kind: str
    files: tuple[Path, ...] = field(default=(), repr=False)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield uint8 [n, H, W, 3] in the order of the file, n <= size; of an npz read-only.

        Raises:
          DataError: where the file turns out to be damaged; for an npz also at its end, when the
            checksum is known.
        """
        if size < 1:
            raise DataError(f"batches of {size} images; the size must be at least 1")
        sizes = [min(size, self.count - first) for first in range(0, self.count, size)]
        read = {"npz": self._from_npz, "npy": self._from_npy, "png": self._from_png}
        return read[self.kind](sizes)

    def _from_npz(self, sizes):
        with (
            reading(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open("arr_0.npy") as file,
        ):
            images_header(file, self.path, "arr_0")
            for n in sizes:
                content = file.read(n * int(np.prod(self.shape)))
                yield np.frombuffer(content, np.uint8).reshape(n, *self.shape)

    def _from_npy(self, sizes):
        with reading(self.path):
            images = np.load(self.path, mmap_mode="r", allow_pickle=False)
            for first, end in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
                yield np.array(images[first:end])

    def _from_png(self, sizes):
        files = iter(self.files)
        for n in sizes:
            yield np.stack([_read_png(path) for path in itertools.islice(files, n)])


def open_samples(path: Path) -> Samples:
    """Open the samples of an npz, an npy file or a folder of PNG files.

    A folder may also be one that `sample` left: of its stage, with samples.npz, or of ``sample
    RUN``, whose manifest lists the images. An npz is streamed from its zip. Another
    folder has ``000012.png`` or ``000012_0207.png``: the global id, from 0 without
    gaps, then the label if all names have one.

    Raises:
      DataError: naming the file, what is wrong and the remedy: JPEG, other than 8-bit RGB, mixed
        sizes, gaps or ids given twice, no images, a damaged file, a file of statistics.
    """
    path = file_of(path)
    if path.is_dir():
        return _open_folder(path)
    start = start_of(path)
    if start.startswith(ZIP):
        return _open_npz(path)
    if start.startswith(NPY):
        with reading(path):
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        count, height, width, _ = check_images(path, images.shape, images.dtype)
        return Samples(path, count, (height, width, 3), None, "npy")
    what = "statistics, not samples" if is_statistics(path) else "neither an npz nor an npy file"
    raise DataError(
        f"{path} is {what}; give an npz with arr_0 [N, H, W, 3], an npy file, or a folder of PNGs"
    )


def file_of(path: Path) -> Path:
    """Return the npz or folder with the images of a path that a user gives: a file or a folder.

    Raises:
      DataError: for a folder that holds several sets, or a set in two forms, naming them.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / "samples.npz").is_file():
        if images := [file for file in path.iterdir() if PNG_NAME.fullmatch(file.name)]:
            raise DataError(
                f"{path} holds samples.npz and {len(images)} images such as {images[0].name}, "
                f"which need not be the same; give {path / 'samples.npz'}, or move that file away"
            )
        return path / "samples.npz"
    if any(path.glob("*.png")):
        return path
    sets = [file.parent for file in sorted(path.glob("*/samples.npz"))]
    # samples/ in runs of earlier versions
    sets += [file.parent for file in sorted(path.glob("sample*/*/samples.npz"))]
    sets += [file.parent for file in sorted(path.glob("drawn/*/manifest.json"))]
    if len(sets) > 1:
        raise DataError(f"{path} holds several sets; give one of {', '.join(map(str, sets))}")
    return file_of(sets[0]) if sets else path


def samples_digest(path: Path) -> str:
    """Return the SHA-256 of an archive, or of the names and contents of a folder's images."""
    path = file_of(path)
    if not path.is_dir():
        start_of(path)
        return digest(path)
    names_and_contents = hashlib.sha256()
    for file in _open_folder(path).files:
        names_and_contents.update(f"{file.name} {digest(file)}\n".encode())
    return names_and_contents.hexdigest()


def _open_npz(path: Path) -> Samples:
    with reading(path), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in keys:
            what = "it is a file of statistics, not of samples" if has_statistics(keys) else (
                "name the images arr_0"
            )  # fmt: skip
            raise DataError(f"{path} has no arr_0 but {sorted(keys)}; {what}")
        with archive.open("arr_0.npy") as file:
            shape, dtype = images_header(file, path, "arr_0")
            count, height, width, _ = check_images(path, shape, dtype, "arr_0")
            promised = archive.getinfo("arr_0.npy").file_size - file.tell()
            if promised != np.prod(shape, dtype=np.int64):
                raise ValueError(f"arr_0 of shape {list(shape)} has {promised} bytes")
        labels = None
        if "arr_1" in keys:
            labels = read_member(archive, "arr_1.npy")
    if labels is not None and labels.shape == shape[:1]:
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{path}: arr_1 is {labels.dtype}; save labels as integers")
        labels = labels.astype(np.int32)
    else:
        labels = None
    return Samples(path, count, (height, width, 3), labels, "npz")


def _open_folder(path: Path) -> Samples:
    if listed := _listed(path):
        return listed
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    names = [name for name in names if not name.startswith(".")]  # of systems, as macOS's ._NAME
    if lossy := [name for name in names if name.lower().endswith(LOSSY)]:
        raise DataError(
            f"{path} has {len(lossy)} JPEG or WebP files such as {lossy[0]}: compression moves the "
            "FID; save PNG or npz"
        )
    names = [name for name in names if name.lower().endswith(".png")]
    matches = [match for name in names if (match := PNG_NAME.fullmatch(name))]
    odd = [name for name in names if not PNG_NAME.fullmatch(name)]
    if not names or odd:
        what = f"a PNG file {odd[0]} without a global id" if odd else "no PNG files"
        raise DataError(
            f"{path} has {what}; name samples 000012.png, or 000012_0207.png with the label"
        )
    ids = np.array([int(match[1]) for match in matches])
    order = np.argsort(ids, kind="stable")
    for expected, i in enumerate(order):
        if ids[i] != expected:
            what = f"no sample {expected}" if ids[i] > expected else f"sample {ids[i]} twice"
            raise DataError(
                f"{path} has {what} ({len(ids)} files, ids {ids.min()} to {ids.max()}); the ids "
                "must be 0 to N - 1, each once: draw what is missing, or remove the other set"
            )
    labelled = [bool(match[2]) for match in matches]
    if any(labelled) and not all(labelled):
        without, having = names[labelled.index(False)], names[labelled.index(True)]
        raise DataError(
            f"{path}: {without} has no label and {having} has one; the folder mixes two sets, keep "
            "one"
        )
    labels = np.array([int(matches[i][2]) for i in order], np.int32) if all(labelled) else None
    files = tuple(path / names[i] for i in order)
    return Samples(path, len(files), _common_shape(files), labels, "png", files)


def _listed(path: Path) -> Samples | None:
    """Return the images that a manifest of ``sample RUN`` lists; None without such a manifest.

    Raises:
      DataError: if they are not all there.
    """
    manifest = path / "manifest.json"
    content = read_json(manifest) if manifest.is_file() else None
    if not isinstance(content, dict) or not isinstance(content.get("files"), list):
        return None
    with explained(manifest, "run `sample RUN` again"):
        if odd := [name for name in content["files"] if Path(str(name)).name != name]:
            raise ValueError(f"{str(odd[0])[:60]!r} is no name of a file next to it")
        files = tuple(path / name for name in content["files"])
        missing = [file.name for file in files if not file.is_file()]
    if missing or not files or not content.get("finished", True):
        what = f"{len(missing)} of {len(files)} images are missing" + (
            f", such as {missing[0]}" if missing else ""
        )
        raise DataError(f"{manifest}: the set is incomplete: {what}; run `sample RUN` again")
    with explained(manifest, "run `sample RUN` again"):
        labels = content.get("labels", [])
        known = len(labels) == len(files) and all(isinstance(label, int) for label in labels)
        classes = np.array(labels, np.int32) if known else None
    return Samples(path, len(files), _common_shape(files), classes, "png", files)


def _common_shape(files: tuple[Path, ...]) -> tuple[int, int, int]:
    """Read (H, W, 3) of PNG files from their headers; raises DataError for several sizes."""
    shape = _png_shape(files[0])
    for file in files[1:]:
        if (other := _png_shape(file)) != shape:
            raise DataError(
                f"{file} is {other[0]} x {other[1]}, {files[0].name} is {shape[0]} x {shape[1]}; "
                "all samples must be of one size"
            )
    return shape


def _png_shape(path: Path) -> tuple[int, int, int]:
    """Read (H, W, 3) from a PNG's header; Pillow would silently turn 16 bits into 8."""
    with path.open("rb") as file:
        header = file.read(26)
    if len(header) < 26 or not header.startswith(PNG):
        jpeg = header.startswith(b"\xff\xd8")
        what = "a JPEG file by its content" if jpeg else "an incomplete PNG"
        raise DataError(f"{path} is {what}; save the sample as PNG")
    width, height, depth, colour = struct.unpack(">IIBB", header[16:26])
    if (depth, colour) != (8, 2):
        kind = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}.get(colour, "?")
        raise DataError(f"{path} is {kind} of {depth} bits; save RGB of 8 bits (uint8)")
    return height, width, 3


def _read_png(path: Path) -> np.ndarray:
    try:
        # of a file PIL takes the memory that a damaged length asks for
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); draw it again") from None


def write_samples(
    path: Path, batches: np.ndarray | Iterable[np.ndarray], labels: np.ndarray | None = None
) -> None:
    """Write an npz in the format of ADM's evaluator, not compressed, atomically.

    Args:
      batches: iterable of uint8 [n, H, W, 3], or one array or memory map of them all. Without
        labels an iterable goes through a scratch file, since its length is written first.
      labels: integers [N] in the order of the images, written as ``arr_1`` in their dtype.

    Raises:
      DataError: for other images, of several sizes or none, or not one label per image.
    """
    path = Path(path)
    if labels is not None:
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
            raise DataError(
                f"{path}: labels are {labels.dtype} {list(labels.shape)}; give integers [N]"
            )
    with new_archive(path) as archive:
        write_images(archive, path, batches, None if labels is None else len(labels))
        if labels is not None:
            write_array(archive, "arr_1", labels)
