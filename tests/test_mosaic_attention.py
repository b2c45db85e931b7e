"""The TPU's attention, interpreted, against the plain path; and that it lowers without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.benchmark import flops
from gae_jax.kernels.attention import Heads
from gae_jax.kernels.tpu_attention import attend, mosaic_obstacle
from gae_jax.nn.attention import Attention, attention_implementation
from gae_jax.nn.layers import apply_rope, rms_norm
from gae_jax.nn.layers import rope_table as table
from gae_jax.runtime.mesh import constrained, make_mesh

TOKENS, WIDTH, COUNT = 128, 24, 2


def half(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def plain(qkv, rope, qk_norm):
    qkv = qkv.reshape(*qkv.shape[:2], 3 * COUNT, -1)
    q, k, v = jnp.split(qkv, 3, axis=2)
    if qk_norm == "fixed":
        q, k = rms_norm(q), rms_norm(k)
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    found = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return found.reshape(*found.shape[:2], -1)


def apart(one, other) -> float:
    one, other = (np.asarray(x, np.float32) for x in (one, other))
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize(("qk_norm", "tokens"), [(None, TOKENS), ("fixed", TOKENS), (None, 37)])
def test_it_is_the_plain_path_and_so_are_its_gradients(qk_norm, tokens):
    rope = tuple(part[:tokens] for part in table(12, WIDTH)) if qk_norm is None else None
    qkv, on = half(0, 2, tokens, 3 * COUNT * WIDTH), half(1, 2, tokens, COUNT * WIDTH)
    heads = Heads(COUNT, WIDTH, qk_norm)
    found, back = jax.vjp(lambda x: attend(x, rope, heads, interpret=True), qkv)
    wide = qkv.astype(jnp.float32)
    expected, expected_back = jax.vjp(lambda x: plain(x, rope, qk_norm), wide)
    assert found.dtype == jnp.bfloat16
    assert apart(found, expected) < 8e-3
    assert apart(back(on)[0], expected_back(on.astype(jnp.float32))[0]) < 1.5e-2


@pytest.mark.parametrize("tokens", [256, 257])  # of patches, and CLS before them
def test_it_lowers_for_a_tpu_on_every_device_of_a_mesh(tokens, monkeypatch):
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    layer = Attention(
        48, COUNT, qk_norm=None, attention="mosaic", dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    monkeypatch.setattr("gae_jax.nn.attention.platform", lambda: "tpu")

    @jax.jit
    def gradient(x):
        with constrained(mesh):
            return jax.value_and_grad(lambda x: layer(x, rope).astype(jnp.float32).sum())(x)

    rope = tuple(part[:tokens] for part in table(17, WIDTH))
    given = jax.ShapeDtypeStruct((4, tokens, 48), jnp.bfloat16)
    text = jax.export.export(gradient, platforms=["tpu"])(given).mlir_module()
    assert text.count("tpu_custom_call") == 2  # forward and backward
    assert f"tensor<2x{tokens}x144xbf16>" in text  # a device's own rows


def test_where_it_cannot_run_it_says_so():
    heads, dtype = Heads(16, 72), jnp.bfloat16
    assert mosaic_obstacle(dtype, 256, heads, "tpu") is None
    assert "a gpu, not a tpu" in mosaic_obstacle(dtype, 256, heads, "gpu")
    assert "float32" in mosaic_obstacle(jnp.float32, 256, heads, "tpu")
    assert mosaic_obstacle(dtype, 257, heads, "tpu") is None
    assert "600 tokens" in mosaic_obstacle(dtype, 600, heads, "tpu")
    assert "70 channels" in mosaic_obstacle(dtype, 256, Heads(16, 70), "tpu")
    assert "'learned'" in mosaic_obstacle(dtype, 256, Heads(16, 72, "learned"), "tpu")
    layer = Attention(48, COUNT, attention="mosaic", dtype=dtype, rngs=nnx.Rngs(0))
    mesh = make_mesh(devices=jax.devices()[:1])
    with constrained(mesh), pytest.raises(ValueError, match="'mosaic', but the device is a cpu"):
        layer(half(0, 1, TOKENS, 48))
    with pytest.raises(ValueError, match="'mosaic' has no kernel of these heads"):
        attention_implementation("mosaic", dtype, 64)


def test_its_products_count_for_every_image():
    given = jax.ShapeDtypeStruct((5, TOKENS, 3 * COUNT * WIDTH), jnp.bfloat16)
    found = flops.count(lambda x: attend(x, None, Heads(COUNT, WIDTH), interpret=True), given)
    assert found == 5 * COUNT * 2 * (2 * TOKENS**2 * WIDTH)
