"""A tokenizer that the package does not have: a kind of some ten lines, and a config, train it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from gae_jax import tokenizers
from gae_jax.config import why_fixed
from gae_jax.config.validate import validate
from gae_jax.nn.layers import patchify, unpatchify
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime import mesh, sharding_rules
from gae_jax.runtime.errors import ConfigError
from gae_jax.stages import tokenizer as stage
from gae_jax.tokenizers.base import Decoded, Encoded, Tokenizer, at_linear
from gae_jax.tokenizers.kind import Kind
from gae_jax.train.fit import init_state, jit_step


class Patches(Tokenizer):
    """A Linear layer of each patch and one back."""

    def __init__(self, *, image_size, width, patch, rngs):
        self.patch, self.latent_shape = patch, (image_size // patch, image_size // patch, width)
        self.inwards = nnx.Linear(3 * patch**2, width, rngs=rngs)
        self.outwards = nnx.Linear(width, 3 * patch**2, use_bias=False, rngs=rngs)

    def encode_all(self, images):
        latents = self.inwards(patchify(images, self.patch))
        return Encoded(latents.reshape(len(images), *self.latent_shape), None, None)

    def decode(self, latents, keys=None):
        tokens = latents.reshape(len(latents), -1, latents.shape[-1])
        return unpatchify(self.outwards(tokens), self.patch)

    def forward(self, images, key, *, terms, mode=""):
        encoded = self.encode_all(images)
        hidden = encoded.latents.reshape(len(images), -1, self.latent_shape[-1])
        return encoded, Decoded(self.decode(encoded.latents), hidden, {})

    def at_last_layer(self, hidden, gradient):
        return at_linear(hidden, gradient, self.patch)


KIND = Kind(
    sizes=lambda: dict(width=4, patch=4, law="plain"),
    build=lambda section, backbone, *, image_size, rngs, **compute: Patches(
        image_size=image_size, width=section["width"], patch=section["patch"], rngs=rngs
    ),
    latent_shape=lambda section, backbone, image_size: (
        *(image_size // section["patch"],) * 2,
        section["width"],
    ),
    terms=("l1",),
    choices={"law": ("plain", "odd")},
    checks=lambda config: ["tokenizer.patches.width is 13"] * (
        config.tokenizer.patches.width == 13
    ),
    rules=((r"(in|out)wards/kernel$", ("fsdp", None)),),
)  # fmt: skip


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(sharding_rules, "_added", dict(sharding_rules._added))
    monkeypatch.setitem(tokenizers.TOKENIZERS, "patches", KIND)
    tokenizers.register("patches", KIND)


@pytest.fixture
def config():
    config = small.get_config()
    config.tokenizer.name = "patches"
    losses = {name: float(name == "l1") for name in config.tokenizer.losses}
    config.tokenizer.losses.update(losses)
    config.tokenizer.optim.warmup_steps = 0
    return config


def test_it_has_a_section_checks_and_a_latent_shape(config):
    validate(config)
    assert config.tokenizer.patches.to_dict() == KIND.sizes()
    assert tokenizers.latent_shape(config) == (4, 4, 4)
    assert set(tokenizers.without_other_sizes(config.tokenizer)) >= {"patches", "losses"}
    for change, says in (
        (dict(law="even"), "tokenizer.patches.law is 'even'"),
        (dict(law="plain", width=13), "tokenizer.patches.width is 13"),
    ):
        config.tokenizer.patches.update(change)
        with pytest.raises(ConfigError, match=says):
            validate(config)
    config.tokenizer.patches.width = 4
    config.tokenizer.losses.perceptual = 1.0
    with pytest.raises(ConfigError, match="perceptual, which tokenizer 'patches' cannot serve"):
        validate(config)
    assert why_fixed("tokenizer.patches.width")


def test_it_trains(config, tmp_path):
    session = Session(config, Run(tmp_path), devices=tuple(jax.devices()[:2]))
    made = stage.make_stage(session)
    step, shardings = jit_step(made, session.mesh)
    state = made.begin(init_state(made, shardings, 0))
    images = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3), np.uint8)
    batch = mesh.put_batch({"image": images}, session.mesh)
    before = jax.device_get(state.params["tokenizer"])
    phase = stage.phase_of(config.tokenizer, 0)
    state, figures = step(state, batch, jax.random.key(0), made.frozen, phase)
    assert np.isfinite(figures["l1"])
    after = jax.device_get(state.params["tokenizer"])
    assert np.any(after["outwards"]["kernel"] != before["outwards"]["kernel"])
    latents = tokenizers.tokenizer_network(config)(after, {}).encode(jnp.zeros((1, 16, 16, 3)))
    assert latents.shape == (1, *tokenizers.latent_shape(config))
