"""The type of a file of weights by its first bytes, whatever its name."""

from pathlib import Path

from gae_jax.runtime.errors import UserError

TORCH_ZIP, TORCH_PICKLE, SAFETENSORS, JSON, UNKNOWN = (
    "torch zip",
    "torch pickle",
    "safetensors",
    "json",
    "unknown",
)
AGAIN = "download or write it again"
# First bytes of files that people pass instead of weights, and the remedy.
FOREIGN = (
    (
        b"version https://git-lfs",
        (
            "is a pointer of Git LFS, not the file itself; run `git lfs pull` where it was cloned, "
            "or download the file itself"
        ),
    ),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first (gunzip)"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first (unzstd)"),
    (b"\x89HDF", "is an HDF5 file; convert it to .safetensors"),
    (b"GGUF", "is a GGUF file, whose tensors are quantised; take the .safetensors of the model"),
    (b"\x93NUMPY", "is one array of numpy; save a dictionary of named tensors as .safetensors"),
)
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")


class WeightFileError(UserError):
    """A file of weights that cannot be read, or does not hold what was asked for."""


def kind_of_file(path: Path) -> str:
    """Return `TORCH_ZIP`, `TORCH_PICKLE`, `SAFETENSORS`, `JSON` or `UNKNOWN`.

    Raises:
      WeightFileError: if the file is missing, is empty, may not be read, or is one of the things
        that people pass instead of weights, with the remedy.
    """
    try:
        if not path.is_file():
            raise WeightFileError(f"{path} is {'a folder' if path.is_dir() else 'no file'}")
        with path.open("rb") as file:
            start = file.read(512)
            if start[257:262] == b"ustar":
                raise WeightFileError(
                    f"{path} is a tar archive; unpack it, and pass the path of the file of "
                    "weights inside"
                )
        size = path.stat().st_size
    except OSError as error:
        raise WeightFileError(f"{path} cannot be read: {error.strerror or error}") from None
    if not start:
        raise WeightFileError(f"{path} is empty; {AGAIN}")
    # first of all: the length of its header, with which it begins, may look like any signature
    is_complete = int.from_bytes(start[:8], "little") <= size - 8
    if start[8:9] == b"{" and (is_complete or path.suffix == ".safetensors"):
        return SAFETENSORS
    for signature, what in FOREIGN:
        if start.startswith(signature):
            raise WeightFileError(f"{path} {what}")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith(PAGES):
        raise WeightFileError(
            f"{path} is a web page, not weights: the address that it was downloaded from shows a "
            "page (of a login, a licence or an error); download it again from the address of the "
            "file itself"
        )
    if start.startswith(b"PK"):
        return TORCH_ZIP
    if start.startswith(b"\x80"):
        return TORCH_PICKLE
    if not start.strip(b"\0"):
        raise WeightFileError(
            f"{path} begins with zeros: its download was not finished; download it again"
        )
    return JSON if text.startswith((b"{", b"[")) else UNKNOWN
