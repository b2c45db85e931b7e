"""What Linear layers do on a TPU, on a CPU that is told to be one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gae_jax.nn.layers import linear
from gae_jax.runtime.mesh import TPU_OPTIONS, tpu_options


def of(monkeypatch, platform, dtype=jnp.bfloat16):
    """(text of the traced gradient, gradients) of a Linear layer."""
    monkeypatch.setattr("gae_jax.nn.linear.platform", lambda: platform)
    layer = linear(24, 40, bias=True, dtype=dtype, rngs=nnx.Rngs(0))
    layer.bias[...] = jax.random.normal(jax.random.key(1), (40,))
    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(2), (4, 64, 24)).astype(jnp.bfloat16)
    x = x.astype(dtype)

    def loss(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(x).astype(jnp.float32)))

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return str(jax.make_jaxpr(gradient)(params, x)), jax.tree.leaves(gradient(params, x))


def test_the_gradient_of_a_bias_is_a_product_on_a_tpu_and_no_less_exact(monkeypatch):
    text, elsewhere = of(monkeypatch, "cpu")
    text_there, found = of(monkeypatch, "tpu")
    assert text.count("dot_general[") == 3
    assert text_there.count("dot_general[") == 4
    _, exact = of(monkeypatch, "tpu", jnp.float32)
    np.testing.assert_array_equal(found[0], elsewhere[0])  # the loss
    for one, other, right in zip(found, elsewhere, exact, strict=True):
        one, other, right = (np.asarray(x, np.float32) for x in (one, other, right))
        assert np.abs(one - right).max() <= 1e-2 * np.abs(right).max()
        assert np.abs(one - right).max() <= 1.01 * np.abs(other - right).max()


def test_a_compiler_that_does_not_know_the_options_goes_without(caplog):
    tpu_options.cache_clear()
    assert tpu_options("cpu") == TPU_OPTIONS  # compiled for TPUs elsewhere
    assert not caplog.records
    assert tpu_options("tpu") == {}  # CPUs' compiler does not know them
    assert "are left out" in caplog.text
    tpu_options.cache_clear()
