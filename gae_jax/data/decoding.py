"""Decoding of images to RGB pixels."""

import io
import os
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

# Keys of a decoded image's info: a function that returns the name of its file, and whether its EXIF
# orientation says that it is not upright.
CALLED, TURNED = "called", "turned"
EXIF = ("ignore", "apply")
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x112, 258, 262
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # orientation -> transposition that makes the image upright
MOST_BYTES = 2 << 30  # 179 million pixels of 8 bytes each are 1.4e9
_HEAD = 256  # first bytes, by which a file that is not an image is recognised

# PIL warns of odd metadata and large images once per text: a line for every other file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableError(ValueError):
    """Content that is not an image, or an image that cannot be decoded."""


def grey_levels(image: Image.Image) -> Image.Image:
    """Convert grey levels of more than 8 bits to 8 bits, mode L; black and white are preserved.

    Raises:
      UnreadableError: for samples of 32 bits, integer or float, whose white level is unknown.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and tags):
        kind = "float" if image.mode == "F" else "signed or 32-bit integer"
        raise UnreadableError(
            f"its samples are {kind}, whose white is not known; convert it to 8 or 16 bits"
        )
    bits = tags.get(_BITS, (16,))
    white = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
    levels = np.clip(np.asarray(image).astype(np.int64), 0, white)
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0; PIL inverts that for 8 bits only
        levels = white - levels
    grey = Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # of PNG: one level
        mask = Image.fromarray(np.asarray(image) == transparent)
        grey.paste(255, mask=mask)
    return grey


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; transparent pixels are composited on white.

    Raises:
      UnreadableError: as `grey_levels`.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return grey_levels(image).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 if there is none or it is damaged."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
    except Exception:  # on damaged EXIF PIL raises anything
        return 1
    return orientation if isinstance(orientation, int) else 1


def decode(content: Path | BinaryIO, *, exif: str = "ignore") -> Image.Image:
    """Decode an image to RGB, the first frame if there are several.

    Its ``info`` holds `TURNED` only.

    Args:
      content: a path or a file.
      exif: "ignore", or "apply" to rotate the image by its EXIF orientation. (The orientation in
        TIFF's own tags is always applied, by PIL.)

    Raises:
      UnreadableError: if the content is damaged or not an image, or has more than PIL's limit of
        some 179 million pixels.
      MemoryError: if the pixels do not fit into memory.
    """
    try:
        if isinstance(content, Path):
            content = _read(content)
        with Image.open(content) as image:
            if min(image.size) < 1:
                raise UnreadableError(f"it has {image.width} x {image.height} pixels")
            pixels = to_rgb(image)
            orientation = _orientation(image)  # after decoding: PNG may store it behind the pixels
            if exif == "apply" and orientation in _UPRIGHT:
                pixels = pixels.transpose(_UPRIGHT[orientation])
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # on damaged content decoders raise anything
        raise UnreadableError(_reason(content, error)) from error
    pixels.info = {TURNED: orientation in _UPRIGHT}
    return pixels


def _read(path: Path) -> BinaryIO:
    """Read a file into memory.

    PIL reads as many bytes from a file as a damaged length field claims, and Python allocates
    memory for all of them first; a file in memory is bounded.

    Raises:
      UnreadableError: if the file is larger than `MOST_BYTES`.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise UnreadableError(
                f"it has {size:,} bytes, more than any image of PIL's limit of pixels"
            )
        return io.BytesIO(file.read())


def _reason(content: Path | BinaryIO, error: Exception) -> str:
    """Say why content cannot be read, recognising the usual kinds of wrong files."""
    if isinstance(error, Image.DecompressionBombError):
        return f"{str(error).split(',')[0]}, so it may be a decompression bomb"
    if isinstance(error, OSError) and error.errno:
        return str(error)
    try:
        if isinstance(content, Path):
            with content.open("rb") as file:
                head = file.read(_HEAD)
        else:
            content.seek(0)
            head = content.read(_HEAD)
    except (OSError, ValueError):
        return str(error)
    start = head.lstrip().lower()
    if not head:
        return "the file is empty"
    if not any(head):
        return "the file begins with zeros, as one that was not written to its end"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS and not the image; fetch it with: git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "it is HTML or XML, such as the error page of a server, and not an image"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, struct.error | IndexError | KeyError | EOFError | AttributeError):
        return f"damaged: {type(error).__name__}: {error}"
    return str(error) or type(error).__name__
