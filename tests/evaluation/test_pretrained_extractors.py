"""Features of ImageNet networks that Frechet distances are of."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from gae_jax.evaluation.pretrained_extractors import SIZE, efficientnet_extractor, vgg16_extractor
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import to_float
from gae_jax.nn.positions import resize_images
from gae_jax.pretrained.efficientnet import EfficientNetLite0
from gae_jax.pretrained.lpips import LPIPS

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def resized(images):
    """As the extractor of EfficientNet-Lite0 resizes uint8 images."""
    return resize_images(to_float(images), SIZE, antialias=True)


def drawn(network):
    """Arrays of this network: kernels that keep the size of what they are given, variances of 1.

    Its own initialisation takes longer to compile than the network itself.
    """
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if len(leaf.shape) > 1:
            return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(leaf.dtype)
        name = path[-1].key
        return np.full(leaf.shape, name in ("weight", "running_var"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, network.abstract)


def test_images_are_resized_as_pillow_resizes_floats():
    found = resized(jnp.asarray(IMAGES))
    for image, ours in zip(IMAGES, found, strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            expected = np.asarray(plane.resize((224, 224), Image.Resampling.BICUBIC)) / 127.5 - 1
            np.testing.assert_allclose(ours[..., channel], expected, atol=2e-5)


def test_efficientnet_sees_pixels_as_it_was_trained_and_gives_logits_of_its_pool():
    network = Network(lambda rngs: EfficientNetLite0(rngs=rngs))
    arrays = drawn(network)
    extractor = efficientnet_extractor(network, arrays, digest="x")
    found = jax.jit(extractor.run)(arrays, jnp.asarray(IMAGES))
    levels = (resized(jnp.asarray(IMAGES)) + 1) * 127.5
    expected = jax.jit(lambda a, x: network(*a).pooled(x))(arrays, (levels - 127) / 128)
    np.testing.assert_allclose(found["pool"], expected, rtol=1e-3, atol=1e-4)
    assert found["pool"].shape == (2, 1280)
    assert found["logits"].shape == (2, 1000)
    assert extractor.facts()["front_end"] == "bicubic 224 on the device"


def test_vgg16_gives_the_mean_of_its_last_slice():
    network = Network(lambda rngs: LPIPS(rngs=rngs))
    arrays = drawn(network)
    extractor = vgg16_extractor(network, arrays, digest="x")
    found = jax.jit(extractor.run)(arrays, jnp.asarray(IMAGES))["pool"]
    maps = jax.jit(lambda a, x: network(*a).features(x / 127.5 - 1.0))(arrays, jnp.asarray(IMAGES))
    assert found.shape == (2, 512)
    np.testing.assert_allclose(found, np.asarray(maps[-1]).mean(axis=(1, 2)), rtol=1e-4, atol=1e-6)
