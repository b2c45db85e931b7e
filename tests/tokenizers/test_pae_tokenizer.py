"""PAE as a tokenizer of the pipeline: its frozen backbone, its pass of training, its errors."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.nn.network import Network
from gae_jax.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.nn.positions import resize_images
from gae_jax.pretrained.backbone import VisionBackbone, ViTBackbone
from gae_jax.runtime import sharding
from gae_jax.runtime.mesh import make_mesh
from gae_jax.tokenizers import pae_kind
from gae_jax.tokenizers.mae_decoder import GeneralDecoder
from gae_jax.tokenizers.pae import PAETokenizer
from gae_jax.tokenizers.pae_networks import PAE

GRID, CHANNELS = 4, 8
SIZES = dict(
    num_heads=4,
    delta_depth=1,
    latent_dim=CHANNELS,
    decoder_patch_size=8,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
    image_size=32,
)
VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=7)
BACKBONES = {
    "dinov2": partial(
        VisionBackbone, kind="dinov2", input_size=28, image_size=28, num_register_tokens=4, **VISION
    ),
    "mae": partial(
        VisionBackbone, kind="mae", input_size=28, image_size=28, intermediate_size=64, **VISION
    ),
    "vit": partial(
        ViTBackbone, image_size=32, patch_size=8, embed_dim=32, num_layers=1, num_heads=2
    ),
}
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)


KEY = jax.random.key(2)


def network(name="vit", **more):
    return Network(lambda rngs: PAETokenizer(BACKBONES[name](rngs=rngs), **SIZES | more, rngs=rngs))


def drawn(name="vit"):
    """(params, rest), all of them random: past the start, where pixels do not matter."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 5, jnp.float32)  # noqa: E731
    return jax.tree.map(draw, network(name).abstract)


@pytest.fixture(scope="module")
def arrays():
    return drawn()


@pytest.fixture(scope="module")
def model(arrays):
    return network()(*arrays)


@pytest.fixture(scope="module")
def trained(arrays):
    """What the pass of training gives with every term."""
    call = jax.jit(lambda *arrays: network()(*arrays).forward(IMAGES, KEY, terms=pae_kind.TERMS))
    return call(*arrays)


def test_it_is_the_released_model_on_images_from_minus_one():
    """The released one takes images in [0, 1], and resizes and normalises them for its encoder."""
    of_dinov2 = network("dinov2")

    @jax.jit
    def both(arrays, images):
        model = of_dinov2(*arrays)
        pixels = resize_images((images + 1) / 2, 28, antialias=False)
        pixels = (pixels - IMAGENET_MEAN) / IMAGENET_STD
        tokens = model.encoder.encoder.patch_tokens(pixels, affine=False)
        latents = model.encode(images)
        released = model.pae.compress(model.pae.delta_encoder(pixels, tokens))
        patches = model.pae.decoder(model.pae.decompress(latents))
        return latents, released, model.decode(latents), model.pae.to_images(patches)

    latents, released, images, expected = both(drawn("dinov2"), IMAGES)
    np.testing.assert_allclose(latents, released, atol=1e-4)
    np.testing.assert_allclose((images + 1) / 2, expected, atol=1e-4)
    assert (
        latents.shape[1:] == of_dinov2(*of_dinov2.abstract).latent_shape == (GRID, GRID, CHANNELS)
    )
    assert images.dtype == latents.dtype == jnp.float32


def test_the_encoder_s_last_norm_has_no_weights():
    """Their values do not matter, those of the other norms do."""
    params, rest = drawn("dinov2")
    call = jax.jit(lambda *arrays: network("dinov2")(*arrays).encode(IMAGES))
    want = call(params, rest)
    for name, matters in (("norm", False), ("blocks", True)):
        other = jax.tree.map(lambda x: x, rest)
        inside = other["encoder"]["encoder"][name]
        norm = inside["0"]["norm1"] if matters else inside
        norm |= {key: 1 + 2 * value for key, value in norm.items()}
        assert (np.max(np.abs(call(params, other) - want)) > 1e-3) == matters


@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_learns_nothing(name):
    """Its weights and position tables are no parameters: nothing reaches them."""
    params, rest = network(name).abstract
    assert set(params) == {"pae"}
    own = Network(BACKBONES[name])  # whose weights fit by name
    shapes = partial(jax.tree.map, lambda x: x.shape)
    learned, tables = map(shapes, own.abstract)
    assert shapes(rest["encoder"]) == {"encoder": learned["encoder"] | tables.get("encoder", {})}
    sharding.shard((params, rest), make_mesh(1, 4, 2))  # every leaf has a rule
    assert set(rest["pae"]) == {"delta_encoder", "decoder"}
    for module, table in (("delta_encoder", "pos_embed"), ("decoder", "decoder_pos_embed")):
        assert set(rest["pae"][module]) == {table}


def test_the_default_is_the_released_size():
    """`PAE`'s own defaults have the release's number of parameters (test_pae.py)."""
    sizes = pae_kind.sizes()
    for name in ("angles", "noise", "jitter", "detach_z"):
        del sizes[name]
    defaults = inspect.signature(PAE.__init__).parameters
    decoder = inspect.signature(GeneralDecoder.__init__).parameters
    for name, value in sizes.items():
        assert value == (defaults.get(name) or decoder[name]).default, name
    section = dict(name="dinov2", dinov2=dict(input_size=224, patch_size=14, hidden_size=1024))
    assert pae_kind.latent_shape(pae_kind.sizes(), section, 256) == (16, 16, 32)


def test_the_pass_of_training(model, trained):
    encoded, decoded = trained
    z = encoded.latents
    np.testing.assert_allclose(jnp.mean(z**2, axis=-1), 1, atol=1e-3)
    assert encoded.logvar is None
    assert encoded.features.shape == (2, GRID**2, 32)
    turned = model.perturbed(z, KEY)
    for angle, latents in zip(pae_kind.ANGLES, turned, strict=True):
        cosine = jnp.mean(z * latents, axis=-1)  # of tokens with mean square 1, up to eps
        np.testing.assert_allclose(jnp.degrees(jnp.arccos(cosine)), angle, atol=0.05)
        np.testing.assert_allclose(jnp.mean(latents**2, axis=-1), 1, atol=1e-4)
    assert decoded.hidden.shape == (2, GRID**2, 16)
    expected = nnx.jit(PAETokenizer.decode)(model, jnp.concatenate([z, *turned]))
    found = decoded.images, decoded.extras["middle"], decoded.extras["far"]
    np.testing.assert_allclose(jnp.concatenate(found), expected, atol=1e-4)


def test_what_no_term_asks_for_is_not_computed(arrays):
    def traced(*terms):
        call = partial(lambda a: network()(*a).forward(IMAGES, KEY, terms=terms))
        jaxpr, (_, decoded) = jax.make_jaxpr(call, return_shape=True)(arrays)
        return decoded.extras, str(jaxpr).count("f32[6,4,4,8]")

    assert traced("l1", "structure") == ({}, 0)
    extras, count = traced("l1", "continuity")
    assert set(extras) == {"middle", "far"}
    assert count > 0


def test_the_gradient_at_the_last_layer(arrays, model, trained):
    _, decoded = trained
    weights = jax.random.normal(jax.random.key(3), decoded.images.shape)

    def loss(kernel):
        params, rest = arrays
        decoder = {**params["pae"]["decoder"]}
        decoder["decoder_pred"] = {**decoder["decoder_pred"], "kernel": kernel}
        made = network()({"pae": {**params["pae"], "decoder": decoder}}, rest)
        return jnp.sum(weights * made.decode(made.encode(IMAGES)))

    want = jax.jit(jax.grad(loss))(arrays[0]["pae"]["decoder"]["decoder_pred"]["kernel"])
    found = model.at_last_layer(decoded.hidden, weights)
    np.testing.assert_allclose(found, want, atol=1e-3 * jnp.abs(want).max())


@pytest.mark.parametrize("detach_z", [False, True])
def test_continuity_teaches_the_encoder_unless_detached(arrays, trained, detach_z):
    made = network(detach_z=detach_z)(*arrays)
    z = trained[0].latents
    found = jax.grad(lambda z: sum(jnp.sum(jnp.sin(x)) for x in made.perturbed(z, KEY)))(z)
    assert (jnp.max(jnp.abs(found)) > 0) == (not detach_z)


def test_decoding_neither_normalises_nor_draws(model, trained):
    decode, z = nnx.jit(PAETokenizer.decode), trained[0].latents
    once, keys = decode(model, z), jax.random.split(KEY, 2)
    assert jnp.max(jnp.abs(decode(model, 2 * z) - once)) > 1e-3
    np.testing.assert_array_equal(decode(model, z, keys), once)


def test_one_sphere_for_all_of_an_image(arrays):
    made = network(sphere="per-sample")(*arrays)
    z = made.pae.compress(jax.random.normal(KEY, (2, GRID**2, 32)))
    assert jnp.ptp(jnp.mean(z**2, axis=-1)) > 0.1
    for angle, turned in zip(pae_kind.ANGLES, made.perturbed(z, KEY), strict=True):
        cosine = jnp.mean(z * turned, axis=(1, 2, 3))
        np.testing.assert_allclose(jnp.degrees(jnp.arccos(cosine)), angle, atol=0.05)


def test_what_does_not_fit_is_refused():
    for more, says in (
        (dict(image_size=64), "grid of 4 x 4 tokens makes images of 32 pixels.* is 64"),
        (dict(noise="off"), "noise is 'off'; use one of tangent, isotropic"),
        (dict(angles=(85.0, 42.5)), r"angles are \(85.0, 42.5\); give two between 0 and 90"),
        (dict(sphere="off"), "sphere is 'off'"),
    ):
        with pytest.raises(ValueError, match=says):
            network(**more)
    section = dict(name="vit", vit=dict(image_size=32, patch_size=8, embed_dim=32))
    with pytest.raises(ValueError, match="decoder_patch_size 16 on the backbone's grid"):
        pae_kind.latent_shape(pae_kind.sizes(), section, 32)
