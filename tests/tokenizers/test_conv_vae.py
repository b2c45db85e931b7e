"""The convolutional autoencoder against LightningDiT's, its weights there and back, its Gaussian.

A golden file holds weights (`state.NAME`), inputs and outputs (`io.NAME`, channels first) of the
released PyTorch modules in fp32.
"""

from functools import cache, partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import arguments_of, channels_last, check

from gae_jax.interop.convert import ConversionError, export_torch, import_torch
from gae_jax.nn import losses
from gae_jax.nn.gaussian import DiagonalGaussian
from gae_jax.nn.network import Network
from gae_jax.runtime import sharding
from gae_jax.runtime.mesh import make_mesh
from gae_jax.tokenizers import conv_kind, conv_torch, conv_vae

TABLES = {
    "vavae_encoder": conv_torch.ENCODER,
    "sdvae_encoder": conv_torch.ENCODER,
    "vavae_decoder": conv_torch.DECODER,
    "sdvae_decoder": conv_torch.DECODER,
}
ENCODERS, DECODERS = list(TABLES)[:2], list(TABLES)[2:]
SMALL = dict(
    ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=16, embed_dim=3
)
run = nnx.jit(lambda model, x: model(x))


def golden(name):
    """(arguments of the module, {torch name: weight}, {name: input or output, channels last})."""
    config, groups = golden_files.golden(name)
    sizes = arguments_of(TABLES[name].module, config)
    return sizes, groups["state"], channels_last(groups["io"])


@cache
def network_of(name, **more):
    return Network(partial(TABLES[name].module, **golden(name)[0], **more))


def load(name, **more):
    """The module with the golden weights."""
    network = network_of(name, **more)
    arrays = import_torch(TABLES[name], golden(name)[1], network)
    return network(*jax.tree.map(jnp.asarray, arrays))


def random_model(module, seed=0, **sizes):
    """A module whose arrays are all random, the ones that start at zero too."""
    network, rng = Network(partial(module, **sizes)), np.random.default_rng(seed)
    return network(
        *jax.tree.map(
            lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype),
            network.abstract,
        )
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name):
    model, io = load(name), golden(name)[2]
    found = nnx.jit(lambda model, x: (model.encoder(x), model.moments(x), model(x)))(
        model, io["image"]
    )
    encoder_out, moments, posterior = found
    check("encoder_out", encoder_out, io["encoder_out"])
    check("moments", moments, io["moments"])
    for key, got in (
        ("mean", posterior.mean),
        ("logvar", posterior.logvar),
        ("std", posterior.std),
        ("sample", posterior.mean + posterior.std * io["noise"]),
    ):
        check(key, got, io[key])
    extreme = DiagonalGaussian.from_moments(io["extreme_moments"])
    np.testing.assert_array_equal(extreme.logvar, io["extreme_logvar"])
    check("extreme_std", extreme.std, io["extreme_std"])


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name):
    model, io = load(name), golden(name)[2]
    check("image", run(model, io["latent"]), io["image"])
    check(
        "image_without_post_quant",
        run(model.decoder, io["latent"]),
        io["image_without_post_quant"],
    )


def test_a_decoder_without_post_quant_conv_is_the_decoder_alone():
    sizes, state, io = golden("vavae_decoder")
    state = {key: value for key, value in state.items() if not key.startswith("post_quant")}
    network = network_of("vavae_decoder", post_quant=False)
    arrays = import_torch(conv_torch.DECODER, state, network)
    model = network(*jax.tree.map(jnp.asarray, arrays))
    check("image", run(model, io["latent"]), io["image_without_post_quant"])
    exported = export_torch(conv_torch.DECODER, *arrays, **sizes, post_quant=False)
    assert exported.keys() == state.keys()


@pytest.mark.parametrize("name", TABLES)
def test_weights_survive_the_round_trip(name):
    sizes, state, _ = golden(name)
    arrays = import_torch(TABLES[name], state, network_of(name))
    exported = export_torch(TABLES[name], *arrays, **sizes)
    assert exported.keys() == state.keys()
    for key, want in state.items():
        assert exported[key].dtype == want.dtype, key
        np.testing.assert_array_equal(exported[key], want, err_msg=key)


@pytest.mark.parametrize(
    ("table", "sizes"),
    [
        (conv_torch.ENCODER, dict(ch_mult=(1,) * conv_torch.LEVELS, attn_resolutions=())),
        (conv_torch.DECODER, dict(ch_mult=(1,), num_res_blocks=10, attn_resolutions=(16,))),
    ],
)
def test_weights_of_other_sizes_survive_the_round_trip(table, sizes):
    """All levels have rows; eleven blocks are not sorted as strings."""
    sizes = SMALL | sizes
    network, rng = Network(partial(table.module, **sizes)), np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), network.abstract
    )
    tensors = export_torch(table, *arrays, **sizes)
    jax.tree.map(np.testing.assert_array_equal, import_torch(table, tensors, network), arrays)
    assert len(tensors) == len(jax.tree.leaves(arrays))


def test_one_file_serves_both_halves():
    """LDM keeps encoder, decoder and the networks of the loss in one state dict."""
    whole = golden("vavae_encoder")[1] | golden("vavae_decoder")[1]
    whole["loss.perceptual_loss.lin0.model.1.weight"] = np.zeros(3, np.float32)
    for name in ("vavae_encoder", "vavae_decoder"):
        got = import_torch(TABLES[name], whole, network_of(name))
        want = import_torch(TABLES[name], golden(name)[1], network_of(name))
        jax.tree.map(np.testing.assert_array_equal, got, want)
        with pytest.raises(ConversionError, match=r"unexpected: surplus \[3\]"):
            import_torch(TABLES[name], whole | {"surplus": np.zeros(3)}, network_of(name))


@pytest.mark.parametrize("name", TABLES)
def test_every_missing_tensor_is_named(name):
    _, state, _ = golden(name)
    network = network_of(name)
    for missing in list(state)[::5]:
        rest = {key: value for key, value in state.items() if key != missing}
        with pytest.raises(ConversionError) as error:
            import_torch(TABLES[name], rest, network)
        lines = [line.strip() for line in str(error.value).splitlines()[1:]]
        assert lines == [f"missing: {missing} {list(state[missing].shape)}"]


@cache
def preset(module, name):
    return Network(partial(module, **conv_kind.PRESETS[name]))


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        # Stable Diffusion's has 83,653,863 in all
        (conv_vae.ConvEncoder, "sdvae", 34_163_664),
        (conv_vae.ConvDecoder, "sdvae", 83_653_863 - 34_163_664),
        (conv_vae.ConvEncoder, "vavae", 28_417_408),
        (conv_vae.ConvDecoder, "vavae", 41_418_659),
    ],
)
def test_parameters(module, name, count):
    network = preset(module, name)
    assert network.size == count
    assert not jax.tree.leaves(network.abstract[1])  # all of it is learned


def test_parameters_of_the_decoder_of_aligntok():
    """41.42 M: VA-VAE's decoder without the layer before it."""
    sizes = shapes(preset(conv_vae.ConvDecoder, "vavae")).items()
    alone = sum(np.prod(shape) for path, shape in sizes if path.startswith("decoder/"))
    assert alone == 41_417_603 == 41_418_659 - (32 * 32 + 32)


def shapes(network):
    leaves = jax.tree_util.tree_flatten_with_path(network.abstract[0])[0]
    return {sharding.path_of(path): leaf.shape for path, leaf in leaves}


def test_attention_lies_where_the_presets_say():
    for name, wanted in (("vavae", {"4"}), ("sdvae", set())):
        for module in (conv_vae.ConvEncoder, conv_vae.ConvDecoder):
            found = shapes(preset(module, name))
            assert {path.split("/")[2] for path in found if "/attn/" in path} == wanted
            assert any("/mid/attn_1/q/" in path for path in found)


def test_width_of_the_latent_changes_only_the_first_layer_of_the_decoder():
    """AlignTok swaps d = 32 for 64."""
    one, other = (
        shapes(Network(partial(conv_vae.ConvDecoder, **SMALL, z_channels=d, post_quant=False)))
        for d in (32, 64)
    )
    assert [path for path in one if one[path] != other[path]] == ["decoder/conv_in/kernel"]


def test_any_size_that_divides_is_taken_and_others_are_refused():
    encoder = random_model(conv_vae.ConvEncoder, **SMALL)
    decoder = random_model(conv_vae.ConvDecoder, **SMALL)
    posterior = run(encoder, jnp.ones((1, 24, 8, 3)))
    assert posterior.mean.shape == (1, 12, 4, 3)
    assert run(decoder, posterior.mean).shape == (1, 24, 8, 3)
    with pytest.raises(ValueError, match=r"multiples of 2, got \[1, 16, 15, 3\]"):
        encoder(jnp.zeros((1, 16, 15, 3)))
    with pytest.raises(ValueError, match="48 channels do not divide into 32 groups"):
        conv_vae.ConvEncoder(ch=48, rngs=nnx.Rngs(0))


def test_bf16_stays_near_fp32_with_parameters_in_fp32():
    for name, given, wanted in (
        ("vavae_encoder", "image", "moments"),
        ("vavae_decoder", "latent", "image"),
    ):
        model, io = load(name, dtype=jnp.bfloat16), golden(name)[2]
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
        half = model.encoder if given == "image" else model.decoder
        assert jax.eval_shape(half, io[given]).dtype == jnp.bfloat16
        got = nnx.jit(lambda model, x: getattr(model, "moments", model)(x))(model, io[given])
        assert got.dtype == jnp.float32
        check(wanted, got, io[wanted], tolerance=0.1)


def test_rematerialisation_changes_no_gradient():
    def gradient(remat):
        sizes = SMALL | dict(ch_mult=(1,), resolution=8)
        model = random_model(conv_vae.ConvDecoder, **sizes, remat=remat)
        loss = nnx.jit(nnx.grad(lambda model, z: jnp.mean(jnp.square(model(z)))))
        return nnx.to_pure_dict(loss(model, jnp.ones((1, 8, 8, 3))))

    want, got = gradient("none"), gradient("nothing_saveable")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)
    with pytest.raises(ValueError, match="remat is 'some'"):
        conv_vae.ConvDecoder(remat="some", rngs=nnx.Rngs(0))


def test_a_gaussian_is_sampled_and_its_kl_is_a_mean_per_element():
    rng = np.random.default_rng(0)
    gaussian = DiagonalGaussian.from_moments(rng.normal(size=(4, 3, 3, 10)))
    mean, var = np.asarray(gaussian.mean, np.float64), np.exp(np.asarray(gaussian.logvar))
    want = np.mean(0.5 * (mean**2 + var - 1 - np.log(var)))
    np.testing.assert_allclose(losses.gaussian_kl(gaussian.mean, gaussian.logvar), want, rtol=1e-6)
    key = jax.random.key(0)
    noise = jax.random.normal(key, gaussian.mean.shape)
    drawn = gaussian.mean + gaussian.std * noise
    np.testing.assert_allclose(gaussian.sample(key), drawn, rtol=1e-6)


def test_rules_shard_the_autoencoder():
    mesh = make_mesh(1, 8, 1)
    for module in (conv_vae.ConvEncoder, conv_vae.ConvDecoder):
        params = preset(module, "vavae").abstract[0]
        tree = {"params": {"tokenizer": params}}
        shardings = jax.tree.leaves(sharding.shard(tree, mesh))
        leaves = jax.tree.leaves(params)
        whole = sum(
            leaf.size
            for leaf, sharding in zip(leaves, shardings, strict=True)
            if sharding.is_fully_replicated
        )
        assert whole < 0.02 * sum(leaf.size for leaf in leaves)
        assert sharding.unsharded(tree, mesh)[0] < 0.02
