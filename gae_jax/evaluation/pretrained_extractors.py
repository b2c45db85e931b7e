"""Frechet distances in the features of ImageNet networks that a registry package brings.

They are not FID: a different network gives different numbers.
"""

import jax
import jax.numpy as jnp

from gae_jax.evaluation.extractors import Extractor
from gae_jax.nn.network import Arrays, Network
from gae_jax.nn.pixels import to_float
from gae_jax.nn.positions import resize_images

SIZE = 224  # pixels that EfficientNet-Lite0 was trained with


def efficientnet_extractor(network: Network, arrays: Arrays, *, digest: str) -> Extractor:
    """Return `EfficientNetLite0`: "pool" [B, 1280], its classifier's input, and "logits" [B, 1000].

    Images are resized on the device (bicubic, antialiased, not rounded to 8 bits).
    """

    def run(arrays, images):
        with jax.default_matmul_precision("highest"):
            model = network(*arrays)
            resized = resize_images(to_float(images), SIZE, antialias=True)
            pooled = model.pooled((resized * 127.5 + 0.5) / 128)  # (x - 127) / 128
            return {"pool": pooled, "logits": model.fc(pooled).astype(jnp.float32)}

    return Extractor("efficientnet_lite0", digest, "bicubic 224 on the device", run, arrays)


def vgg16_extractor(network: Network, arrays: Arrays, *, digest: str) -> Extractor:
    """Return the VGG16 inside `LPIPS`: "pool" [B, 512], the mean of relu5_3 over positions.

    Images are taken as they are, as LPIPS takes them.
    """

    def run(arrays, images):
        maps = network(*arrays).features(to_float(images))
        return {"pool": jnp.mean(maps[-1].astype(jnp.float32), axis=(1, 2))}

    return Extractor("vgg16", digest, "as they are", run, arrays)
