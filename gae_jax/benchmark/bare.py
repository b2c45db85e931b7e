"""A process that only decodes and crops images, as a baseline for the data pipeline.

``python -c "from gae_jax.benchmark.bare import main; main()" CROP SIZE FIRST FILE...`` prints
"ready", then answers each line "N" on its input, a number of images, with seconds of CPU time.
"""

import io
import itertools
import sys
import time

import numpy as np

from gae_jax.data.decoding import decode
from gae_jax.data.images import center_crop, random_crop


def cut(content: bytes, crop: str, size: int, seed: int) -> np.ndarray:
    """Decode and crop an image to uint8 [size, size, 3], as the pipeline does in training."""
    image = decode(io.BytesIO(content))
    if crop == "center":
        return np.ascontiguousarray(center_crop(image, size))
    rng = np.random.default_rng(seed)
    pixels = random_crop(image, size, rng)
    # the view is copied here; in the pipeline when the batch is made
    return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def main() -> None:
    """Answer lines until the input ends."""
    crop, size, first, *paths = sys.argv[1:]
    files = itertools.islice(itertools.cycle(enumerate(paths)), int(first), None)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.process_time()
        for seed, path in itertools.islice(files, int(line)):
            with open(path, "rb") as file:
                cut(file.read(), crop, int(size), seed)
        print(time.process_time() - start, flush=True)
