"""EfficientNet-Lite0 against an independent fp64 computation, and as a backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.config import default_config
from gae_jax.config.validate import validate
from gae_jax.interop.convert import export_torch, import_torch
from gae_jax.interop.vision_tables import EFFICIENTNET
from gae_jax.nn.network import Network
from gae_jax.pretrained.backbone import backbone_shape
from gae_jax.pretrained.efficientnet import EfficientNetBackbone, EfficientNetLite0
from gae_jax.runtime.errors import ConfigError

# (kernel, stride, expansion, in, out) of every block, written out from the network's description.
BLOCKS = (
    (3, 1, 1, 32, 16),
    *((3, 2, 6, 16, 24), (3, 1, 6, 24, 24)),
    *((5, 2, 6, 24, 40), (5, 1, 6, 40, 40)),
    *((3, 2, 6, 40, 80), (3, 1, 6, 80, 80), (3, 1, 6, 80, 80)),
    *((5, 1, 6, 80, 112), (5, 1, 6, 112, 112), (5, 1, 6, 112, 112)),
    *((5, 2, 6, 112, 192), (5, 1, 6, 192, 192), (5, 1, 6, 192, 192), (5, 1, 6, 192, 192)),
    (3, 1, 6, 192, 320),
)


def random_tensors() -> dict[str, np.ndarray]:
    """A state dict with the released names, whose activations stay of the order of 1."""
    rng, tensors = np.random.default_rng(0), {}

    def conv(name, out, width, kernel):
        scale = (width * kernel * kernel) ** -0.5
        shape = (out, width, kernel, kernel)
        tensors[f"{name}.weight"] = (rng.standard_normal(shape) * scale).astype(np.float32)

    def norm(name, width):
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, width).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0.3, 0.3, width).astype(np.float32)
        tensors[f"{name}.running_mean"] = rng.normal(0, 0.1, width).astype(np.float32)
        tensors[f"{name}.running_var"] = rng.uniform(0.5, 1.5, width).astype(np.float32)
        tensors[f"{name}.num_batches_tracked"] = np.array(7)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    for n, (kernel, _, expand, width, out) in enumerate(BLOCKS):
        if expand > 1:
            conv(f"_blocks.{n}._expand_conv", width * expand, width, 1)
            norm(f"_blocks.{n}._bn0", width * expand)
        conv(f"_blocks.{n}._depthwise_conv", width * expand, 1, kernel)
        norm(f"_blocks.{n}._bn1", width * expand)
        conv(f"_blocks.{n}._project_conv", out, width * expand, 1)
        norm(f"_blocks.{n}._bn2", out)
    conv("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    tensors["_fc.weight"] = (rng.standard_normal((1000, 1280)) / 36).astype(np.float32)
    tensors["_fc.bias"] = rng.standard_normal(1000).astype(np.float32)
    return tensors


class Reference:
    """The forward pass in fp64, with sums over shifted images."""

    def __init__(self, tensors):
        self.t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}

    def conv(self, x, name, stride=1, depthwise=False):
        w = self.t[f"{name}.weight"]
        k, (h, width) = w.shape[-1], x.shape[1:3]
        out_h, out_w = -(-h // stride), -(-width // stride)
        pads = []
        for size, out in ((h, out_h), (width, out_w)):
            total = max((out - 1) * stride + k - size, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, ((0, 0), *pads, (0, 0)))
        y = 0
        for i in range(k):
            for j in range(k):
                rows = slice(i, i + stride * (out_h - 1) + 1, stride)
                columns = slice(j, j + stride * (out_w - 1) + 1, stride)
                part = x[:, rows, columns]
                y = y + (part * w[:, 0, i, j] if depthwise else part @ w[:, :, i, j].T)
        return y

    def norm(self, x, name):
        t = self.t
        scale = t[f"{name}.weight"] / np.sqrt(t[f"{name}.running_var"] + 1e-3)
        return (x - t[f"{name}.running_mean"]) * scale + t[f"{name}.bias"]

    def __call__(self, x):
        def relu6(x):
            return np.clip(x, 0, 6)

        x = relu6(self.norm(self.conv(x, "_conv_stem", 2), "_bn0"))
        maps, stride_now = {}, 2
        for n, (_, stride, expand, width, out) in enumerate(BLOCKS):
            name, y = f"_blocks.{n}.", x
            if expand > 1:
                y = relu6(self.norm(self.conv(y, f"{name}_expand_conv"), f"{name}_bn0"))
            y = self.conv(y, f"{name}_depthwise_conv", stride, depthwise=True)
            y = relu6(self.norm(y, f"{name}_bn1"))
            y = self.norm(self.conv(y, f"{name}_project_conv"), f"{name}_bn2")
            x = x + y if stride == 1 and width == out else y
            stride_now *= stride
            maps[stride_now] = x
        pooled = relu6(self.norm(self.conv(x, "_conv_head"), "_bn1")).mean(axis=(1, 2))
        return maps, pooled, pooled @ self.t["_fc.weight"].T + self.t["_fc.bias"]


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def arrays(tensors):
    return import_torch(EFFICIENTNET, tensors, Network(lambda rngs: EfficientNetLite0(rngs=rngs)))


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("size", [64, 72])  # 72 does not divide by 32: SAME pads unevenly
def test_maps_pool_and_logits_equal_an_fp64_computation(tensors, arrays, size):
    network = Network(lambda rngs: EfficientNetLite0(rngs=rngs))
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3))
    maps, pooled, logits = Reference(tensors)(pixels)

    @jax.jit
    def run(arrays, x):
        model = network(*arrays)
        return model.maps(x), model.pooled(x), model(x)

    with jax.default_matmul_precision("highest"):
        found = run(arrays, jnp.asarray(pixels, jnp.float32))
    assert {stride: x.shape for stride, x in found[0].items()} == {
        stride: x.shape for stride, x in maps.items()
    }
    for stride, expected in maps.items():
        assert relative(found[0][stride], expected) < 1e-5, stride
    assert relative(found[1], pooled) < 1e-5
    assert relative(found[2], logits) < 1e-5


def test_the_weights_come_back_as_they_were(tensors, arrays):
    again = export_torch(EFFICIENTNET, *arrays)
    assert set(again) == {n for n in tensors if not n.endswith("num_batches_tracked")}
    assert all(np.array_equal(again[name], tensors[name]) for name in again)


def test_the_backbone_sees_pixels_as_the_classifier_was_trained(arrays):
    network = Network(lambda rngs: EfficientNetBackbone(input_size=64, strides=(32,), rngs=rngs))
    levels = np.random.default_rng(2).integers(0, 256, (1, 64, 64, 3))
    model = network({"encoder": arrays[0]}, {"encoder": arrays[1]})
    seen = model.preprocess(levels / 127.5 - 1.0)
    np.testing.assert_allclose(seen, (levels - 127) / 128, atol=1e-5)


@pytest.mark.parametrize(
    ("strides", "width"),
    # one map, and two side by side; a third is another number of the same blocks
    [((32,), 320), ((16, 32), 432), pytest.param((8,), 40, marks=pytest.mark.slow)],
)
def test_tokens_are_the_cells_of_the_coarsest_map(arrays, strides, width):
    sizes = dict(input_size=64, strides=strides)
    network = Network(lambda rngs: EfficientNetBackbone(**sizes, rngs=rngs))
    config = default_config().copy_and_resolve_references()
    config.backbone.name = "efficientnet_lite0"
    config.backbone.efficientnet_lite0.update(sizes)
    grid, channels = backbone_shape(config.backbone)
    assert (grid, channels) == (64 // max(strides), width)
    images = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (2, 64, 64, 3)), jnp.float32)
    model = network({"encoder": arrays[0]}, {"encoder": arrays[1]})
    tokens, maps = nnx.jit(lambda model, x: model.features_and_maps(x))(model, images)
    assert tokens.shape == (2, grid * grid, width)
    assert (model.grid, model.width) == (grid, width)
    # of one map a token is its cell, normalised over the channels
    cell = maps[[2, 4, 8, 16, 32].index(max(strides))][:, 1] if grid > 1 else maps[-1][:, 0]
    own = tokens[:, 1 if grid > 1 else 0, -cell.shape[-1] :]
    expected = (cell - cell.mean(-1, keepdims=True)) / cell.std(-1, keepdims=True)
    np.testing.assert_allclose(own, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [("strides", (3,), "give one or more of 2, 4, 8, 16, 32"), ("input_size", 100, "take 96")],
)
def test_sizes_that_the_network_lacks_are_refused(field, value, advice):
    config = default_config()
    config.backbone.name = "efficientnet_lite0"
    config.backbone.efficientnet_lite0[field] = value
    with pytest.raises(ConfigError, match=f"backbone.efficientnet_lite0.{field}.*{advice}"):
        validate(config)
