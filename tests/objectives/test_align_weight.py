"""VA-VAE's weight of the alignment, by gradients at the encoder's last layer."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import get_config
from test_conv_tokenizer import TINY, random_arrays

from gae_jax.config import load_config
from gae_jax.config.validate import validate
from gae_jax.nn import losses
from gae_jax.nn.gaussian import DiagonalGaussian
from gae_jax.objectives import objective
from gae_jax.objectives.align_weight import vjp_by_parts
from gae_jax.objectives.objective import Objective, Targets
from gae_jax.runtime.errors import ConfigError
from gae_jax.stages import tokenizer

ROOT = Path(__file__).parents[2]
TOKENS = 64
KEY = jax.random.key(5)
WEIGHTS = dict(l1=0.7, perceptual=0.3, gan=0.5, align=0.1, kl=1e-3)


def small(**losses_of):
    config = get_config()
    config.data.image_size = 8
    config.backbone.vit.update(image_size=8, patch_size=1)
    config.tokenizer.name = "conv"
    config.tokenizer.conv.update(TINY | dict(ch_mult=(1,)))
    config.tokenizer.losses.update(WEIGHTS | losses_of)
    config.tokenizer.align.update(point="post", loss="vf", weight="adaptive")
    config.tokenizer.gan.update(start=0, discriminator_start=0, ramp=0)
    return config


def last_of(grads):
    return grads["encoder"]["encoder"]["conv_out"]["kernel"]


@pytest.fixture(scope="module")
def setup():
    config = small()
    validate(config)
    networks = tokenizer.make_networks(config)
    arrays = {name: random_arrays(network.abstract) for name, network in networks.items()}
    arrays = jax.tree.map(jnp.asarray, arrays)
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    features = rng.normal(size=(2, TOKENS, 32)).astype(np.float32)
    phase = dataclasses.replace(tokenizer.phase_of(config.tokenizer, 0), discriminator=False)
    return SimpleNamespace(
        config=config.tokenizer,
        networks=networks,
        params={name: params for name, (params, _) in arrays.items()},
        rest={name: rest for name, (_, rest) in arrays.items()},
        images=images,
        targets=Targets(features, lambda x: jnp.mean(jnp.square(x - images))),
        phase=phase,
    )


@pytest.fixture(scope="module")
def found(setup):
    """[((gradients at the last layer, of the aligner), figures)], the alignment once and twice.

    What nothing here reads is not compiled.
    """
    names = ("l1", "align", "align_weight")
    of = Objective(setup.config, **{name: setup.networks[name] for name in setup.networks})

    @jax.jit
    def compute(params, size):
        plain = objective.ALIGNMENTS["vf"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(objective.ALIGNMENTS, "vf", lambda *more: size * plain(*more))
            grads, _, figures = of.gradients(
                params, setup.rest, setup.images, setup.targets, KEY, jnp.float32(1), setup.phase
            )
        read = {n: x for n, x in figures.items() if n in names or n.startswith("encoder_last")}
        return (last_of(grads["tokenizer"]), grads["aligner"]), read

    return [compute(setup.params, size) for size in (1.0, 2.0)]


@pytest.fixture(scope="module")
def wanted(setup):
    """[gradients of pixels, of the other terms, of the alignment], by `jax.grad` of each.

    By the kernel of the encoder's last layer and the aligner's parameters.
    """

    @jax.jit
    def compute(params):
        def terms(kernel, aligner):
            encoder = params["tokenizer"]["encoder"]
            layer = {**encoder["encoder"]["conv_out"], "kernel": kernel}
            encoder = {**encoder, "encoder": {**encoder["encoder"], "conv_out": layer}}
            arrays = {**params["tokenizer"], "encoder": encoder}
            model = setup.networks["tokenizer"](arrays, setup.rest["tokenizer"])
            encoded = model.encode_all(setup.images)
            images = model.decode(DiagonalGaussian(*encoded[:2]).sample(KEY))
            tokens = encoded.latents.reshape(len(images), TOKENS, -1)
            tokens = setup.networks["aligner"](aligner, setup.rest["aligner"])(tokens)
            judge = setup.networks["discriminator"](
                params["discriminator"], setup.rest["discriminator"]
            )
            pixels = WEIGHTS["l1"] * losses.l1(images, setup.images)
            pixels += WEIGHTS["perceptual"] * setup.targets.perceptual(images)
            others = WEIGHTS["gan"] * losses.hinge_generator(judge(images, train=True))
            others += WEIGHTS["kl"] * losses.gaussian_kl(encoded.latents, encoded.logvar)
            return pixels, others, losses.vf_loss(tokens, setup.targets.aligned)

        at = last_of(params["tokenizer"]), params["aligner"]
        _, back = jax.vjp(terms, *at)
        return [back(tuple(map(jnp.float32, row))) for row in np.eye(3)]

    return compute(setup.params)


def test_the_weight_is_the_ratio_of_the_gradients_at_the_encoders_last_layer(found, wanted):
    pixels, others, align = (np.linalg.norm(kernel) for kernel, _ in wanted)
    figures = found[0][1]
    np.testing.assert_allclose(
        figures["align_weight"], WEIGHTS["align"] * pixels / (align + 1e-4), rtol=1e-3
    )
    np.testing.assert_allclose(figures["encoder_last_layer/reconstruction"], pixels, rtol=1e-3)
    assert others > 0.05 * pixels, "so that the adversarial term would be noticed"
    # a share of the reconstruction's gradient, which is what the option is for
    share = figures["encoder_last_layer/align"] / figures["encoder_last_layer/reconstruction"]
    np.testing.assert_allclose(share, WEIGHTS["align"], rtol=2e-2)


def test_gradients_are_those_of_the_weighted_sum(found, wanted):
    grads, figures = found[0]
    weights = np.float32([1, 1, figures["align_weight"]])
    sums = jax.tree.map(
        lambda *rows: sum(w * g for w, g in zip(weights, rows, strict=True)), *wanted
    )
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(sums), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(b).max()))


def test_the_size_of_the_alignment_does_not_matter(found):
    (one, figures), (two, others) = found
    np.testing.assert_allclose(others["align"], 2 * figures["align"], rtol=1e-6)
    np.testing.assert_allclose(
        others["encoder_last_layer/align"], figures["encoder_last_layer/align"], rtol=1e-2
    )
    np.testing.assert_allclose(others["align_weight"], figures["align_weight"] / 2, rtol=1e-2)
    np.testing.assert_allclose(one[0], two[0], atol=1e-2 * float(np.abs(one[0]).max()))


def test_clashes_are_explained():
    config = small(l1=0.0, perceptual=0.0)
    with pytest.raises(ConfigError, match=r"align.weight is 'adaptive', but a phase aligns witho"):
        validate(config)
    config = get_config()
    config.tokenizer.align.weight = "adaptive"
    with pytest.raises(ConfigError, match=r"tokenizer 'gae' names none; use .*one of conv"):
        validate(config)
    config.tokenizer.align.weight = "share"
    with pytest.raises(ConfigError, match=r"align.weight is 'share'; use one of constant"):
        validate(config)


def test_the_config_of_va_vae_has_it():
    config = load_config(ROOT / "configs", "vavae")
    validate(config)
    assert (config.tokenizer.align.weight, config.tokenizer.losses.align) == ("adaptive", 0.1)
    assert load_config(ROOT / "configs", "vavae:digits").tokenizer.align.weight == "constant"


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_one_output_goes_back_alone_through_a_gradient_of_ones_own(wrap):
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, on: (3 * on * jnp.cos(x),))  # not the true one

    def function(params):
        first = wrap(sine)(2 * params["a"])
        return (first, first * params["b"]), "aside"

    @jax.jit
    def run(params):
        _, back, _ = vjp_by_parts(function, params)
        return back(jnp.ones(3), 0)[0], back((jnp.ones(3), jnp.ones(3)))[0]

    params = {"a": jnp.arange(3.0), "b": jnp.full(3, 2.0)}
    alone, both = run(params)
    np.testing.assert_allclose(alone["a"], 6 * np.cos(2 * np.arange(3.0)), rtol=1e-5)
    np.testing.assert_array_equal(alone["b"], 0.0)
    np.testing.assert_allclose(both["a"], 3 * alone["a"], rtol=1e-5)
    np.testing.assert_allclose(both["b"], np.sin(2 * np.arange(3.0)), rtol=1e-5, atol=1e-7)
