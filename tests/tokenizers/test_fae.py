"""FAE's networks: the paper's parameter counts, and what its text says that they do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.nn import losses
from gae_jax.nn.network import Keys, Network
from gae_jax.runtime import sharding
from gae_jax.runtime.mesh import make_mesh
from gae_jax.tokenizers.fae_networks import FeatureAutoencoder, PixelDecoder

SMALL = dict(
    feature_dim=16, latent_dim=3, num_patches=9, encoder_heads=2, encoder_head_dim=12,
    decoder_depth=2, decoder_heads=2, decoder_hidden=20,
)  # fmt: skip


def small(**more):
    """A small autoencoder with drawn arrays; layers that start one by one take longer."""
    network, rng = Network(partial(FeatureAutoencoder, **SMALL | more)), np.random.default_rng(0)
    return network(
        *jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), network.abstract
        )
    )


encode = nnx.jit(lambda model, x: model.encode(x))
reconstruct = nnx.jit(lambda model, z: model.reconstruct(z))


def features(batch=2):
    return jax.random.normal(jax.random.key(1), (batch, 9, 16))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameters():
    autoencoder, pixels = Network(FeatureAutoencoder), Network(PixelDecoder)
    params, rest = autoencoder.abstract
    assert size(params["encoder"]) == 38_166_592
    assert size(params["decoder"]) == 170_428_416
    assert pixels.size == 305_360_896
    assert not jax.tree.leaves((rest, pixels.abstract[1]))


def test_every_leaf_has_a_rule():
    for build in (FeatureAutoencoder, partial(FeatureAutoencoder, encoder="linear"), PixelDecoder):
        sharding.shard(Network(build).abstract, make_mesh(1, 4, 2))


def test_the_encoder_spreads_over_the_mesh():
    mesh = make_mesh(1, 4, 2)
    share, _, _ = sharding.unsharded(Network(FeatureAutoencoder).abstract, mesh)
    assert share < 0.02


def test_shapes_at_the_papers_size():
    def call(x):
        model = FeatureAutoencoder(rngs=Keys(0))
        mean, logvar = model.encode(x)
        found = model.reconstruct(mean)
        return mean, logvar, found, PixelDecoder(rngs=Keys(0))(found)

    mean, logvar, found, images = jax.eval_shape(
        call, jax.ShapeDtypeStruct((2, 256, 1536), jnp.bfloat16)
    )
    assert mean.shape == logvar.shape == (2, 256, 32)
    assert found.shape == (2, 256, 1536)
    assert images.shape == (2, 256, 256, 3)
    assert {x.dtype for x in (mean, logvar, found, images)} == {jnp.dtype("float32")}


def test_the_encoder_is_what_the_paper_says():
    """Written out in fp64: softmax(q k^T / sqrt(d)) v, plus a Linear, SiLU, Linear."""
    model, x = small(), features()
    layers = {
        name: (np.float64(layer.kernel[...]), np.float64(layer.bias[...]))
        for name, layer in (
            ("qkv", model.encoder.qkv), ("skip", model.encoder.skip),
            ("moments", model.encoder.moments),
        )
    }  # fmt: skip

    def apply(name, x):
        return x @ layers[name][0] + layers[name][1]

    q, k, v = np.split(apply("qkv", np.float64(x)), 3, axis=-1)
    heads = []
    for part in (slice(0, 12), slice(12, 24)):
        scores = np.exp(q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(12))
        heads.append(scores / scores.sum(axis=-1, keepdims=True) @ v[..., part])
    h = np.concatenate(heads, axis=-1) + apply("skip", np.float64(x))
    want = apply("moments", h / (1 + np.exp(-h)))
    mean, logvar = encode(model, x)
    np.testing.assert_allclose(np.concatenate([mean, logvar], -1), want, rtol=1e-4, atol=1e-6)


def test_the_encoder_knows_no_places():
    model, x = small(), features()
    order = np.random.default_rng(0).permutation(9)
    for before, after in zip(encode(model, x), encode(model, x[:, order]), strict=True):
        np.testing.assert_allclose(after, before[:, order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("encoder", "local"), [("linear", True), ("attention", False)])
def test_only_attention_mixes_tokens(encoder, local):
    model, x = small(encoder=encoder), features()
    before, _ = encode(model, x)
    after, _ = encode(model, x.at[:, 4].add(1.0))
    moved = np.any(np.abs(after - before) > 1e-6, axis=(0, 2))
    np.testing.assert_array_equal(moved, np.arange(9) == 4 if local else np.ones(9, bool))


def test_the_decoder_knows_places():
    """By its table, and by the rotation of q and k alone."""
    model = small()
    z = jax.random.normal(jax.random.key(2), (1, 9, 3))
    order = np.arange(9)[::-1].reshape(3, 3).T.ravel()  # no symmetry of distances along rows
    model.decoder.pos_embed[...] = jnp.zeros_like(model.decoder.pos_embed[...])
    got = reconstruct(model, z[:, order]) - reconstruct(model, z)[:, order]
    assert np.max(np.abs(got)) > 1e-4
    plain = [block(model.decoder.z_proj(z), None) for block in model.decoder.blocks]
    mixed = [block(model.decoder.z_proj(z[:, order]), None) for block in model.decoder.blocks]
    for before, after in zip(plain, mixed, strict=True):
        np.testing.assert_allclose(after, before[:, order], rtol=1e-4, atol=1e-6)


def test_the_posterior():
    model, x = small(), features()
    mean, logvar = encode(model, x)
    np.testing.assert_array_equal(mean, encode(model, x)[0])
    one, other = (model.sample(mean, logvar, jax.random.key(key)) for key in (0, 1))
    assert np.all(one != other)
    assert losses.gaussian_kl(mean, logvar) > 0
    assert losses.gaussian_kl(jnp.zeros(3), jnp.zeros(3)) == 0
    many = jax.vmap(lambda key: model.sample(mean, logvar, key))(
        jax.random.split(jax.random.key(2), 4000)
    )
    np.testing.assert_allclose(np.mean(many, axis=0), mean, atol=0.1)
    np.testing.assert_allclose(np.std(many, axis=0), np.exp(logvar / 2), rtol=0.1)


def test_extreme_variances_are_clamped():
    model = small(encoder="linear")
    model.encoder.bias[...] = jnp.array([0.0] * 3 + [-1e4, 0.0, 1e4])
    _, logvar = encode(model, jnp.zeros((1, 9, 16)))
    np.testing.assert_array_equal(logvar[0, 0], [-30, 0, 20])


def test_reconstructions_have_mean_square_one_at_first():
    model = FeatureAutoencoder(**SMALL, rngs=Keys(0))
    got = reconstruct(model, jax.random.normal(jax.random.key(0), (2, 9, 3)))
    np.testing.assert_allclose(np.mean(np.square(got), axis=-1), 1, rtol=1e-2)


def test_a_patch_of_pixels_comes_from_its_token():
    model = PixelDecoder(
        feature_dim=16, num_patches=9, patch_size=4, embed_dim=8, depth=0, num_heads=2, hidden=8,
        rngs=Keys(0),
    )  # fmt: skip
    x = features()
    moved = np.any(model(x) != model(x.at[:, 5].add(1.0)), axis=(0, 3))
    want = np.zeros((12, 12), bool)
    want[4:8, 8:12] = True
    np.testing.assert_array_equal(moved, want)


@pytest.mark.parametrize("name", ["nothing_saveable", "dots_saveable"])
def test_rematerialised_blocks_give_the_same(name):
    z = jax.random.normal(jax.random.key(0), (1, 9, 3))
    np.testing.assert_allclose(
        reconstruct(small(remat=name), z), reconstruct(small(), z), atol=1e-5
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(encoder="conv"), "encoder is 'conv'; use one of attention, linear"),
        (dict(num_patches=10), "num_patches is 10, which is not a square number"),
        (dict(remat="all"), "remat is 'all'"),
        (dict(attention="flash"), "attention is 'flash'"),
    ],
)
def test_bad_arguments_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        small(**sizes)
