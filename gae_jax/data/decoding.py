"""Encoded images to RGB pixels."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image

# What PIL and ArrayRecord raise of content that they cannot read.
UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels; transparent ones are laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def decode(content: Path | BinaryIO) -> Image.Image:
    """The RGB pixels of an encoded image.

    Args:
      content: a path or a file.

    Raises:
      One of `UNREADABLE`.
    """
    with Image.open(content) as image:
        return to_rgb(image)
