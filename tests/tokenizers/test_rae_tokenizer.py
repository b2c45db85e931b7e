"""RAE as a tokenizer: its latents, the noise on them, and what learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.nn import losses
from gae_jax.nn.network import Network
from gae_jax.pretrained.backbone import VisionBackbone
from gae_jax.tokenizers import rae, rae_kind
from gae_jax.tokenizers.mae_decoder import GeneralDecoder

BACKBONE = dict(
    kind="dinov2", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2.0,
    image_size=12, patch_size=4, num_register_tokens=2, input_size=12,
)  # fmt: skip
SIZES = dict(
    image_size=24, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=20,
)  # fmt: skip


def backbone(rngs):
    return VisionBackbone(**BACKBONE, rngs=rngs)


NETWORK = Network(lambda rngs: rae.RAE(**SIZES, backbone=backbone, rngs=rngs))
KEY, OTHER = jax.random.key(0), jax.random.key(1)


@pytest.fixture(scope="module")
def arrays():
    return jax.jit(NETWORK.init)(jax.random.key(3))


@pytest.fixture(scope="module")
def found(arrays):
    """Everything that the tests look at, from one compilation."""
    images = jax.random.uniform(jax.random.key(1), (2, 24, 24, 3), minval=-1)

    def compute(arrays, images):
        params, rest = arrays

        def value(params, images):
            _, decoded = NETWORK(params, rest).forward(images, KEY, terms=("l1",))
            return losses.mse(decoded.images, 0.5), decoded

        grads, decoded = jax.grad(value, (0, 1), has_aux=True)(params, images)
        model = NETWORK(params, rest)
        model.encoder.encoder.norm.weight[...] *= 3  # not looked at
        latents, plain = model.encode(images), model.encoder.features
        to_images = jax.grad(losses.mse)(decoded.images, 0.5)
        out = {
            "grads": grads,
            "noisy": decoded.images,
            "other": model.forward(images, OTHER, terms=("l1",))[1].images,
            "latents": latents,
            "again": model.encode(images),
            "tokens": plain(images, affine=False, antialias=False),
            "antialiased": plain(images, affine=False),
            "decoded": model.decode(latents),
            "with keys": model.decode(latents, jax.random.split(KEY)),
            "last layer": model.at_last_layer(decoded.hidden, to_images),
        }
        model.noise_tau = 0.0
        out["no noise"] = model.forward(images, KEY, terms=("l1",))[1].images
        return out

    return jax.jit(compute)(arrays, images)


def test_tokens_are_normalised_without_weights(found):
    latents = found["latents"]
    assert latents.shape == (2, 3, 3, 16)
    np.testing.assert_allclose(np.mean(latents, axis=-1), 0, atol=1e-4)
    np.testing.assert_allclose(np.var(latents, axis=-1), 1, atol=1e-3)
    np.testing.assert_array_equal(latents, found["again"])


def test_images_are_resized_without_antialias(found):
    got = found["latents"].reshape(2, 9, 16)
    np.testing.assert_allclose(got, found["tokens"], atol=1e-6)
    assert np.max(np.abs(got - found["antialiased"])) > 1e-3


def test_the_decoder_alone_learns(found):
    grads, to_inputs = found["grads"]
    assert set(grads) == {"decoder"}
    assert all(map(np.any, jax.tree.leaves(grads["decoder"]["decoder_layers"])))
    assert not np.any(to_inputs)
    want = grads["decoder"]["decoder_pred"]["kernel"]
    np.testing.assert_allclose(found["last layer"], want, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(("noise", "mean"), [("uniform", 0.4), ("half_normal", 0.638)])
def test_every_image_has_noise_of_its_own_strength(noise, mean, arrays):
    model = NETWORK(*arrays)
    model.noise = noise
    z = jnp.zeros((2000, 2, 2, 64))
    strength = np.std(model.perturbed(z, KEY), axis=(1, 2, 3))
    np.testing.assert_allclose(np.mean(strength), mean, rtol=0.05)
    if noise == "uniform":
        assert np.max(strength) < 0.8 * 1.2
        np.testing.assert_allclose(np.std(strength), 0.8 / np.sqrt(12), rtol=0.1)
    else:  # mean square of a half-normal is tau^2
        np.testing.assert_allclose(np.mean(strength**2), 0.64, rtol=0.1)
        assert np.max(strength) > 1.6


def test_noise_is_for_training_alone(found):
    assert np.max(np.abs(found["noisy"] - found["other"])) > 1e-3
    assert np.max(np.abs(found["noisy"] - found["decoded"])) > 1e-3
    np.testing.assert_array_equal(found["decoded"], found["with keys"])
    np.testing.assert_allclose(found["no noise"], found["decoded"], atol=1e-6)


def test_images_leave_with_imagenets_mean_and_deviation(arrays):
    """A decoder that says 0 means the mean colour; one that says 1 is a deviation off."""
    params, rest = arrays
    last = params["decoder"]["decoder_pred"]
    decode = jax.jit(lambda params: NETWORK(params, rest).decode(jnp.zeros((1, 3, 3, 16))))
    for value in (0.0, 1.0):
        own = {"kernel": 0 * last["kernel"], "bias": 0 * last["bias"] + value}
        found = decode({"decoder": params["decoder"] | {"decoder_pred": own}})
        want = np.array([0.485, 0.456, 0.406]) + value * np.array([0.229, 0.224, 0.225])
        np.testing.assert_allclose((found[0, 5, 5] + 1) / 2, want, atol=1e-6)


@pytest.mark.parametrize(("name", "millions"), [("B", 86.2), ("L", 303.9), ("XL", 415.1)])
def test_parameters_of_the_decoder(name, millions):
    def count(depth):
        sizes = rae_kind.DECODERS[name] | dict(decoder_num_hidden_layers=depth)
        decoder = Network(lambda rngs: GeneralDecoder(**sizes, hidden_size=768, rngs=rngs))
        return sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract[0]))

    one, depth = count(1), rae_kind.DECODERS[name]["decoder_num_hidden_layers"]
    assert round((one + (depth - 1) * (count(2) - one)) / 1e6, 1) == millions


def test_the_default_is_the_released_decoder():
    assert rae_kind.sizes() | rae_kind.DECODERS["XL"] == rae_kind.sizes()
    section = {"name": "dinov2", "dinov2": dict(input_size=224, patch_size=14, hidden_size=768)}
    assert rae_kind.KIND.latent_shape(rae_kind.sizes(), section, 256) == (16, 16, 768)


def test_a_decoder_of_larger_patches_gives_larger_images():
    """ "Decoder upsampling": as many tokens, twice the pixels."""
    sizes = SIZES | dict(image_size=48, patch_size=16)

    def images():
        model = rae.RAE(**sizes, backbone=backbone, rngs=nnx.Rngs(0))
        return model.decode(jnp.zeros((1, 3, 3, 16)))

    assert jax.eval_shape(images).shape == (1, 48, 48, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(noise="normal"), "noise is 'normal'; use one of uniform, half_normal"),
        (dict(noise_tau=-1.0), r"noise_tau is -1.0; it must be >= 0"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rae.RAE(**SIZES | change, backbone=backbone, rngs=nnx.Rngs(0))
