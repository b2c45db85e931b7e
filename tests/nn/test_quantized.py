"""Products of fp8 numbers against exact ones of the same numbers, and how they are chosen."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.config import load_config
from gae_jax.config.validate import validate
from gae_jax.data.latents import LatentSet
from gae_jax.generators.dit import DiTBlock, LightningDiT
from gae_jax.kernels.attention import Heads, attend, attend_fp8
from gae_jax.kernels.fp8 import FP8, LARGEST, Scaled, quantize
from gae_jax.kernels.norm import add_and_norm, add_and_norm_fp8
from gae_jax.kernels.stream import Stream
from gae_jax.kernels.swiglu import swiglu_fp8
from gae_jax.nn.network import Network
from gae_jax.nn.quantized import QuantizedLinear, weight_quantizer, with_fp8_matmuls, with_matmuls
from gae_jax.nn.vit import Block
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json
from gae_jax.runtime.mesh import make_mesh
from gae_jax.runtime.sharding import path_of, shard
from gae_jax.stages import latents, sample
from gae_jax.tokenizers import tokenizer_network

CONFIGS = Path(__file__).parents[2] / "configs"
leaves = jax.tree_util.tree_leaves_with_path


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def exactly(scaled) -> np.ndarray:
    return np.asarray(scaled.values, np.float64) * np.asarray(scaled.scale, np.float64)


def apart(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_every_row_uses_the_whole_range():
    x = normal(0, 6, 64) * 10.0 ** np.arange(-30, 30, 10)[:, None]
    x = x.at[0].set(0.0)
    found = quantize(x)
    assert found.values.dtype == FP8
    assert found.scale.shape == (6, 1)
    np.testing.assert_array_equal(
        jnp.max(jnp.abs(found.values.astype(jnp.float32)), 1)[1:], LARGEST
    )
    np.testing.assert_array_equal(exactly(found)[0], 0.0)
    # three bits behind the leading one
    for row in range(1, 6):
        assert apart(exactly(found)[row], x[row]) < 2**-5


def test_a_layer_sums_up_what_its_numbers_are():
    layer = nnx.Linear(43, 21, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias[...] = normal(2, 21)
    rounded = QuantizedLinear(layer)
    assert rounded.quantized.shape == (32, 48)  # filled up to what cuBLAS takes

    @jax.jit
    def run(x):
        numbers = quantize(x), quantize(layer.kernel[...].T)
        return numbers, rounded.matmul(x), rounded.matmul(numbers[0]), rounded(x), layer(x)

    numbers, *products, found, exact = run(normal(1, 2, 5, 43))
    expected = exactly(numbers[0]) @ exactly(numbers[1]).T
    assert max(apart(own, expected) for own in products) < 1e-6
    assert apart(found, expected + np.asarray(layer.bias[...])) < 1e-6
    assert apart(found, exact) < 0.05


def test_kernels_round_as_the_plain_path_does():
    shapes = dict(x=(2, 64, 128), y=(2, 64, 128), gate=(2, 128), weight=(128,), bias=(128,))
    given = {name: normal(i, *s, dtype=jnp.bfloat16) for i, (name, s) in enumerate(shapes.items())}
    rows, columns, bias = normal(7, 2, 64, 1), normal(8, 128), normal(9, 128)

    @jax.jit
    def run(given):
        scaled = (given["y"] * rows * columns).astype(jnp.bfloat16)
        u, h = add_and_norm(**{**given, "y": scaled}, kernels="interpret")
        own, *rounded = add_and_norm_fp8(
            **given, rows=rows, columns=columns, fp8=True, kernels="interpret"
        )
        a, b = jnp.split(given["x"] * rows * columns + bias, 2, axis=-1)
        product = jax.nn.silu(a) * b
        found = swiglu_fp8(given["x"], bias, rows, columns, "interpret")
        return (own, u), (rounded, h, quantize(h)), (found, product, quantize(product))

    (found, expected), *pairs = run(given)
    assert apart(found, expected) < 4e-3
    for rounded, exact, plain in pairs:
        assert rounded[0].dtype == FP8
        error, least = (apart(exactly(Scaled(*own)), exact) for own in (rounded, plain))
        assert error < 1.05 * least


SIZES = dict(input_size=8, in_channels=4, hidden_size=128, depth=1, num_heads=4, num_classes=3)
SIZES |= dict(mlp_ratio=3.0)


def build(**more) -> Network:
    return Network(lambda rngs: LightningDiT(**SIZES | more, rngs=rngs))


def test_a_diffusion_model_multiplies_in_fp8_in_its_large_layers_alone():
    mesh, network = make_mesh(fsdp=2, devices=jax.devices()[:2]), build(dtype=jnp.bfloat16)
    given = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), network.abstract)
    arrays = weight_quantizer(network, with_matmuls(network, "fp8"), mesh)(given)
    fp8 = {
        path_of(path): leaf.sharding.shard_shape(leaf.shape)
        for path, leaf in leaves(arrays)
        if leaf.dtype == FP8
    }
    assert fp8 == {
        "1/blocks/0/attn/qkv/quantized": (384, 64),
        "1/blocks/0/mlp/w12/quantized": (512, 64),
        "1/blocks/0/mlp/w3/quantized": (64, 256),
    }
    assert "kernel" not in arrays[0]["blocks"]["0"]["attn"]["qkv"]
    # with kernels, they round
    fast = build(dtype=jnp.bfloat16, kernels="interpret").changed(with_fp8_matmuls)
    shapes = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    traced = str(jax.make_jaxpr(lambda arrays: fast(*arrays)(*shapes))(arrays))
    assert traced.count("f8_e4m3fn[2,64,128] = convert") == 0
    assert [traced.count(f"name={name}") for name in ("add_and_norm", "swiglu_fp8")] == [3, 1]


def test_a_block_with_fp8_products_gives_nearly_the_same():
    sizes = dict(mlp_ratio=4.0, use_qknorm=False, use_swiglu=True, use_rmsnorm=True, wo_shift=False)
    exact = DiTBlock(48, 2, **sizes, attention="xla", dtype=jnp.float32, rngs=nnx.Rngs(0))
    exact.adaLN_modulation.linear.kernel[...] = 0.3 * normal(0, 48, 6 * 48)  # else it is shut
    rounded = with_fp8_matmuls(nnx.clone(exact))

    @jax.jit
    def run(x, c):
        return [one(x, c, None) - x for one in (exact, rounded)]

    expected, found = run(normal(1, 2, 5, 48), normal(2, 2, 1, 48))
    assert 1e-3 < apart(found, expected) < 0.05


@pytest.mark.slow  # the kernels are in test_kernels, blocks in fp8 in this file
def test_blocks_of_gae_by_kernels_and_in_fp8():
    block = Block(128, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    halved, rounded = (with_dtype(block, jnp.bfloat16) for _ in range(2))
    rounded = with_fp8_matmuls(rounded)
    graph, params = nnx.split(halved)
    x = normal(1, 2, 64, 128)

    def by_kernels(params, x):
        stream = nnx.merge(graph, params).streamed(Stream(x), "interpret")
        return stream.normed("interpret")[0]

    def plain(params, x):
        return nnx.merge(nnx.graphdef(block), params)(x)

    @jax.jit
    def run(params, x):
        found, back = jax.vjp(by_kernels, params, x.astype(jnp.bfloat16))
        exact, exact_back = jax.vjp(plain, params, x)
        grads = back(exact.astype(found.dtype)), exact_back(exact)
        fp8 = rounded.streamed(Stream(x.astype(jnp.bfloat16)), "interpret")
        in_passes = rounded(x.astype(jnp.bfloat16))
        return exact, found, (fp8.normed("interpret")[0], in_passes), grads

    exact, found, both, (own, right) = run(params, x)
    assert apart(found, exact) < 6e-3
    for one in both:
        assert 5e-3 < apart(one, exact) < 2e-2
    assert apart(*both) < 1e-2
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(right), strict=True):
        assert apart(one, other) < 1.5e-2


def with_dtype(block, dtype):
    """The same block, computing in another dtype."""
    block = nnx.clone(block)
    for _, part in nnx.iter_modules(block):
        if isinstance(part, nnx.Linear):
            part.dtype = dtype
    return block


def test_attention_reads_a_product_that_is_not_scaled():
    heads, tokens = Heads(1, 32, "fixed"), 128
    qkv, rows = normal(0, 1, tokens, 96, dtype=jnp.bfloat16), 0.1 + jnp.abs(normal(1, 1, tokens, 1))
    columns = 0.1 + jnp.abs(normal(2, 96))
    found = attend_fp8(qkv, (rows, columns), None, heads, interpret=True)
    scaled = (qkv.astype(jnp.float32) * rows * columns).astype(jnp.bfloat16)
    assert apart(found, attend(scaled, None, None, heads, interpret=True)) < 6e-3
    assert apart(found, attend(qkv, None, None, heads, interpret=True)) > 0.1


# the blocks of all are those of layers.py; "gae_d32" has them in its encoder and decoder
@pytest.mark.parametrize(
    "name",
    ["gae_d32", *(pytest.param(x, marks=pytest.mark.slow) for x in ("pae", "fae", "aligntok"))],
)
def test_tokenizers_of_the_family_have_rules_for_it(name):
    changed = with_matmuls(tokenizer_network(load_config(CONFIGS, name)), "fp8")
    shard(changed.abstract, make_mesh())
    fp8 = [path_of(path) for path, leaf in leaves(changed.abstract) if leaf.dtype == FP8]
    assert all(re.search(r"(attn/qkv|mlp/\w+)/quantized$", path) for path in fp8)


def test_the_default_is_the_network_itself():
    network = build()
    assert with_matmuls(network, "same") is network
    arrays = object()
    assert weight_quantizer(network, network, None)(arrays) is arrays


class Device:
    platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"


def test_what_cannot_multiply_in_fp8_is_named(monkeypatch, config):
    with pytest.raises(ConfigError, match="Linear has no layers"):
        with_matmuls(Network(lambda rngs: nnx.Linear(16, 16, rngs=rngs)), "fp8")
    monkeypatch.setattr("gae_jax.nn.quantized.jax.local_devices", lambda: [Device])
    assert with_matmuls(build(), "fp8")
    for change, says in (
        (dict(compute_capability="8.0"), "NVIDIA H200, older than NVIDIA's Ada"),
        (dict(compute_capability="gfx942"), "not an NVIDIA GPU"),
        (dict(platform="tpu"), "not an NVIDIA GPU"),
    ):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(Device, name, value)
            with pytest.raises(ConfigError, match=says):
                with_matmuls(build(), "fp8")
    config.precision.sample.matmuls = "int8"
    with pytest.raises(ConfigError, match=r"sample\.matmuls is 'int8'; use one of same, fp8"):
        validate(config)


def test_samples_say_that_they_were_drawn_in_fp8(small_run, tmp_path, config, monkeypatch):
    copy, drew = shutil.copytree(small_run, tmp_path / "run"), []
    shutil.rmtree(copy / "sample")

    def noted(networks, sampler):
        drew.append(networks)
        return lambda arrays, key, ids, labels: (jnp.zeros((8, 16, 16, 3), jnp.uint8), 3)

    monkeypatch.setattr(sample, "make_draw", noted)
    config.sample.sets, config.precision.sample.matmuls = ("ode",), "fp8"
    session = Session(config, Run(copy), devices=tuple(jax.devices()[:1]))
    sample.check(session)
    sample.run(session)
    fp8 = [any(leaf.dtype == FP8 for leaf in jax.tree.leaves(own)) for own in drew[0].arrays]
    assert fp8 == [True, True, False]
    found = read_json(copy / "sample" / "ode" / "manifest.json")
    assert [found["matmuls"], found["decoder_matmuls"]] == ["fp8", "fp8"]
    assert read_json(small_run / "sample" / "ode" / "manifest.json")["matmuls"] == "same"
    config.precision.override += ("sampler.matmuls=same",)
    with pytest.raises(UserError, match=r"precision\.sampler\.matmuls: 'fp8' there, 'same' ask"):
        sample.run(session)


def test_latents_in_fp8_are_nearly_the_same_and_recorded(small_run, tmp_path, config):
    copy = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(copy / "latents")
    config.precision.override += ("encoder.dtype=bfloat16", "encoder.matmuls=fp8")
    session = Session(config, Run(copy), devices=tuple(jax.devices()[:1]))
    latents.check(session)
    folder = latents.run(session)
    rows = [
        np.stack([LatentSet.open(run / "latents")[i]["latent"] for i in range(8)])
        for run in (copy, small_run)
    ]
    assert 1e-3 < apart(*rows) < 0.2
    assert folder.config.precision.encoder.matmuls == "fp8"
    config.precision.override += ("encoder.matmuls=same",)
    with pytest.raises(UserError, match=r"precision\.encoder\.matmuls: 'fp8' there, 'same' ask"):
        latents.run(session)
