"""DGAE: what its formulas say, and its stage, at sizes that compile in a moment."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from gae_jax.commands.cli import run_command
from gae_jax.config import load_config
from gae_jax.config.validate import validate
from gae_jax.generators import flow
from gae_jax.nn import losses
from gae_jax.nn.conv_layers import upsample
from gae_jax.nn.gaussian import DiagonalGaussian
from gae_jax.nn.network import Network
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime import sharding
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.files import read_json
from gae_jax.runtime.mesh import make_mesh
from gae_jax.tokenizers import dgae, dgae_kind, latent_shape
from gae_jax.tokenizers.dgae import DGAE
from gae_jax.train.log import read_metrics

SIZES = dict(
    latent_dim=2,
    encoder=dict(ch=32, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=()),
    decoder=dict(
        model_channels=32, num_res_blocks=0, channel_mult=(1,), attention_resolutions=(),
        num_head_channels=32, use_scale_shift_norm=True,
    ),
)  # fmt: skip
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1, maxval=1)
LATENTS = jax.random.normal(jax.random.key(1), (2, 4, 4, 2))
KEYS = jax.random.split(jax.random.key(2), 2)


class Exact(DGAE):
    """Its velocity leads to the images, from wherever it is asked."""

    def velocity(self, x, t, latents):
        t = flow.expand(jnp.asarray(t), x)
        noise = (x - self.path.alpha(t) * self.gamma * IMAGES) / self.path.sigma(t)
        return self.gamma * IMAGES - (1 - self.sigma_min) * noise


class LightEncoder(nnx.Module):
    def __call__(self, images):
        mean = nnx.avg_pool(images[..., :2], (2, 2), strides=(2, 2))
        return DiagonalGaussian(mean, mean - 1)


class LightUNet(nnx.Module):
    """A function of all that it is told."""

    def __call__(self, x, t, z):
        z = jnp.sum(upsample(z, x.shape[1] // z.shape[1]), axis=-1, keepdims=True)
        return jnp.sin(2 * x + z + flow.expand(t, x) / 500)


@cache
def arrays():
    """All random, those that start at zero too."""
    rng, shapes = np.random.default_rng(0), Network(partial(DGAE, image_size=8, **SIZES)).abstract
    draw = lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


def make(kind=DGAE, **changes):
    return Network(partial(kind, image_size=8, **SIZES | changes))(*arrays())


def light(**changes):
    """The same with other networks, which are soon compiled."""
    model = make(**changes)
    model.encoder, model.decoder = LightEncoder(), LightUNet()
    return model


@pytest.fixture(scope="module")
def model():
    return make()


decode = nnx.jit(DGAE.decode)
forward = nnx.jit(lambda model, images, key: model.forward(images, key, terms=("velocity",)))


def test_shapes(model):
    encoded, decoded = forward(model, IMAGES, jax.random.key(0))
    assert model.latent_shape == encoded.latents.shape[1:] == encoded.logvar.shape[1:] == (4, 4, 2)
    assert encoded.features is None
    assert decoded.hidden is None
    assert decoded.images.shape == decoded.extras["velocity_error"].shape == IMAGES.shape
    np.testing.assert_array_equal(nnx.jit(DGAE.encode)(model, IMAGES), encoded.latents)
    # all of it is convolutional
    assert jax.eval_shape(model.decode, jnp.zeros((1, 6, 3, 2))).shape == (1, 12, 6, 3)


@pytest.mark.parametrize("options", [{}, {"sigma_min": 1e-2}, {"gamma": 0.6, "sigma_min": 0.1}])
def test_the_exact_velocity_stands_for_the_image_and_the_noise(options):
    model, t = make(**options), jnp.asarray([1e-3, 0.3, 0.7, 0.999])
    noise = jax.random.normal(jax.random.key(3), (4, *IMAGES.shape[1:]))
    images = jnp.tile(IMAGES, (2, 1, 1, 1))
    x = flow.interpolate(noise, model.gamma * images, t, model.path)
    velocity = flow.target_velocity(noise, model.gamma * images, t, model.path)
    np.testing.assert_allclose(model.image_of(velocity, x, t), images, atol=2e-6)
    np.testing.assert_allclose(x - flow.expand(t, x) * velocity, noise, atol=2e-6)


def test_without_options_the_path_is_the_linear_one():
    t = jnp.linspace(0.1, 0.9, 5)
    for name in ("alpha", "d_alpha", "sigma", "d_sigma", "log_slope", "drift"):
        own, linear = (getattr(path, name)(t) for path in (dgae.linear_path(0.0), flow.LINEAR))
        np.testing.assert_allclose(own, linear, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_the_path_is_consistent(sigma_min):
    """Slopes against finite differences, the drift against its definition."""
    path, t = dgae.linear_path(sigma_min), jnp.linspace(0.1, 0.9, 5)
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        np.testing.assert_allclose(jax.vmap(jax.grad(value))(t), slope(t), rtol=1e-6)
    drift = path.log_slope(t) * path.sigma(t) ** 2 - path.sigma(t) * path.d_sigma(t)
    np.testing.assert_allclose(path.drift(t), drift, rtol=1e-5)
    np.testing.assert_allclose([path.sigma(0.0), path.sigma(1.0)], [1, sigma_min], atol=1e-6)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_score_matching_is_the_velocity_with_a_weight(sigma_min):
    """|sigma s + noise|^2 = t^2 |error|^2; in papers, with u = 1 - t, (1 - u)^2."""
    path = dgae.linear_path(sigma_min)
    noise, found = (jax.random.normal(jax.random.key(k), IMAGES.shape) for k in (3, 4))
    t = jnp.asarray([0.2, 0.7])
    x = flow.interpolate(noise, IMAGES, t, path)
    wide = flow.expand(t, x)
    score = flow.score_of_velocity(found, x, t, path)
    error = found - flow.target_velocity(noise, IMAGES, t, path)
    np.testing.assert_allclose(
        jnp.square(path.sigma(wide) * score + noise), jnp.square(wide * error), atol=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"gamma": 0.6}])
def test_training_is_what_the_papers_write(options):
    """With their time u (1 is noise) and velocity noise - image, from the U-Net on up."""
    model, key = light(**options), jax.random.key(5)
    encoded, decoded = forward(model, IMAGES, key)
    latent_key, time_key, noise_key = jax.random.split(key, 3)
    z = encoded.latents + jnp.exp(encoded.logvar / 2) * jax.random.normal(latent_key, (2, 4, 4, 2))
    u = 1 - jax.nn.sigmoid(jax.random.normal(time_key, (2,)))
    noise = jax.random.normal(noise_key, IMAGES.shape)
    data, wide = model.gamma * IMAGES, flow.expand(u, IMAGES)
    x = (1 - wide) * data + wide * noise
    seen = x if not options else x / jnp.sqrt(0.36 * (1 - wide) ** 2 + wide**2)
    found = -model.decoder(seen, 1000 * u, z)
    error = decoded.extras["velocity_error"]
    np.testing.assert_allclose(error, -(found - (noise - data)), atol=1e-5)
    np.testing.assert_allclose(decoded.images, (x - wide * found) / model.gamma, atol=1e-5)
    assert np.ptp(u) > 1e-3


def test_times_of_training():
    def times(**changes):
        return np.asarray(make(**changes).times(jax.random.key(0), 4000))

    flat, shaped = times(time="uniform"), times(time_mean=1.0, time_std=0.5)
    np.testing.assert_allclose(np.quantile(flat, [0.25, 0.75]), [0.25, 0.75], atol=0.03)
    logits = np.log(shaped / (1 - shaped))
    np.testing.assert_allclose([logits.mean(), logits.std()], [1.0, 0.5], atol=0.03)


def test_the_velocity_alone_teaches_the_encoder():
    """No other term, rematerialised; and no discriminator: all there is is encoder and decoder."""

    @nnx.jit
    @nnx.grad
    def gradient(model):
        _, decoded = model.forward(IMAGES, jax.random.key(0), terms=("velocity",))
        return jnp.mean(jnp.square(decoded.extras["velocity_error"]))

    assert set(arrays()[0]) == {"encoder", "decoder"}
    assert "gan" not in dgae_kind.KIND.terms
    found = gradient(make(remat="dots_saveable"))["encoder"]["encoder"]["conv_in"]["kernel"][...]
    assert np.max(np.abs(found)) > 1e-7


@pytest.mark.parametrize("sampler", dgae.DECODE_SAMPLERS)
def test_the_exact_velocity_is_decoded_to_the_image(sampler):
    """Whatever the number of steps, from any noise."""
    for steps, options in ((1, {}), (7, {}), (7, {"gamma": 0.6, "sigma_min": 1e-3})):
        model = make(Exact, decode_steps=steps, decode_sampler=sampler, **options)
        got = model.decode(LATENTS, KEYS)
        np.testing.assert_allclose(got, IMAGES, atol=0.02 if options else 1e-5)


def test_decoding_depends_on_key_and_latent_alone(model):
    got = decode(model, LATENTS, KEYS)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(decode(model, LATENTS, KEYS), got)
    # not on its company
    np.testing.assert_allclose(decode(model, LATENTS[::-1], KEYS[::-1])[::-1], got, atol=1e-5)
    # the noise matters, and the latent does
    assert np.max(np.abs(decode(model, LATENTS, KEYS[::-1]) - got)) > 0.1
    assert np.max(np.abs(decode(model, -LATENTS, KEYS) - got)) > 1e-3


def test_without_keys_every_image_has_the_same_noise():
    model, same = light(), jnp.stack([LATENTS[0], LATENTS[0]])
    got = model.decode(same)
    np.testing.assert_allclose(got[0], got[1], atol=1e-5)
    np.testing.assert_allclose(model.decode(LATENTS)[0], got[0], atol=1e-5)
    assert np.ptp(model.decode(same, KEYS), axis=0).max() > 0.1


def test_one_step_is_the_image_that_noise_stands_for():
    """Near the mean of all images that the latent allows: blurred."""
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 3)))(KEYS)
    for name in dgae.DECODE_SAMPLERS:
        one = light(decode_steps=1, decode_sampler=name)
        want = noise + one.velocity(noise, jnp.zeros(2), LATENTS)
        np.testing.assert_allclose(one.decode(LATENTS, KEYS), want, atol=1e-5)


def test_steps_and_noise_on_the_way_change_the_image():
    ways = [(2, "euler"), (10, "euler"), (10, "euler_maruyama")]
    found = [
        light(decode_steps=steps, decode_sampler=name).decode(LATENTS, KEYS) for steps, name in ways
    ]
    for one, other in ((0, 1), (1, 2)):
        assert np.max(np.abs(found[one] - found[other])) > 0.05


@pytest.mark.parametrize(
    ("latents", "weight"), [("f8", 1e-6 / 48), ("f16", 1e-6 / 48), ("f32", 1e-6 / 96)]
)
def test_weight_of_the_kl(latents, weight):
    """1e-6 of a sum over the latent against a sum over the pixels."""
    size = dgae_kind.LATENTS[latents]
    grid = 256 // 2 ** (len(size["ch_mult"]) - 1)
    shape = (grid, grid, size["latent_dim"])
    assert dgae_kind.kl_weight(shape, 256) == pytest.approx(weight)
    mean, logvar = np.random.default_rng(0).normal(size=(2, 3, *shape))
    terms = mean**2 + np.exp(logvar) - 1 - logvar
    summed = 0.5 * terms.sum(axis=(1, 2, 3)).mean()
    got = dgae_kind.kl_weight(shape, 256) * losses.gaussian_kl(mean, logvar)
    np.testing.assert_allclose(got, 1e-6 * summed / (3 * 256**2), rtol=1e-4)
    zeros = np.zeros(shape)
    assert losses.gaussian_kl(zeros, zeros) == 0 < losses.gaussian_kl(mean, logvar)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(time="cosine"), "time is 'cosine'; use one of logit_normal, uniform"),
        (dict(decode_sampler="heun"), "decode_sampler is 'heun'"),
        (dict(decode_steps=0), "decode_steps is 0"),
        (dict(gamma=0.0), "gamma is 0.0"),
        (dict(sigma_min=1.0), "sigma_min is 1.0"),
        (dict(encoder=dict(ch_mult=5 * (1,))), r"8 pixels are no multiple of 16, by which encoder"),
        (dict(decoder=dict(channel_mult=5 * (1,))), "16, by which decoder.channel_mult"),
    ],
)
def test_settings_that_do_not_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_the_section_builds_the_module():
    """Also the sizes of the config, but for their width; steps of decoding may be others."""
    section = dgae_kind.sizes()
    assert dgae_kind.KIND.latent_shape(section, None, 256) == (16, 16, 16)
    section |= SIZES | dict(decode_steps=7)
    compute = dict(dtype=jnp.bfloat16, remat="dots_saveable", attention="xla", image_size=8)

    def built(**more):
        return nnx.eval_shape(
            lambda: dgae_kind.KIND.build(section, None, **compute, **more, rngs=nnx.Rngs(0))
        )

    assert built().decode_steps == 7
    assert built().latent_shape == (4, 4, 2)
    assert built(decode_steps=3).decode_steps == 3


def test_bf16_gives_fp32():
    model = make(dtype=jnp.bfloat16)
    encoded, decoded = jax.eval_shape(
        lambda: model.forward(IMAGES, jax.random.key(0), terms=("velocity",))
    )
    leaves = [encoded.latents, encoded.logvar, decoded.images, *decoded.extras.values()]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.decode, LATENTS).dtype == jnp.float32


def test_rules_know_all_parameters(model):
    mesh = make_mesh(1, 8, 1)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    sharding.shard({"params": {"tokenizer": params}}, mesh)


@pytest.fixture
def small(plain_config):
    """The small config with this tokenizer."""
    config = plain_config
    config.tokenizer.name = "dgae"
    config.tokenizer.dgae.update(SIZES | {"encoder": SIZES["encoder"] | {"ch_mult": (1, 1, 1)}})
    config.tokenizer.dgae.update(latent_dim=3, decode_steps=3)
    config.tokenizer.losses.update(l1=0.0, align=0.0, velocity=1.0, kl=1e-6)
    config.tokenizer.ema_decay = 0.5
    config.tokenizer.train.update(steps=2, save_every=2, log_every=1)
    config.evaluate.update(
        images=64, features="none", noise_levels=(0.0,), diagnostics=False, decode_steps=1
    )
    return config


@pytest.mark.slow
def test_the_stage_trains_it_and_its_decoder_may_make_other_steps(small, tmp_path):
    session = Session(small, Run(tmp_path / "run"), devices=tuple(jax.devices()[:1]))
    validate(small)
    for command in ("tokenizer", "evaluate"):
        run_command(command, session)
    folder = session.run.stage("tokenizer")
    rows = read_metrics(folder.path)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        np.testing.assert_allclose(row["total"], row["velocity"] + 1e-6 * row["kl"], rtol=1e-5)
        assert not any("discriminator" in name for name in row)
    assert latent_shape(small) == (4, 4, 3)
    found = read_json(tmp_path / "run" / "evaluate" / "result.json")["tokenizer"]
    assert found["decode_steps"] == 1
    assert found["held_out_images"] == 64
    network, arrays = load(folder, session.mesh)
    assert network(*arrays).decode_steps == 3


def test_steps_of_a_decoder_that_makes_none_are_refused(config):
    config.evaluate.decode_steps = 5
    with pytest.raises(ConfigError, match="decoder of tokenizer 'gae' makes no steps"):
        validate(config)


def test_sizes_of_the_configs():
    for size, shape, kl in (
        ("full", (16, 16, 16), 1e-6 / 48),
        ("f8-B", (32, 32, 4), 1e-6 / 48),
        ("f32-H", (8, 8, 32), 1e-6 / 96),
        ("digits", (4, 4, 8), 1e-6 / 24),
    ):
        config = load_config(ROOT / "configs", f"dgae:{size}")
        validate(config)
        assert latent_shape(config) == shape
        assert config.tokenizer.losses.kl == pytest.approx(kl)
        assert config.tokenizer.losses.gan == 0
    with pytest.raises(ConfigError, match="no size 'f4' in this config: use :full or :f8"):
        load_config(ROOT / "configs", "dgae:f4")
