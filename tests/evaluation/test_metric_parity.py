"""LPIPS and the Inception network against lpips 0.1.4, pytorch-fid 0.3.0 and torch-fidelity 0.4.0.

Their golden files hold inputs and outputs (channels first); the weights follow from a formula
that the files state.
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from gae_jax.interop import metric_tables
from gae_jax.interop.convert import ConversionError, export_torch, import_torch
from gae_jax.nn.network import Keys, Network
from gae_jax.pretrained import inception, lpips

GOLDEN = Path(__file__).parents[1] / "golden"
INCEPTION_OUTPUTS = ("pool", "spatial", "logits_unbiased", "logits")
PREFIXES = {"tf": "tf", "pytorch_fid": "ptfid"}
VGG_SHAPES = {
    f"net.{name}.{number}": features
    for name, layers in lpips.SLICES.items()
    for number, features in layers
}


def config_of(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "numpy") as file:
        return json.loads(file.metadata()["config"])


def io_of(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix("io."): value for key, value in tensors.items()}


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def formula(index, shape):
    """The golden files' numbers in (-1, 1), float64; in pieces, so that they stay in the cache."""
    flat = np.empty(int(np.prod(shape)))
    for start in range(0, flat.size, 2**16):
        piece = flat[start : start + 2**16]
        # Multiply and add are rounded separately, as the formula demands.
        angles = np.arange(start + 1, start + 1 + piece.size, dtype=np.float64) * 12.9898
        angles += index * 78.233
        piece[:] = np.modf(np.sin(angles) * 43758.5453)[0]
    return flat.reshape(shape)


def lpips_shape(name, widths):
    layer, kind = name.rsplit(".", 1)
    if name.startswith("lin"):
        return (1, widths[int(name[3])], 1, 1)
    order = list(VGG_SHAPES)
    before = order.index(layer) - 1
    features_in = VGG_SHAPES[order[before]] if before >= 0 else 3
    return (VGG_SHAPES[layer], features_in, 3, 3) if kind == "weight" else (VGG_SHAPES[layer],)


def lpips_weight(name, v):
    if name.startswith("lin"):
        return np.abs(v) * 0.1
    return v * 0.05 if v.ndim == 1 else v * np.sqrt(6 / v[0].size)


def inception_weight(name, v):
    rules = (
        ("conv.weight", lambda: v * np.sqrt(6 / v[0].size)),
        ("bn.weight", lambda: 1 + 0.1 * v),
        ("bn.running_var", lambda: 1 + 0.5 * v),
        ("fc.weight", lambda: v * np.sqrt(3 / 2048)),
        ("", lambda: 0.1 * v),
    )
    return next(value() for ending, value in rules if name.endswith(ending))


@pytest.fixture(scope="session")
def lpips_state():
    """lpips's state dict."""
    config = config_of("lpips_vgg")
    widths = [layers[-1][1] for layers in lpips.SLICES.values()]
    return {
        name: lpips_weight(name, formula(index + config["seed"], lpips_shape(name, widths))).astype(
            np.float32
        )
        for index, name in enumerate(config["weight_order"])
    }


@pytest.fixture(scope="session")
def inception_state():
    """pytorch-fid's state dict."""
    config = config_of("fid_inception")
    return {
        name: inception_weight(
            name, formula(index + config["seed"], config["weight_shapes"][name])
        ).astype(np.float32)
        for index, name in enumerate(config["weight_order"])
    }


def load(table, state):
    network = Network(table.module)
    return network(*jax.tree.map(jnp.asarray, import_torch(table, state, network)))


@pytest.fixture(scope="session")
def lpips_model(lpips_state):
    return load(metric_tables.LPIPS, lpips_state)


@pytest.fixture(scope="session")
def inception_outputs(inception_state):
    """{front end: outputs of the golden images}."""
    model = load(metric_tables.INCEPTION, inception_state)
    images = channels_last(io_of("fid_inception")["images"])
    run = nnx.jit(lambda model, images, front_end: model(images, front_end), static_argnums=2)
    return {name: jax.device_get(run(model, images, name)) for name in inception.FRONT_ENDS}


def difference(got, want):
    """Largest difference over largest expected value."""
    assert got.shape == want.shape
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


def test_lpips_distance(lpips_model):
    io = io_of("lpips_vgg")
    a, b = channels_last(io["a"]), channels_last(io["b"])
    run = nnx.jit(lambda model, a, b: model(a, b))
    got = run(lpips_model, a, b)
    assert np.max(np.abs(got - io["distance"]) / io["distance"]) <= 1e-5
    assert difference(run(lpips_model, b, a), got) <= 1e-6
    # The two passes may round differently: threads share the sums.
    np.testing.assert_allclose(run(lpips_model, a, a), io["self_distance"], rtol=0, atol=1e-12)


def test_lpips_refuses_what_it_cannot_compare(lpips_model):
    for a, b in (((2, 32, 32, 3), (1, 32, 32, 3)), ((1, 15, 32, 3), (1, 15, 32, 3))):
        with pytest.raises(ValueError, match="images of one shape"):
            lpips_model(jnp.zeros(a), jnp.zeros(b))


def test_unit_length_is_that_of_lpips_with_finite_gradients():
    f = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    f[1], f[2], f[3] = 0, f[2] * 1e-10, f[3] * 1e-30  # the last one's square is zero in fp32
    want = f / (np.sqrt(np.sum(f**2, -1, keepdims=True)) + np.float32(1e-10))
    np.testing.assert_allclose(lpips.unit_length(jnp.asarray(f)), want, rtol=1e-6, atol=0)
    gradient = jax.grad(lambda f: jnp.sum(jnp.square(lpips.unit_length(f) - 0.5)))(jnp.asarray(f))
    assert np.all(np.isfinite(gradient))


def test_lpips_gradient_is_finite_where_all_features_are_zero(lpips_model):
    a, b = jax.random.uniform(jax.random.key(0), (2, 1, 16, 16, 3), minval=-1)
    features = nnx.jit(lambda model, x: model.features(x))
    silent, other = jax.tree.map(jnp.zeros_like, features(lpips_model, a)), features(lpips_model, b)
    silent[0] = silent[0].at[:, 3, 5].set(1.0)  # all vectors but one
    gradient_of = nnx.jit(nnx.grad(lambda maps, model, other: jnp.sum(model.compare(maps, other))))
    gradients = gradient_of(silent, lpips_model, other)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_lpips_gradient_reaches_the_image(lpips_model):
    a, b = jax.random.uniform(jax.random.key(0), (2, 1, 16, 16, 3), minval=-1)
    a = a.at[:, :, :8].set(0)
    run = nnx.jit(nnx.value_and_grad(lambda a, model, b: jnp.sum(model(a, b))))
    value, gradient = run(a, lpips_model, b)
    assert value > 0
    assert np.all(np.isfinite(gradient))
    assert np.all(np.any(gradient, axis=(1, 2)))


def test_inception_weights_are_those_of_the_golden_file(inception_state):
    config = config_of("fid_inception")
    assert len(inception_state) == 472
    assert sum(tensor.size for tensor in inception_state.values()) == 23_885_392
    for name, (total, absolute, last) in config["weight_check"].items():
        wide = inception_state[name].astype(np.float64)
        np.testing.assert_allclose(wide.sum(), total, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(np.abs(wide).sum(), absolute, rtol=1e-12, err_msg=name)
        np.testing.assert_array_equal(wide.ravel()[-3:], last, err_msg=name)


@pytest.mark.parametrize("output", INCEPTION_OUTPUTS)
@pytest.mark.parametrize("front_end", PREFIXES)
def test_inception(inception_outputs, front_end, output):
    want = io_of("fid_inception")[f"{PREFIXES[front_end]}_{output}"]
    # PyTorch's own fp32 maps are 1.8e-5 away from its fp64 ones, says the file
    bound = 3e-5 if output == "spatial" else 1e-5
    assert difference(inception_outputs[front_end][output], want) <= bound


@pytest.mark.parametrize("front_end", PREFIXES)
def test_spatial_features_are_channels_last(inception_outputs, front_end):
    want = io_of("fid_inception")[f"{PREFIXES[front_end]}_spatial"]
    maps = inception_outputs[front_end]["spatial"].reshape(-1, 17, 17, 7)
    assert difference(np.moveaxis(maps, -1, 1).reshape(want.shape), want) > 0.1


@pytest.mark.parametrize(("height", "width"), [(512, 256), (299, 299), (1, 7)])
def test_front_ends_resize_as_they_say(height, width):
    """Against the definition in float64, for enlarging, shrinking and keeping a side."""
    images = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)

    def expected(shift):
        x = images.astype(np.float64)
        for axis, size in ((1, height), (2, width)):
            at = np.maximum((np.arange(299) + shift) * size / 299 - shift, 0)
            x = np.apply_along_axis(
                lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, x
            )
        return x

    tf, pytorch_fid = (inception.FRONT_ENDS[name](images) for name in PREFIXES)
    np.testing.assert_allclose(tf, (expected(0) - 128) / 128, atol=2e-4)
    np.testing.assert_allclose(pytorch_fid, expected(0.5) / 127.5 - 1, atol=2e-4)


def test_inception_refuses_other_inputs():
    model = nnx.eval_shape(lambda: inception.FIDInception(rngs=Keys(0)))
    with pytest.raises(ValueError, match="takes uint8 images"):
        model(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="takes uint8 images"):
        model(np.zeros((1, 3, 64, 64), np.uint8))
    with pytest.raises(ValueError, match=r"no front end 'torch'; there are \['pytorch_fid', 'tf'"):
        model(np.zeros((1, 64, 64, 3), np.uint8), "torch")


def as_files(state):
    """The names that torchvision's file and the file of heads use."""
    return {re.sub(r"^net\.slice\d", "features", name): value for name, value in state.items()}


CASES = {
    # table, fixture, its names, (one to leave out, one to misshape), names that are left aside
    "lpips": (
        metric_tables.LPIPS,
        "lpips_state",
        dict,
        ("net.slice1.0.weight", "lin4.model.1.weight"),
        ("scaling_layer.shift", "lins.0.model.1.weight"),
    ),
    "lpips_files": (
        metric_tables.LPIPS_FILES,
        "lpips_state",
        as_files,
        ("features.0.weight", "lin4.model.1.weight"),
        ("classifier.0.weight", "classifier.6.bias"),
    ),
    "inception": (
        metric_tables.INCEPTION,
        "inception_state",
        dict,
        ("Mixed_5b.branch1x1.conv.weight", "fc.bias"),
        ("Mixed_5b.branch1x1.bn.num_batches_tracked",),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    table, fixture, rename, touched, aside = CASES[request.param]
    return table, rename(request.getfixturevalue(fixture)), touched, aside


def test_weights_survive_the_round_trip(case):
    table, state, _, aside = case
    given = state | dict.fromkeys(aside, np.zeros(3, np.float32))
    exported = export_torch(table, *import_torch(table, given, Network(table.module)))
    assert exported.keys() == state.keys()
    for name, want in state.items():
        np.testing.assert_array_equal(exported[name], want, err_msg=name)


def test_import_names_every_tensor_that_does_not_fit(case):
    table, state, (missing, misshapen), aside = case
    surplus = f"AuxLogits.{aside[0].replace('.', '_')}"
    changed = state | {misshapen: np.zeros((3, 5)), surplus: np.zeros(7)}
    del changed[missing]
    with pytest.raises(ConversionError) as error:
        import_torch(table, changed, Network(table.module))
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        f"missing: {missing} {list(state[missing].shape)}",
        f"unexpected: {surplus} [7]",
        f"misshapen: {misshapen} is [3, 5], must be {list(state[misshapen].shape)}",
    ]
