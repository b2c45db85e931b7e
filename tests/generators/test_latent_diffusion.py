"""The diffusion model around its network: statistics of the latents, and RAE's DiT-DH."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_image import fit

from gae_jax.config import default_config
from gae_jax.generators import ddt, flow
from gae_jax.generators.latent_diffusion import LatentDiffusion, ddt_sizes, diffusion_network
from gae_jax.nn.network import Network

SIZES = dict(
    input_size=4, in_channels=8, hidden_size=16, depth=1, num_heads=2, num_classes=3,
    head=dict(hidden_size=32, depth=1, num_heads=2), name="ddt",
)  # fmt: skip


def test_ditdh_is_turned_around():
    """Its time begins at data, and its velocity points to the noise."""
    network = Network(
        lambda rngs: LatentDiffusion(mean=np.zeros(8), std=np.ones(8), **SIZES, rngs=rngs)
    )
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    t, labels = jnp.array([0.2, 0.9]), jnp.array([0, 3])

    @jax.jit
    def compute(key):
        params, rest = network.init(key)
        # nothing is zero, so that every output says something
        params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape),
                              params)  # fmt: skip
        own = network(params, rest)
        want = -own.dit(x, jnp.array([0.8, 0.1]), labels)
        return want, own.output(x, t, labels), own.velocity(x, jnp.float32(0.2), labels)

    want, got, at_once = compute(jax.random.key(1))
    assert np.std(want) > 0.01
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(at_once[0], want[0], atol=1e-5)


def test_a_perfect_ditdh_has_the_velocity_of_this_frame():
    """Its own target, eps - x at x_t = (1 - t) x + t eps, becomes x - eps at 1 - t."""
    data, noise = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 8))
    theirs = jnp.array([0.3, 0.6])
    ours = 1 - theirs
    t = flow.expand(theirs, data)
    np.testing.assert_allclose(
        flow.interpolate(noise, data, ours), (1 - t) * data + t * noise, atol=1e-6
    )
    np.testing.assert_allclose(flow.target_velocity(noise, data, ours), -(noise - data), atol=1e-6)


def test_sizes_of_both_parts_come_from_the_config():
    config = default_config().diffusion
    config.name = "ddt"
    sizes = ddt_sizes(config.model, config.head)
    assert ddt.SIZES["DH-XL"].items() <= sizes.items()
    assert sizes["use_pos_embed"] is True
    config.model.update(hidden_size=384, depth=1, num_heads=6)
    config.head.depth = 1
    dit = diffusion_network(config, (16, 16, 768)).abstract[0]["dit"]
    assert dit["x_embedder"]["proj"]["kernel"].shape == (1, 1, 768, 2048)
    assert dit["s_projector"]["kernel"].shape == (384, 2048)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(name="dit"), "name is 'dit'; use one of lightningdit, ddt"),
        (dict(prediction="noise"), "prediction is 'noise', but 'ddt' predicts the velocity"),
    ],
)
def test_what_there_is_not_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        Network(
            lambda rngs: LatentDiffusion(
                mean=np.zeros(8), std=np.ones(8), **SIZES | change, rngs=rngs
            )
        )


@pytest.mark.parametrize("with_mean", [True, False])
def test_statistics_of_elements_are_taken_off_and_put_back(with_mean):
    random = np.random.default_rng(0)
    mean = random.normal(3, 2, (4, 4, 8)) * with_mean
    std = random.uniform(0.5, 2, (4, 4, 8))
    network = Network(
        lambda rngs: LatentDiffusion(
            mean=mean, std=std, input_size=4, in_channels=8, hidden_size=16, depth=1, num_heads=2,
            num_classes=3, rngs=rngs,
        )
    )  # fmt: skip
    own = network(*jax.jit(network.init)(jax.random.key(0)))
    latents = (mean + std * random.normal(size=(5, 4, 4, 8))).astype(np.float32)
    x = own.normalize(latents)
    np.testing.assert_allclose(x, (latents - mean) / std, atol=1e-5)
    np.testing.assert_allclose(own.denormalize(x), latents, atol=1e-5)


def fit_one_token(narrow, wide):
    """Mean squared error of a small DiT-DH on an image of one token."""
    sizes = dict(
        name="ddt", hidden_size=narrow, depth=1, num_heads=2, use_rope=False,
        head=dict(hidden_size=wide, depth=1, num_heads=2),
    )  # fmt: skip
    return fit(sizes, channels=16, grid=1, steps=150, batch=64, rate=1e-2, dtype="float32", last=20)


@pytest.mark.slow
def test_a_head_as_wide_as_the_latent_overfits_one_image_and_a_narrow_one_cannot():
    """The bound of RAE's paper: a width d below n channels leaves (n - d) / n of the noise."""
    assert fit_one_token(8, 8) > 0.45
    assert fit_one_token(8, 32) < 0.05
