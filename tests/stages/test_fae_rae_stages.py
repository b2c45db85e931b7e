"""FAE and RAE in the stages: phases, who learns from whom, and DiT-DH on RAE's statistics."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gae_jax.commands.cli import run_command
from gae_jax.config import default_config
from gae_jax.data.latents import LatentSet
from gae_jax.generators.sampling import MAKERS
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.sampling import bind_sampler
from gae_jax.run.session import Session
from gae_jax.runtime.mesh import put_batch
from gae_jax.stages import tokenizer
from gae_jax.train.fit import init_state, jit_step

FAE = dict(
    latent_dim=4, encoder_heads=2, encoder_head_dim=24, decoder_depth=1, decoder_heads=2,
    decoder_hidden=48, pixel_dim=32, pixel_depth=1, pixel_heads=2, pixel_hidden=48,
)  # fmt: skip
RAE = dict(
    patch_size=4, decoder_hidden_size=32, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=48,
)  # fmt: skip
DINO = dict(
    weights="random", embed_dim=16, depth=2, num_heads=2, image_size=16, patch_size=4,
    key_depths=(0,), ks=3,
)  # fmt: skip


def opened(config, path):
    return Session(config, Run(path), devices=tuple(jax.devices()[:1]))


class Steps:
    """The real stage, a step at a time."""

    def __init__(self, config, path):
        self.session = opened(config, path)
        self.stage = tokenizer.make_stage(self.session)
        self.step, shardings = jit_step(self.stage, self.session.mesh)
        self.state = self.stage.begin(init_state(self.stage, shardings, 0))
        images = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3), np.uint8)
        self.batch = put_batch({"image": images}, self.session.mesh)

    @property
    def arrays(self):
        return jax.device_get((self.state.params, self.state.rest))

    def __call__(self, phase):
        """Figures of a step, which changes the state."""
        self.state, figures = self.step(
            self.state, self.batch, jax.random.key(0), self.stage.frozen, phase
        )
        return jax.device_get(figures)


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture
def fast(config):
    """No warm-up, no perceptual term."""
    config.tokenizer.losses.update(perceptual=0.0, align=0.0)
    for name in ("optim", "discriminator_optim"):
        config.tokenizer[name].update(learning_rate=1e-3, end_learning_rate=1e-3, warmup_steps=0)
    return config


def test_each_phase_of_fae_moves_its_own_networks(fast, small_run):
    section = fast.tokenizer
    section.name = "fae"
    section.fae.update(FAE)
    section.losses.update(features=1.0, kl=1e-4)
    section.gan.update(start=0, discriminator_start=0, ramp=0)
    section.train.steps = 3
    section.phases = (
        (1, "^tokenizer/autoencoder/", ("features", "kl"), "features"),
        (1, "^tokenizer/decoder/", ("l1",), "noisy_features"),
        (1, "^(tokenizer/decoder|discriminator)/", ("l1", "gan"), "restored_features"),
    )
    steps = Steps(fast, small_run)
    backbone = load(steps.session.run.stage("backbone"), steps.session.mesh)[1][0]["encoder"]
    seen = []
    for number in range(3):
        before, figures = steps.arrays, steps(steps.stage.phase(number))
        after = steps.arrays
        held = after[1]["tokenizer"]["encoder"]["encoder"]
        assert same(held, jax.device_get(backbone))  # lent, and as it was
        parts = {name: (before[0]["tokenizer"][name], after[0]["tokenizer"][name])
                 for name in ("autoencoder", "decoder")}  # fmt: skip
        parts["discriminator"] = before[0]["discriminator"], after[0]["discriminator"]
        seen.append(({name for name, pair in parts.items() if not same(*pair)}, figures))
    moved = [names for names, _ in seen]
    assert moved == [{"autoencoder"}, {"decoder"}, {"decoder", "discriminator"}]
    losses = [set(figures) & set(section.losses) for _, figures in seen]
    assert losses == [{"features", "kl"}, {"l1"}, {"l1", "gan"}]
    assert all(np.isfinite(value) for _, figures in seen for value in figures.values())


@pytest.mark.slow
def test_raes_discriminator_learns_after_the_generator_and_alone(fast, small_run):
    section = fast.tokenizer
    section.name = "rae"
    section.rae.update(RAE)
    section.losses.gan = 0.75
    section.discriminator.update(name="dino", augment=("translation", "contrast"))
    section.discriminator.dino.update(DINO)
    section.gan.update(weight="adaptive", eps=1e-6, fresh=True, start=4, discriminator_start=2)
    on = [tokenizer.phase_of(section, step) for step in (1, 2, 3, 4)]
    assert [phase.discriminator for phase in on] == [False, True, True, True]
    assert [phase.gan for phase in on] == [False, False, False, True]
    section.gan.update(start=0, discriminator_start=0, ramp=0)
    steps = Steps(fast, small_run)
    both = steps.stage.phase(0)
    assert set(steps.state.params["tokenizer"]) == {"decoder"}  # all that an optimizer has
    start, before = jax.tree.map(jnp.copy, steps.state), steps.arrays
    figures = steps(dataclasses.replace(both, gan=False))
    after = steps.arrays
    assert "gan" not in figures
    assert not same(before[0]["discriminator"], after[0]["discriminator"])
    assert same(before[1]["tokenizer"], after[1]["tokenizer"])
    steps.state = start
    figures = steps(both)
    later = steps.arrays
    assert 0 <= figures["gan_weight"] <= 0.75e4
    assert np.isfinite(figures["gan"])
    # the generator's pass moves no power iteration: they are where the other step left them
    assert not same(before[1]["discriminator"], after[1]["discriminator"])
    assert same(later[1]["discriminator"], after[1]["discriminator"])
    assert not same(later[0]["tokenizer"], after[0]["tokenizer"])


@pytest.mark.slow
def test_ditdh_trains_on_statistics_of_elements(config, small_run, tmp_path):
    path = shutil.copytree(small_run, tmp_path / "run")
    for name in ("latents", "diffusion"):
        shutil.rmtree(path / name)
    config.latents.update(statistics="element", variance_only=True)
    config.diffusion.update(name="ddt", ema_decay=0.0)
    config.diffusion.head.update(hidden_size=48, depth=1, num_heads=2)
    config.diffusion.flow.update(time_least=1e-3, cosine_weight=0.0)
    config.diffusion.train.update(steps=2, save_every=2)
    session = opened(config, path)
    for command in ("latents", "diffusion"):
        run_command(command, session)
    found = LatentSet.open(path / "latents")
    _, (params, rest) = load(session.run.stage("diffusion"), session.mesh)
    assert "s_embedder" in params["dit"]
    assert all(map(np.all, jax.tree.map(np.isfinite, jax.tree.leaves(params))))
    assert not np.any(rest["latent_mean"])
    np.testing.assert_array_equal(rest["latent_std"], found.std)
    assert found.std.shape == (4, 4, 4)


class Known:
    """A model whose velocity is its label, and 0 without a class."""

    time_range, geometry, dit = (0.0, 1.0), "flat", SimpleNamespace(num_classes=10)

    def velocity(self, x, t, labels):
        return jnp.zeros_like(x) + jnp.where(labels == 10, 0.0, labels)[:, None]


def test_an_ode_with_parts_of_guidance_that_ends_early():
    """Steps at 0 and 0.45: guided by 0.9, then not at all; it ends at 0.9."""
    parts = ((0.1, 0.9), (0.5, 1.0), (1.0, 2.5))
    section = default_config().sample.ode.to_dict() | dict(
        steps=3, end=0.9, time_shift=1.0, guidance=1.0, guidance_parts=parts
    )
    sample = MAKERS["ode"](**bind_sampler("ode", section))
    found = sample(Known(), None, jnp.zeros((2, 1)), jnp.array([1.0, 2.0]), None)
    np.testing.assert_allclose(found.x[:, 0], 0.45 * (0.9 + 1) * np.array([1, 2]), rtol=1e-5)
    assert found.calls == 2 + 1
