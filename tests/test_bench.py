"""The benchmark: exact counts of operations, and every work at a tiny size."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.errors import ConfigError
from gae_jax.models import layers
from gae_jax.models.dit import LightningDiT
from gae_jax.models.gae import GAE
from gae_jax.validation import validate


class OneGPU:
    compute_capability = "9.0"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(layers.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(layers.jax, "local_devices", lambda: [OneGPU()])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "why"),
    [
        ("bfloat16", 72, None),
        ("float16", 128, None),
        ("float32", 64, "activations are float32"),
        ("bfloat16", 136, "heads have 136 channels"),
        ("bfloat16", 36, "heads have 36 channels"),
    ],
)
def test_where_auto_takes_cudnn(dtype, head_dim, why, on_gpu):
    choose = layers.attention_implementation
    assert choose("xla", dtype, head_dim) == "xla"
    assert choose("auto", dtype, head_dim) == ("xla" if why else "cudnn")
    if why is None:
        assert choose("cudnn", dtype, head_dim) == "cudnn"
    else:
        with pytest.raises(ValueError, match=f"attention is 'cudnn', but {why}"):
            choose("cudnn", dtype, head_dim)


def test_an_old_gpu_has_no_cudnn_attention(on_gpu, monkeypatch):
    for capability in ("7.5", "gfx90a"):
        monkeypatch.setattr(OneGPU, "compute_capability", capability)
        assert layers.attention_implementation("auto", "bfloat16", 64) == "xla"


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(layers, "_said", [])
    caplog.set_level(logging.INFO)
    for dtype in ("bfloat16", "float32"):
        assert layers.attention_implementation("auto", dtype, 64) == "xla"
    assert caplog.messages == ["attention: xla (the device is a cpu, not a gpu)"]


@pytest.mark.parametrize("model", [GAE, LightningDiT])
def test_attention_names(model):
    sizes = dict(rngs=nnx.Rngs(0))
    if model is GAE:
        sizes |= dict(image_size=8, patch_size=4, embed_dim=32, num_layers=1, num_heads=4)
    else:
        sizes |= dict(input_size=2, in_channels=4, hidden_size=32, depth=1, num_heads=4)
    with pytest.raises(ValueError, match=r"attention is 'flash'; use one of auto, xla, cudnn"):
        model(**sizes, attention="flash")
    built = {name: model(**sizes, attention=name) for name in layers.ATTENTIONS}

    def call(model):
        if isinstance(model, GAE):
            return model.decode(model.encode(jnp.ones((1, 8, 8, 3))))
        return model(jnp.ones((1, 2, 2, 4)), jnp.ones(1), jnp.zeros(1, jnp.int32))

    with pytest.raises(ValueError, match="but activations are float32"):
        call(built["cudnn"])
    for name in ("auto", "xla"):
        assert np.all(np.isfinite(call(built[name])))


def test_an_unknown_attention_is_refused_in_the_config(config):
    config.diffusion.compute.attention = "flash"
    with pytest.raises(ConfigError, match=r"diffusion\.compute\.attention is 'flash'"):
        validate(config)


def test_attention_by_name_is_what_it_was():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
    named = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    np.testing.assert_array_equal(named, jax.nn.dot_product_attention(q, k, v))
