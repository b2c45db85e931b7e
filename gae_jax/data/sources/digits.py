"""scikit-learn's handwritten digits."""

import numpy as np
from PIL import Image

from gae_jax.data.contents import Contents, counted
from gae_jax.data.sources.base import select


class Digits:
    """scikit-learn's 1,797 handwritten digits (UCI, 8 x 8, 17 grey levels), bundled with it.

    The 8 x 8 images are enlarged (bicubic) to ``size`` pixels and repeated over RGB.
    """

    def __init__(self, split: str, *, holdout: float = 0.2, size: int = 32):
        from sklearn.datasets import load_digits  # importing it takes a second

        data = load_digits()
        self._chosen = select(data.target, split, holdout)
        self._grey = np.round(data.images[self._chosen] * (255 / 16)).astype(np.uint8)
        self.labels = data.target[self._chosen]
        self._repr = f"Digits({split!r}, holdout={holdout}, size={size})"
        self._size = size
        self.class_names = [str(name) for name in data.target_names]
        self.contents = Contents.of(
            counted(data.target, self.class_names), facts=f"{self._size} {data.data.sum()}"
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        image = Image.fromarray(self._grey[index])
        image = image.resize((self._size, self._size), resample=Image.Resampling.BICUBIC)
        return {"image": image.convert("RGB"), "label": int(self.labels[index])}

    def __repr__(self) -> str:
        return self._repr
