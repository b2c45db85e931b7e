"""FAE as a tokenizer: what its three modes compute, and which networks each of them touches."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.nn import losses
from gae_jax.nn.network import Network
from gae_jax.pretrained.backbone import VisionBackbone
from gae_jax.tokenizers import fae, fae_kind
from gae_jax.tokenizers.fae_networks import FeatureAutoencoder, PixelDecoder

BACKBONE = dict(
    kind="dinov2", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2.0,
    image_size=12, patch_size=4, input_size=12,
)  # fmt: skip
SIZES = dict(
    image_size=24, latent_dim=3, encoder_heads=2, encoder_head_dim=12, decoder_depth=1,
    decoder_heads=2, decoder_hidden=20, pixel_dim=16, pixel_depth=1, pixel_heads=2,
    pixel_hidden=20,
)  # fmt: skip


def backbone(rngs):
    return VisionBackbone(**BACKBONE, rngs=rngs)


NETWORK = Network(lambda rngs: fae.FAE(**SIZES, backbone=backbone, rngs=rngs))
KEY, OTHER = jax.random.key(0), jax.random.key(1)


def loss(encoded, decoded, images):
    """Of whatever a mode has computed."""
    if decoded.images is not None:
        return losses.mse(decoded.images, images)
    distance = losses.mse(decoded.extras["features"], encoded.features)
    return distance + losses.gaussian_kl(encoded.latents, encoded.logvar)


@pytest.fixture(scope="module")
def arrays():
    return jax.jit(NETWORK.init)(jax.random.key(3))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (2, 24, 24, 3), minval=-1)


@pytest.fixture(scope="module")
def found(arrays, images):
    """Everything that the tests look at, from one compilation."""

    def compute(arrays, images):
        params, rest = arrays
        out = {}
        for mode in fae.MODES:

            def value(params, mode=mode):
                pair = NETWORK(params, rest).forward(images, KEY, terms=(), mode=mode)
                return loss(*pair, images), pair

            out[mode] = jax.value_and_grad(value, has_aux=True)(params)
        model = NETWORK(params, rest)
        encoded = model.encode_all(images)
        features = encoded.features
        tokens, logvar = (x.reshape(2, 9, 3) for x in encoded[:2])
        pair = model.forward(images, OTHER, terms=(), mode="features")
        out["features, other key"] = pair[1].extras["features"]
        out["encoded"], out["latents"] = encoded, model.encode(images)
        out["decoded"] = model.decode(encoded.latents)
        out["by hand"] = {
            "tokens": model.encoder.encoder.patch_tokens(model.encoder.preprocess(images)),
            "mean": model.autoencoder.encode(features)[0].reshape(2, 3, 3, 3),
            "decoded": model.decoder(model.autoencoder.reconstruct(tokens)),
            "noisy_features": model.decoder(model.perturbed(features, KEY)),
            "restored_features": model.decoder(
                model.autoencoder.reconstruct(model.autoencoder.sample(tokens, logvar, KEY))
            ),
            "clean": model.decoder(features),
        }
        model.noise_std = 0.0
        out["no noise"] = model.forward(images, KEY, terms=(), mode="noisy_features")[1].images
        (_, (_, noisy)), _ = out["noisy_features"]
        gradient = jax.grad(losses.mse)(noisy.images, images)
        out["last layer"] = model.at_last_layer(noisy.hidden, gradient)
        return out

    return jax.jit(compute)(arrays, images)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_latents_are_the_means(found):
    encoded, hand = found["encoded"], found["by hand"]
    assert encoded.latents.shape == encoded.logvar.shape == (2, 3, 3, 3)
    np.testing.assert_array_equal(found["latents"], encoded.latents)
    close(encoded.latents, hand["mean"])
    close(encoded.features, hand["tokens"])  # its last norm with weight and bias
    assert found["decoded"].shape == (2, 24, 24, 3)
    close(found["decoded"], hand["decoded"])


def test_features_come_back_from_a_draw(found):
    (value, (encoded, one)), _ = found["features"]
    assert one.images is None
    assert one.extras["features"].shape == encoded.features.shape
    assert np.mean(one.extras["features"] != found["features, other key"]) > 0.99
    assert losses.gaussian_kl(encoded.latents, encoded.logvar) > 0
    assert value > 0


@pytest.mark.parametrize("mode", ["noisy_features", "restored_features"])
def test_pixels_come_from(mode, found):
    (_, (_, decoded)), _ = found[mode]
    close(decoded.images, found["by hand"][mode])
    assert np.max(np.abs(decoded.images - found["by hand"]["clean"])) > 1e-3


def test_without_noise_pixels_come_from_the_features(found):
    close(found["no noise"], found["by hand"]["clean"])


def test_the_noise_has_one_fixed_deviation(arrays):
    model = NETWORK(*arrays)
    x = jax.random.normal(KEY, (64, 9, 160))
    noise = model.perturbed(x, OTHER) - x
    np.testing.assert_allclose(np.std(noise), 0.4, rtol=0.01)
    each = np.std(noise, axis=(1, 2))  # of every image, unlike RAE's
    np.testing.assert_allclose(each, 0.4, rtol=0.1)


def test_each_mode_reaches_its_own_networks(found):
    for mode, name in zip(fae.MODES, ("autoencoder", "decoder", "decoder"), strict=True):
        _, grads = found[mode]
        touched = {name for name, part in grads.items() if any(map(np.any, jax.tree.leaves(part)))}
        assert touched == {name}
        assert set(grads) == {"autoencoder", "decoder"}  # the backbone is no parameter


def test_noisy_features_need_no_autoencoder(arrays, images):
    params, rest = arrays
    broken = jax.tree.map(lambda x: x * jnp.nan, params["autoencoder"])

    @jax.jit
    def run(params):
        model = NETWORK(params, rest)
        return model.forward(images, KEY, terms=("l1",), mode="noisy_features")[1].images

    assert np.all(np.isfinite(run(params | {"autoencoder": broken})))


def test_gradient_at_the_last_layer(found):
    _, grads = found["noisy_features"]
    want = grads["decoder"]["linear_out"]["kernel"]
    np.testing.assert_allclose(found["last layer"], want, atol=1e-7, rtol=1e-4)


def test_the_default_sizes_are_the_papers():
    """Those of the networks' own defaults, which `test_fae.py` counts to the unit."""
    defaults = {
        name: {key: p.default for key, p in inspect.signature(module.__init__).parameters.items()}
        for name, module in (("features", FeatureAutoencoder), ("pixels", PixelDecoder))
    }
    sizes, own = fae_kind.sizes(), inspect.signature(fae.FAE.__init__).parameters
    for key, value in sizes.items():
        assert own[key].default == value
        if key.startswith("pixel_"):
            other = {"dim": "embed_dim", "heads": "num_heads"}
            key = key.removeprefix("pixel_")
            assert defaults["pixels"][other.get(key, key)] == value
        elif key != "noise_std":
            assert defaults["features"][key] == value


def test_the_shape_of_latents_is_known_before():
    section = {"name": "dinov2", "dinov2": dict(input_size=224, patch_size=14, hidden_size=1536)}
    assert fae_kind.KIND.latent_shape(fae_kind.sizes(), section, 256) == (16, 16, 32)


def test_other_modes_are_refused(arrays, images):
    with pytest.raises(ValueError, match="the mode is 'pixels'; give every phase"):
        NETWORK(*arrays).forward(images, KEY, terms=(), mode="pixels")


def test_an_image_that_the_grid_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="image_size 25 is not a multiple"):
        jax.eval_shape(
            lambda: fae.FAE(**SIZES | dict(image_size=25), backbone=backbone, rngs=nnx.Rngs(0))
        )
