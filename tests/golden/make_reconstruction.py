"""Makes reconstruction.safetensors: SSIM of torchmetrics, crops and resizes of torchvision.

    python tests/golden/make_reconstruction.py

Needs torch 2.13.0, torchvision 0.28.0 and torchmetrics 1.9.0; images are random and smooth.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file

# lets torchvision for CUDA be imported by torch for the CPU; none of its operators are called
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchmetrics  # noqa: E402
from torchvision.transforms import v2  # noqa: E402


def smooth(rng, *shape):
    """Random images with structure at several scales, uint8 [n, h, w, 3]."""
    n, h, w = shape
    total = np.zeros((n, h, w, 3))
    for scale in (1, 4, 16):
        size = (-(-h // scale), -(-w // scale))
        coarse = rng.normal(size=(n, *size, 3)).repeat(scale, 1).repeat(scale, 2)[:, :h, :w]
        total += coarse * scale**0.5 * 12
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def main():
    rng = np.random.default_rng(0)
    images = smooth(rng, 3, 40, 48)
    real = images.astype(np.float32) / 127.5 - 1
    found = (real * 1.05 + rng.normal(size=real.shape) * 0.1).astype(np.float32)  # beyond [-1, 1]
    out = {"images": images, "found": found}

    each = torchmetrics.image.StructuralSimilarityIndexMeasure(
        data_range=(-1.0, 1.0), reduction="none"
    )
    out["ssim_signed"] = each(channels_first(found), channels_first(real)).numpy()
    pixels = np.clip(127.5 * found + 128, 0, 255).astype(np.uint8)
    unit = torchmetrics.image.StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    out["ssim_unit"] = unit(
        channels_first(pixels.astype(np.float32) / 255),
        channels_first(images.astype(np.float32) / 255),
    ).numpy()
    out["psnr_of_all"] = np.array(
        [torchmetrics.image.PeakSignalNoiseRatio(data_range=255.0)(
            channels_first(pixels).float(), channels_first(images).float()
        )],
        np.float32,
    )  # fmt: skip

    for name, size in (("wide", (75, 131)), ("tall", (150, 67)), ("small", (30, 41))):
        photo = smooth(rng, 1, *size)[0]
        crop = v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Resize(32, interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
                v2.CenterCrop(32),
            ]
        )
        found = crop(Image.fromarray(photo)).numpy()
        out[f"{name}_photo"], out[f"{name}_crop"] = photo, 2 * np.moveaxis(found, 0, -1) - 1
    save_file(out, Path(__file__).with_name("reconstruction.safetensors"))


main()
