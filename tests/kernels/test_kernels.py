"""Kernels against the plain path that they stand for: interpreted, so that no GPU is needed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.generators.dit import LightningDiT
from gae_jax.kernels import attention as attention_kernel
from gae_jax.kernels import norm as kernels
from gae_jax.kernels.attention import Heads, attend, attention_obstacle
from gae_jax.kernels.norm import add_and_norm, use_kernels
from gae_jax.kernels.rope import rotation_obstacle
from gae_jax.kernels.swiglu import swiglu
from gae_jax.kernels.swiglu_matmul import swiglu_matmul, swiglu_matmul_obstacle
from gae_jax.nn.attention import Attention, attention_implementation
from gae_jax.nn.layers import apply_rope, rms_norm, rope_table
from gae_jax.pretrained.lpips import max_pool
from gae_jax.runtime.mesh import constrained, make_mesh

BATCH, TOKENS, WIDTH = 2, 64, 128


def half(seed: int, *shape: int) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.bfloat16)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def apart(found, expected) -> float:
    """Relative distance."""
    found, expected = wide((found, expected))
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.fixture(scope="module")
def arrays():
    token, image = (BATCH, TOKENS, WIDTH), (BATCH, WIDTH)
    shapes = dict(x=token, y=token, gate=image, bias=image[1:], weight=image[1:])
    shapes |= dict(shift=image, scale=image)
    return {name: half(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}


def plain_norm(given):
    """`add_and_norm` as the plain path has it, in fp32, rounded where the kernel rounds."""
    given = wide(given)
    u = given["x"]
    if "y" in given:
        branch = given["y"] + given.get("bias", 0.0)
        u = u + branch * (given["gate"][:, None] if "gate" in given else 1.0)
        u = u.astype(jnp.bfloat16).astype(jnp.float32)
    h = rms_norm(u) * given.get("weight", 1.0)
    if "scale" in given:
        h = h * (1 + given["scale"][:, None])
    return u, h + given["shift"][:, None] if "shift" in given else h


def through(function, given):
    """Both outputs, and gradients of all that is given by cotangents that differ."""
    found, back = jax.vjp(function, given)
    on = [half(9, *found[0].shape), half(10, *found[1].shape)]
    return found, back(tuple(o.astype(f.dtype) for o, f in zip(on, found, strict=True)))[0]


@pytest.mark.parametrize(
    "names",
    [
        ("x",),
        ("x", "weight", "shift", "scale"),
        ("x", "y", "gate", "bias", "weight", "shift", "scale"),
    ],
)
def test_sum_and_norm_and_all_their_gradients(arrays, names):
    given = {name: arrays[name] for name in names}
    found, grads = through(lambda g: add_and_norm(**g, kernels="interpret"), given)
    expected, expected_grads = through(plain_norm, given)
    for one, other in zip(found, expected, strict=True):
        assert apart(one, other) < 4e-3
    for name in names:
        assert grads[name].dtype == given[name].dtype
        assert apart(grads[name], expected_grads[name]) < 6e-3, name


def test_swiglu_and_its_gradients():
    x, bias, on = half(0, BATCH, TOKENS, 2 * WIDTH), half(1, 2 * WIDTH), half(2, BATCH, TOKENS, 128)

    def plain(x, bias):
        a, b = jnp.split(x + bias, 2, axis=-1)
        return jax.nn.silu(a) * b

    found, back = jax.vjp(jax.jit(lambda *pair: swiglu(*pair, "interpret")), x, bias)
    expected, expected_back = jax.vjp(jax.jit(plain), *wide((x, bias)))
    assert apart(found, expected) < 4e-3
    for one, other in zip(back(on), expected_back(wide(on)), strict=True):
        assert apart(one, other) < 4e-3


def test_a_product_that_ends_with_swiglu():
    # no public name yet
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    interpret = params.InterpretGPUParams()
    x, kernel, bias = half(0, 1, 128, 64), half(1, 64, 256) / 8, half(2, 256)
    found = swiglu_matmul(x, kernel, bias, interpret=interpret, programs=1)
    expected = swiglu(x @ kernel, bias)
    assert apart(found, expected) < 6e-3
    obstacle = partial(swiglu_matmul_obstacle, jnp.bfloat16)
    assert "no Hopper" in obstacle((64, 256, 1152), 3072)
    assert "widths of 1150" in obstacle((64, 256, 1150), 3072)


def test_attention_in_one_kernel_and_its_gradients():
    heads, tokens = Heads(1, 32, "fixed"), 128
    qkv, on, bias = half(0, 1, tokens, 96), half(1, 1, tokens, 32), half(2, 96)
    rope = tuple(part[:tokens] for part in rope_table(12, 32))

    def plain(qkv, bias):
        q, k, v = jnp.split((qkv + bias)[:, :, None], 3, axis=-1)
        q, k = (apply_rope(rms_norm(part), rope) for part in (q, k))
        return jax.nn.dot_product_attention(q, k, v)[:, :, 0]

    def kernel(*pair):
        return attend(*pair, rope, heads, interpret=True)

    found, back = jax.vjp(jax.jit(kernel), qkv, bias)
    expected, expected_back = jax.vjp(jax.jit(plain), *wide((qkv, bias)))
    assert apart(found, expected) < 6e-3
    for one, other in zip(back(on), expected_back(wide(on)), strict=True):
        assert apart(one, other) < 1.5e-2


def test_rotated_heads_and_their_gradients():
    # through the layer: three heads of 8 channels; four images in programs of two
    layer = Attention(24, 3, qk_norm=None, bias=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    params = jax.tree.map(lambda p: p + half(p.size % 97, *p.shape) / 8, params)
    x, on, rope = half(0, 6, TOKENS, 24), half(1, 6, TOKENS, 24), rope_table(8, 8)
    assert layer.rotation_obstacle(rope) is None

    def by_kernel(params, x):
        return nnx.merge(graph, params).without_bias(x, rope, "interpret")

    def plain(params, x):
        layer = nnx.merge(graph, params)
        layer.qkv.dtype = jnp.float32
        return layer.heads(x, rope) @ layer.proj.kernel[...]

    @partial(jax.jit, static_argnums=0)
    def both(function, given, on):
        found, back = jax.vjp(function, *given)
        return found, back(on)

    found, grads = both(by_kernel, (params, x), on)
    expected, expected_grads = both(plain, *wide(((params, x), on)))
    assert apart(found, expected) < 8e-3
    for (path, one), other in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        if "proj" in str(path) and "bias" in str(path):
            assert not np.any(one)
        else:
            assert apart(one, other) < 4e-2, path  # attention in bf16 on both ways


@pytest.mark.slow
def test_a_diffusion_model_by_kernels_is_as_near_to_fp32_as_by_xla():
    sizes = dict(input_size=8, in_channels=4, hidden_size=WIDTH, depth=1, num_heads=4)
    sizes |= dict(num_classes=3, mlp_ratio=3.0)
    x, t, labels = half(0, 2, 8, 8, 4).astype(jnp.float32), jnp.array([0.3, 0.6]), jnp.array([0, 3])

    def run(jit=jax.jit, **more):
        model = LightningDiT(**sizes, **more, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        # the modulation starts at zero, and all behind it
        params = jax.tree.map(lambda p: p + 0.05 * half(p.size % 97, *p.shape), params)

        def loss(params):
            output = nnx.merge(graph, params, rest)(x, t, labels)
            return jnp.sum(jnp.square(output)), output

        (_, output), grads = jit(jax.value_and_grad(loss, has_aux=True))(params)
        return [output, *jax.tree.leaves(nnx.to_pure_dict(grads))]

    exact = run(dtype=jnp.float32)
    xla = run(dtype=jnp.bfloat16, kernels="auto")  # which is XLA on a CPU
    own = run(dtype=jnp.bfloat16, kernels="interpret")
    assert len(own) == len(exact)
    for one, other, right in zip(own, xla, exact, strict=True):
        assert apart(one, right) < max(2 * apart(other, right), 5e-3)
    # computed again in the backward pass: traced alone
    traced = partial(partial, jax.eval_shape)
    again = run(traced, dtype=jnp.bfloat16, kernels="interpret", remat="nothing_saveable")
    assert [x.shape for x in again] == [x.shape for x in own]


def test_devices_compute_their_own_rows(arrays):
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    given = {name: arrays[name] for name in ("x", "weight", "scale")}

    @jax.jit
    def split(given):
        with constrained(mesh):
            return through(lambda g: add_and_norm(**g, kernels="interpret"), given)

    text = split.lower(given).compile().as_text()
    assert "all-gather" not in text
    whole = through(lambda g: add_and_norm(**g, kernels="interpret"), given)
    for one, other in zip(jax.tree.leaves(split(given)), jax.tree.leaves(whole), strict=True):
        assert apart(one, other) < 1e-3


def test_what_does_not_fit_is_said_or_goes_the_plain_way():
    good, dtype = (2, 64, 1152), jnp.bfloat16
    assert use_kernels("interpret", dtype, good)
    assert not use_kernels("auto", dtype, good)  # no GPU here
    assert not use_kernels("xla", dtype, good)
    for shape, what in (((2, 63, 1152), "number"), ((2, 64, 1150), "width"), ((2, 64), "number")):
        with pytest.raises(ValueError, match=what):
            use_kernels("interpret", dtype, shape)
    with pytest.raises(ValueError, match="float32"):
        use_kernels("interpret", jnp.float32, good)
    with pytest.raises(ValueError, match="not a gpu"):
        use_kernels("triton", dtype, good)
    split = make_mesh(tensor=2, devices=jax.devices()[:2])
    with constrained(split), pytest.raises(ValueError, match="tensor splits"):
        use_kernels("interpret", dtype, good)
    with pytest.raises(ValueError, match="kernels is 'cuda'"):
        kernels.check_kernels("cuda")
    assert attention_obstacle(dtype, 256, Heads(16, 64, "fixed")) is None
    assert "72 channels" in attention_obstacle(dtype, 256, Heads(16, 72))
    assert "'learned'" in attention_obstacle(dtype, 256, Heads(16, 64, "learned"))
    assert "200 tokens" in attention_obstacle(dtype, 200, Heads(16, 64))
    assert set(attention_kernel.WIDTHS) == {32, 64}
    rope, bias = rope_table(2, 72), jnp.zeros(1)
    assert rotation_obstacle(72, None, rope, bias) is None
    assert "'learned'" in rotation_obstacle(72, "learned", rope, bias)
    assert "not rotated" in rotation_obstacle(72, None, None, bias)
    assert "no bias" in rotation_obstacle(72, None, rope, None)
    assert "36 channels" in rotation_obstacle(36, None, rope, bias)


def test_attention_triton_wants_a_gpu_and_heads_that_fit(monkeypatch):
    with pytest.raises(ValueError, match="attention is 'triton', but the device"):
        attention_implementation("triton", jnp.bfloat16, 64)
    layer = Attention(144, 2, attention="triton", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    monkeypatch.setattr("gae_jax.nn.attention.cudnn_obstacle", lambda dtype, width: None)
    with pytest.raises(ValueError, match="72 channels"):
        layer(half(0, 1, 128, 144))


def test_the_pool_gives_its_gradient_to_the_first_of_equal_pixels():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 7, 6, 3)), jnp.float32)

    def of(pool):
        return jax.grad(lambda x: jnp.sum(jnp.sin(1 + pool(x))))(x)

    np.testing.assert_array_equal(
        of(max_pool), of(lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2)))
    )
