"""Makes reconstruction.safetensors and lpips_heads.safetensors: what reference packages give.

Needs torch 2.13.0 (CPU), torchvision 0.28.0, torchmetrics 1.9.0, torch-fidelity 0.4.0, lpips 0.1.4,
scikit-image 0.26.0 and safetensors. To run it, from the root of the repository:

    python tests/golden/make_reconstruction.py
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from skimage import data as photographs

LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):  # torchvision for CUDA stops without them beside torch for the CPU
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import lpips  # noqa: E402
import torchvision.transforms as tv  # noqa: E402
from torch.nn.functional import interpolate  # noqa: E402
from torch_fidelity.interpolate_compat_tensorflow import (  # noqa: E402
    interpolate_bilinear_2d_like_tensorflow1x,
)
from torchmetrics.functional.image import (  # noqa: E402
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

HERE = Path(__file__).parent
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
# Photograph, its box (left, top, right, bottom) and the size of the crop: shrunk and enlarged,
# upright and lying, with offsets that end in 1/2 on both sides of an even number.
CROPS = {
    "astronaut": ("astronaut", (0, 0, 512, 512), 32),
    "chelsea": ("chelsea", (0, 0, 451, 300), 40),
    "coffee": ("coffee", (0, 0, 600, 400), 26),
    "coffee_odd": ("coffee", (0, 0, 600, 400), 30),
    "upright": ("coffee", (10, 0, 211, 341), 33),
    "enlarged": ("chelsea", (100, 50, 143, 80), 40),
    "same": ("chelsea", (100, 50, 131, 74), 24),
}
ROWS = slice(3, None, 37)  # those that are kept of resized images


def noise(seed, *shape):
    """uint8 of numpy's frozen generator."""
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last(x):
    return np.ascontiguousarray(np.moveaxis(x.numpy(), 1, -1))


def similarity():
    """Clean crops, reconstructions beyond [-1, 1] and what torchmetrics says of them."""
    boxes = (photographs.astronaut()[60:108, 180:236], photographs.coffee()[120:168, 300:356])
    clean = np.stack([*boxes, photographs.chelsea()[100:148, 120:176]])
    values = clean.astype(np.float32) / 127.5 - 1
    waves = np.sin(np.arange(values.size) * 1.7).reshape(values.shape) * 0.1
    scale = np.array([0.5, 1, 3])[:, None, None, None]
    reconstruction = (1.1 * values + scale * waves).astype(np.float16)
    assert np.abs(reconstruction).max() > 1.2
    a = first(reconstruction.astype(np.float32))
    b = first(values)
    levels = first(
        np.clip(127.5 * reconstruction.astype(np.float32) + 128, 0, 255).astype(np.uint8)
    )
    unit, target = levels.float() / 255, first(clean).float() / 255

    def ssim(a, b, data_range):
        return structural_similarity_index_measure(a, b, data_range=data_range, reduction="none")

    return {
        "ssim.clean": clean,
        "ssim.reconstruction": reconstruction,
        "ssim.signed": ssim(a, b, (-1.0, 1.0)).numpy(),
        "ssim.unit": ssim(unit, target, 1.0).numpy(),
        "psnr.pooled": peak_signal_noise_ratio(unit, target, data_range=1.0).numpy()[None],
    }


def crops():
    found = {}
    for key, (photograph, box, size) in CROPS.items():
        image = Image.fromarray(getattr(photographs, photograph)()).crop(box)
        steps = [tv.ToTensor(), tv.Resize(size), tv.CenterCrop(size), tv.Normalize([0.5], [0.5])]
        found[f"crop.{key}"] = last(tv.Compose(steps)(image)[None])[0]
    return found


def resizes():
    """Front ends of Inception, the antialiased bicubic resize, and what DINOv2 is shown."""
    found = {}
    for size in (64, 256, 512):
        x = first(noise(size, 1, size, size, 1)).float()
        tf = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
        half = interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        found[f"tf.{size}"] = last(tf)[0, ROWS, :, 0]
        found[f"half_pixel.{size}"] = last(half)[0, ROWS, :, 0]
    for size in (256, 100):
        x = first(noise(size, 1, size, size, 1)).float()
        x = interpolate(x, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
        found[f"bicubic.{size}"] = last(x)[0, ROWS, :, 0]
    table = torch.from_numpy(np.random.RandomState(0).randn(1, 4, 37, 37).astype(np.float32))
    for grid in ((16, 16), (11, 45)):
        x = interpolate(table, size=grid, mode="bicubic", align_corners=False)
        found[f"positions.{grid[0]}x{grid[1]}"] = last(x)[0]
    steps = tv.Compose(
        [
            tv.Resize((224, 224), tv.InterpolationMode.BICUBIC),
            tv.ToTensor(),
            tv.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    images = {"astronaut": photographs.astronaut()[100:356, 100:356]}
    images["noise"] = noise(1, 150, 224, 3)
    for key, image in images.items():
        found[f"dinov2.{key}"] = last(steps(Image.fromarray(image))[None])[0, ROWS]
    return found


def trunk(config):
    """The weights that lpips_vgg.safetensors states by a formula, by lpips's names."""
    shapes = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).state_dict()
    found = {}
    for index, name in enumerate(config["weight_order"]):
        if name.startswith("net"):
            shape = shapes[name].shape
            angles = np.arange(1, shape.numel() + 1) * 12.9898 + (index + config["seed"]) * 78.233
            v = np.modf(np.sin(angles) * 43758.5453)[0].reshape(shape)
            scale = 0.05 if v.ndim == 1 else np.sqrt(6 / v[0].size)
            found[name] = torch.from_numpy((v * scale).astype(np.float32))
    return found


def heads():
    """lpips's own heads, and its distances with them on the trunk and images of lpips_vgg."""
    path = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    with safe_open(HERE / "lpips_vgg.safetensors", "numpy") as file:
        config = json.loads(file.metadata()["config"])
    io = load_file(HERE / "lpips_vgg.safetensors")
    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    left = model.load_state_dict(trunk(config), strict=False)
    assert not left.unexpected_keys
    assert not any(name.startswith("net") for name in left.missing_keys)
    with torch.no_grad():
        distance = model(*(torch.from_numpy(io[f"io.{name}"]) for name in "ab")).flatten().numpy()
    own = {f"lin{n}.model.1.weight": model.state_dict()[f"lin{n}.model.1.weight"] for n in range(5)}
    arrays = {name: value.numpy() for name, value in own.items()} | {"distance": distance}
    licence = next(Path(lpips.__file__).parents[1].glob("lpips-0.1.4*/**/LICENSE")).read_text()
    facts = {
        "source": "lpips 0.1.4, lpips/weights/v0.1/vgg.pth (Zhang et al. 2018)",
        "md5": hashlib.md5(path.read_bytes()).hexdigest(),
        "licence": licence,
    }
    save_file(arrays, HERE / "lpips_heads.safetensors", metadata=facts)


def main():
    heads()
    arrays = similarity() | crops() | resizes()
    # safetensors writes the memory of an array, not what strides make of it
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    packages = ("torch", "torchvision", "torchmetrics", "torch-fidelity", "scikit-image", "pillow")
    digests = {
        name: hashlib.sha256(getattr(photographs, name)().tobytes()).hexdigest()
        for name in PHOTOGRAPHS
    }
    metadata = {
        "versions": json.dumps({name: version(name) for name in packages}),
        "crops": json.dumps(CROPS),
        "photographs": json.dumps(digests),
    }
    save_file(arrays, HERE / "reconstruction.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
