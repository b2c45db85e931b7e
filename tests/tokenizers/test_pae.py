"""The networks of PAE: sizes, start values, and what its architecture promises."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.config.validate import validate
from gae_jax.nn.network import Keys, Network, variables_of
from gae_jax.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.nn.positions import resize_images
from gae_jax.runtime import sharding
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.mesh import make_mesh
from gae_jax.tokenizers import rae_kind
from gae_jax.tokenizers.mae_decoder import GeneralDecoder
from gae_jax.tokenizers.pae_modulator import DeltaEncoder
from gae_jax.tokenizers.pae_networks import PAE, Bottleneck

WIDTH, GRID = 32, 4
SIZES = dict(
    hidden_size=WIDTH,
    num_heads=4,
    encoder_input_size=28,
    encoder_patch_size=7,
    delta_depth=1,
    latent_dim=8,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
    decoder_patch_size=8,
)


@pytest.fixture(scope="module")
def pae():
    return nnx.jit(lambda: PAE(**SIZES, rngs=Keys(0)))()


def images_of(size, batch=2):
    return jax.random.uniform(jax.random.key(2), (batch, size, size, 3))


def tokens_of(scale=1.0):
    return scale * jax.random.normal(jax.random.key(3), (2, GRID**2, WIDTH))


def sizes_of(tree):
    """Elements of each part."""
    return {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in tree.items()}


@cache
def full_size(name=None):
    """(parameters, rest) of a whole PAE or of a decoder of RAE, shapes only."""
    if name is None:
        return Network(PAE).abstract
    return Network(partial(GeneralDecoder, hidden_size=768, **rae_kind.DECODERS[name])).abstract


def test_a_convolutional_backbone_is_refused(config):
    config.tokenizer.name, config.backbone.name = "pae", "efficientnet_lite0"
    config.tokenizer.pae.decoder_patch_size = 2
    with pytest.raises(ConfigError, match="PAE's modulator needs the patches of a ViT"):
        validate(config)


def test_parameters_are_counted_as_in_the_release():
    params, rest = full_size()
    found = sizes_of(params)
    assert found == {
        "delta_encoder": 103_496_704,
        "latent_compressor": 4_490_272,
        "latent_decompressor": 4_491_264,
        "decoder": 304_149_248,
    }
    assert sum(found.values()) == 416_627_488
    assert sizes_of(rest) == {"delta_encoder": 262_144, "decoder": 263_168}


@pytest.mark.parametrize(("name", "millions"), [("B", 86.2), ("XL", 415.1)])
def test_parameters_of_the_decoders_of_rae(name, millions):
    found = sum(leaf.size for leaf in jax.tree.leaves(full_size(name)[0]))
    assert round(found / 1e6, 1) == millions


def test_every_leaf_has_a_rule_and_large_ones_are_split():
    mesh = make_mesh(1, 4, 2)
    for abstract in (full_size(), full_size("XL")):
        sharding.shard(abstract, mesh)
        share, largest, _ = sharding.unsharded(abstract, mesh)
        assert share < 0.02, largest


def decoded(pae, latents):
    return pae.to_images(pae.decoder(pae.decompress(latents)))


def test_shapes(pae):
    latents = nnx.eval_shape(PAE.compress, pae, tokens_of())
    assert (latents.shape, latents.dtype) == ((2, GRID, GRID, 8), jnp.float32)
    images = nnx.eval_shape(decoded, pae, latents)
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), jnp.float32)


def test_images_are_resized_as_in_pytorch():
    """Bicubic with a = -0.75 and no antialias."""
    # a single bright pixel between two points is seen with the weights of the kernel
    x, step = 20, 56 / 28
    spot = jnp.zeros((1, 56, 56, 3)).at[0, :, x].set(1.0)
    got = resize_images(spot, 28, antialias=False)[0, 5, :, 1]
    a = -0.75

    def kernel(d):
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    want = [kernel((i + 0.5) * step - 0.5 - x) for i in range(28)]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_decoded_images_are_in_the_range_of_those_that_came_in(pae):
    patches = jnp.zeros((1, GRID**2, 8 * 8 * 3))
    want = np.broadcast_to(IMAGENET_MEAN, (1, 32, 32, 3))
    np.testing.assert_allclose(pae.to_images(patches), want, rtol=1e-6)
    one = patches.at[0, 1, (2 * 8 + 5) * 3 + 1].set(1.0)  # channels are the fastest axis
    bright = pae.to_images(one)[0, 2, 8 + 5]
    want = IMAGENET_MEAN + IMAGENET_STD * np.array([0, 1, 0])
    np.testing.assert_allclose(bright, want, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_latents_lie_on_the_sphere(pae, scale):
    tokens = tokens_of(scale)
    before = pae.project(tokens)
    latents = pae.compress(tokens)
    square = jnp.mean(before**2, axis=-1)
    np.testing.assert_allclose(jnp.mean(latents**2, axis=-1), square / (square + 1e-6), rtol=1e-5)
    assert jnp.max(jnp.abs(latents)) <= np.sqrt(8) * (1 + 1e-6)


@pytest.mark.parametrize("factor", [7.0, -0.5])
def test_latents_do_not_feel_the_scale_of_the_projector(pae, factor):
    model = nnx.clone(pae)
    conv = model.latent_compressor[1]
    for parameter in (conv.kernel, conv.bias):
        parameter.set_value(100 * parameter[...])  # so that eps is nothing
    want = model.compress(tokens_of())
    for parameter in (conv.kernel, conv.bias):
        parameter.set_value(factor * parameter[...])
    got = model.compress(tokens_of())
    np.testing.assert_allclose(got, np.sign(factor) * want, atol=1e-4)


def test_one_norm_for_all_of_an_image():
    make = partial(Bottleneck, hidden_size=WIDTH, num_heads=4, latent_dim=8, sphere="per-sample")
    latents = nnx.jit(lambda: make(rngs=Keys(0)))().compress(tokens_of(10.0))
    np.testing.assert_allclose(jnp.mean(latents**2, axis=(1, 2, 3)), 1, rtol=1e-4)
    assert np.ptp(jnp.mean(latents**2, axis=-1)) > 0.01
    with pytest.raises(ValueError, match="sphere is 'off'; use one of per-token, per-sample"):
        Network(partial(make, sphere="off"))


def test_decoding_does_not_normalise(pae):
    latents = jax.jit(pae.compress)(tokens_of())
    decode = jax.jit(lambda latents: decoded(pae, latents))
    assert jnp.max(jnp.abs(decode(2 * latents) - decode(latents))) > 1e-3


def layer_norm(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def modulator(mode):
    sizes = dict(dim=WIDTH, num_heads=4, img_size=28, patch_size=7, depth=1)
    return nnx.jit(lambda: DeltaEncoder(**sizes, fusion_mode=mode, rngs=Keys(0)))()


@pytest.mark.parametrize("mode", ["sft", "add"])
def test_the_modulator_starts_as_the_encoder_alone(mode):
    model, tokens = modulator(mode), layer_norm(tokens_of()).astype(np.float32)
    pixels = images_of(28)
    call = nnx.jit(DeltaEncoder.__call__)
    got = call(model, pixels, 3 * tokens)
    np.testing.assert_allclose(got, layer_norm(3 * tokens), atol=1e-5)
    np.testing.assert_allclose(call(model, pixels, tokens), tokens, atol=1e-3)
    np.testing.assert_array_equal(got, call(model, 1 - pixels, 3 * tokens))

    def loss(model):
        return jnp.sum(jnp.sin(model(pixels, tokens)))

    gradients = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model))
    fusion = gradients.pop("fusion_proj")
    assert all(jnp.max(jnp.abs(fusion[name])) > 0 for name in ("kernel", "bias"))
    del gradients["final_ln"]  # of no pixel
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        np.testing.assert_array_equal(leaf, 0, err_msg=str(path))


def test_the_modulator_scales_and_shifts():
    """gamma comes first; pixels enter only through gamma and beta."""
    model, tokens = modulator("sft"), tokens_of()
    gamma, beta = np.random.default_rng(0).normal(size=(2, WIDTH))
    model.fusion_proj.bias.set_value(jnp.asarray(np.concatenate([gamma, beta]), jnp.float32))
    want = layer_norm(np.asarray(tokens) * (1 + gamma) + beta)
    np.testing.assert_allclose(model(images_of(28), tokens), want, atol=1e-4)


@pytest.mark.parametrize("mode", ["concat", "none"])
def test_other_fusions_see_pixels_from_the_start(mode):
    model, pixels, tokens = modulator(mode), images_of(28), tokens_of()
    change = model(pixels, tokens) - model(1 - pixels, tokens)
    assert jnp.max(jnp.abs(change)) > 1e-3
    assert hasattr(model, "fusion_proj") == hasattr(model, "final_ln") == (mode == "concat")


def test_the_modulator_refuses_what_does_not_fit():
    model = modulator("sft")
    with pytest.raises(ValueError, match="takes 16 tokens of image and encoder each, got 16 and 9"):
        model(images_of(28), tokens_of()[:, :9])
    with pytest.raises(ValueError, match="got 25 and 16"):
        model(images_of(35), tokens_of())
    with pytest.raises(
        ValueError, match="fusion_mode is 'film'; use one of sft, add, concat, none"
    ):
        Network(partial(DeltaEncoder, fusion_mode="film"))
    with pytest.raises(ValueError, match=r"encoder_input_size 224 is not a multiple of .* 15"):
        Network(partial(PAE, encoder_patch_size=15))
    with pytest.raises(ValueError, match="image_size 250 is not a multiple of patch_size 16"):
        Network(partial(GeneralDecoder, image_size=250))


def test_start_values_are_those_of_torch(pae):
    """Uniform within +-1/sqrt(fan in), biases too; norms and CLS are as always."""
    flat = {
        jax.tree_util.keystr(key, simple=True, separator="."): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(variables_of(pae)[0])
    }
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(flat.pop(f"delta_encoder.fusion_proj.{name}"), 0)
    kernels = [name.removesuffix(".kernel") for name in flat if name.endswith(".kernel")]
    assert len(kernels) == 9 + 3 + 3 + 6  # modulator, both ways of the bottleneck, decoder
    for name in kernels:
        kernel = flat[f"{name}.kernel"]
        bound = 1 / np.sqrt(np.prod(kernel.shape[:-1]))
        assert np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.1, err_msg=name)
        if f"{name}.bias" in flat:
            bias = flat[f"{name}.bias"]
            assert np.abs(bias).max() <= bound
            assert bias.std() > 0.3 * bound, name
        else:
            assert name.endswith(("compressor.0.qkv", "decompressor.1.qkv"))
    assert len({flat[f"{name}.kernel"].ravel()[0].item() for name in kernels}) == len(kernels)
    np.testing.assert_array_equal(flat["decoder.trainable_cls_token"], 0)
    np.testing.assert_array_equal(flat["delta_encoder.final_ln.weight"], 1)


def test_every_parameter_has_a_gradient(pae):
    """Position tables are no parameters."""
    model = nnx.clone(pae)
    fusion = model.delta_encoder.fusion_proj.kernel  # past the start, where it is zero
    fusion.set_value(0.1 * jax.random.normal(jax.random.key(4), fusion.shape))
    tokens, pixels = tokens_of(), images_of(28)

    def loss(model):
        return jnp.mean(decoded(model, model.compress(model.delta_encoder(pixels, tokens))) ** 2)

    found = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model))
    assert "pos_embed" not in found["delta_encoder"]
    assert "decoder_pos_embed" not in found["decoder"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert jnp.max(jnp.abs(leaf)) > 0, jax.tree_util.keystr(path)


def test_layers_are_rematerialised():
    """Those of the modulator (2) and of the decoder (3), as told."""
    sizes = SIZES | dict(delta_depth=2, decoder_num_hidden_layers=3)
    for remat, count in (("none", 0), ("nothing_saveable", 5)):
        network = Network(partial(PAE, **sizes, remat=remat))

        def call(arrays, network=network):
            model = network(*arrays)
            latents = model.compress(model.delta_encoder(images_of(28), tokens_of()))
            return decoded(model, latents)

        names = [str(eqn.primitive) for eqn in jax.make_jaxpr(call)(network.abstract).eqns]
        assert names.count("remat2") + names.count("checkpoint") == count
