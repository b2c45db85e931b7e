"""Class folders of crops from the photographs that scikit-image and scikit-learn bring along.

    python launch/photographs.py FOLDER [--count=100] [--size=256]

A dozen real photographs are no training set; they serve to try a full-size config on an
accelerator where no other images can be had.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

NAMES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "rocket", "retina")


def photographs() -> dict[str, np.ndarray]:
    """Name -> RGB image [H, W, 3] uint8."""
    found = {name: getattr(data, name)() for name in NAMES}
    return found | dict(zip(("china", "flower"), load_sample_images().images, strict=True))


def positive(text: str) -> int:
    """Parse an integer from 1 to 100,000."""
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not an integer from 1 to 100,000")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=positive, default=100, help="crops of each photograph")
    parser.add_argument("--size", type=positive, default=256, help="pixels of a crop's side")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for name, pixels in photographs().items():
        (arguments.folder / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        for index in range(arguments.count):
            side = int(rng.uniform(0.5, 1) * min(image.size))
            left, top = (int(rng.integers(0, edge - side + 1)) for edge in image.size)
            crop = image.crop((left, top, left + side, top + side))
            crop = crop.resize((arguments.size, arguments.size), Image.Resampling.BICUBIC)
            crop.save(arguments.folder / name / f"{index:04}.png")


if __name__ == "__main__":
    main()
