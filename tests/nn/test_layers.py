"""Layers and whole models: shapes, invariants and the paper's parameter counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.generators import dit
from gae_jax.generators.dit import LightningDiT
from gae_jax.generators.latent_diffusion import LatentDiffusion
from gae_jax.nn import layers, losses
from gae_jax.nn.network import Keys, Network, variables_of
from gae_jax.objectives.patchgan import PatchGAN
from gae_jax.pretrained import dinov2, mae
from gae_jax.pretrained.backbone import ViTClassifier
from gae_jax.tokenizers import gae_kind
from gae_jax.tokenizers.gae import GAE
from gae_jax.tokenizers.gae_teacher import SemanticTeacher, from_windows, to_windows

SMALL = dict(image_size=16, patch_size=4, embed_dim=32, num_heads=2, latent_dim=4)


def small_gae(**more):
    return GAE(**SMALL | {"num_layers": 1} | more, rngs=Keys(0))


# Whole calls in one program; operation by operation they take several times as long
encode = nnx.jit(lambda model, x: model.encode(x))
decode = nnx.jit(lambda model, latents: model.decode(latents))
encode_all = nnx.jit(lambda model, x: model.encode_all(x))


def images(batch=2, size=16):
    return jax.random.normal(jax.random.key(1), (batch, size, size, 3))


def test_patchify_orders_row_column_channel():
    x = jnp.arange(4 * 4 * 3).reshape(1, 4, 4, 3)
    patches = layers.patchify(x, 2)
    assert patches.shape == (1, 4, 12)
    np.testing.assert_array_equal(patches[0, 1], x[0, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(layers.unpatchify(patches, 2), x)


def test_windows_are_row_major_and_invertible():
    x = jnp.arange(16 * 3).reshape(1, 16, 3)
    windows = to_windows(x, 2)
    np.testing.assert_array_equal(windows[0, 1], x[0, jnp.array([2, 3, 6, 7])].reshape(-1))
    np.testing.assert_array_equal(from_windows(windows, 2, 4), x)


def test_rope_keeps_norms_and_depends_on_distance_only():
    table = layers.rope_table(4, 8)
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    rotated_q = layers.apply_rope(jnp.broadcast_to(q, (1, 16, 1, 8)), table)[0, :, 0]
    rotated_k = layers.apply_rope(jnp.broadcast_to(k, (1, 16, 1, 8)), table)[0, :, 0]
    np.testing.assert_allclose(jnp.linalg.norm(rotated_q, axis=-1), jnp.linalg.norm(q), rtol=1e-5)
    scores = rotated_q @ rotated_k.T
    # tokens (0,0)->(1,2) and (2,1)->(3,3) are equally far apart
    np.testing.assert_allclose(scores[0, 6], scores[9, 15], rtol=1e-4)
    assert abs(scores[0, 6] - scores[0, 9]) > 1e-3


def test_latents_have_unit_mean_square_and_noise_is_optional():
    model = small_gae()
    latents = encode(model, images())
    assert latents.shape == (2, 4, 4, 4) == (2, *model.latent_shape)
    np.testing.assert_allclose(jnp.mean(latents**2, axis=-1), 1, rtol=1e-3)  # eps
    assert decode(model, latents).shape == (2, 16, 16, 3)
    assert jnp.any(model.perturbed(latents, jax.random.key(0)) != latents)
    quiet = small_gae(noise_std=0.0)
    np.testing.assert_array_equal(quiet.perturbed(latents, jax.random.key(0)), latents)


def test_dynamic_noise_has_the_released_deviation():
    model = small_gae()  # noise_std 0.2, factor 1 / 0.8: deviation 0.25
    noise = model.perturbed(jnp.zeros((20_000, 4, 4, 4)), jax.random.key(0))
    np.testing.assert_allclose(jnp.std(noise), 0.25, rtol=0.03)
    scales = jnp.std(noise, axis=(1, 2, 3))
    np.testing.assert_allclose(jnp.mean(scales), 0.25 * np.sqrt(2 / np.pi), rtol=0.03)


def test_the_patch_embedding_starts_as_released():
    """torch's kaiming_normal_(mode="fan_out", nonlinearity="relu") of [D, 3, p, p]."""
    embed_dim, patch = 256, 8
    model = small_gae(image_size=16, patch_size=patch, embed_dim=embed_dim)
    kernel = model.foundation_encoder.patch_embed.kernel[...]
    np.testing.assert_allclose(jnp.std(kernel), np.sqrt(2 / (embed_dim * patch**2)), rtol=0.02)
    np.testing.assert_allclose(jnp.mean(kernel), 0, atol=1e-4)
    assert jnp.max(jnp.abs(kernel)) > 3.5 * jnp.std(kernel)  # neither uniform nor truncated


def test_the_patch_embedding_starts_larger_where_asked():
    model = small_gae(image_size=16, patch_size=8, embed_dim=256, patch_init="fan_in")
    kernel = model.foundation_encoder.patch_embed.kernel[...]
    bound = 1 / np.sqrt(3 * 8**2)
    assert bound * 0.99 < jnp.max(jnp.abs(kernel)) <= bound
    with pytest.raises(ValueError, match="patch_init is 'fan_on'; use one of fan_out, fan_in"):
        small_gae(patch_init="fan_on")


def test_a_kl_bottleneck_encodes_means_and_decodes_samples():
    model = small_gae(bottleneck="kl")
    # logvar: from projections far below, around and far above the range
    scale = jnp.array([1, 1, 1, 1, 1, 1, 1e4, 1e4])
    model.adapter.model.kernel[...] *= scale
    x = images(8)
    latents, logvar, features = model.encode_all(x)
    moments = model.adapter(model.foundation_encoder(x)).reshape(8, 4, 4, 8)
    np.testing.assert_array_equal(latents, moments[..., :4])
    np.testing.assert_array_equal(logvar, np.clip(moments[..., 4:], -30, 20))
    assert logvar.min() == -30
    assert logvar.max() == 20
    np.testing.assert_array_equal(model.encode(x), latents)
    np.testing.assert_array_equal(features, model.foundation_encoder(x))
    many = jnp.zeros((20_000, 4, 4, 4))
    variances = jnp.array([0.25, 1.0, 4.0, 9.0])
    logvar = jnp.broadcast_to(jnp.log(variances), many.shape)
    samples = model.perturbed(many + 3, jax.random.key(0), logvar)
    np.testing.assert_allclose(jnp.mean(samples, (0, 1, 2)), 3, atol=0.03)
    np.testing.assert_allclose(jnp.var(samples, (0, 1, 2)), variances, rtol=0.02)
    assert model.decode(latents).shape == x.shape


def test_a_bottleneck_takes_a_logvar_or_none():
    latents = jnp.zeros((2, 4, 4, 4))
    with pytest.raises(ValueError, match="'kl' takes the logvar of encode_all"):
        small_gae(bottleneck="kl").perturbed(latents, jax.random.key(0))
    with pytest.raises(ValueError, match="'norm' takes no logvar"):
        small_gae().perturbed(latents, jax.random.key(0), latents)
    with pytest.raises(ValueError, match=r"bottleneck is 'vq'; use one of norm, kl"):
        small_gae(bottleneck="vq")


def test_encode_all_is_encode_and_the_features():
    model, x = small_gae(), images()
    found = model.encode_all(x)
    np.testing.assert_array_equal(found.latents, model.encode(x))
    np.testing.assert_array_equal(found.features, model.foundation_encoder(x))
    assert found.logvar is None
    assert len(jax.tree.leaves(found)) == 2


def test_the_gradient_at_the_last_layer_from_what_enters_it():
    """hidden^T @ d(loss)/d(patches) is the gradient at the kernel of `linear_out`."""
    network = Network(lambda rngs: small_gae())
    params, rest = network.init(jax.random.key(0))
    target, latents = images(), jax.random.normal(jax.random.key(2), (2, 4, 4, 4))

    def loss(params):
        return losses.mse(network(params, rest).decode(latents), target)

    expected = jax.jit(jax.grad(loss))(params)["decoder"]["linear_out"]["kernel"]
    found, hidden = jax.jit(lambda x: network(params, rest).decode_all(x))(latents)
    assert hidden.shape == (2, 16, 32)
    patches = layers.patchify(jax.grad(losses.mse)(found, target), 4)
    got = jnp.einsum("bnd,bnp->dp", hidden, patches)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)


def both(network, call):
    """Outputs and gradients of a network at random parameters, jitted."""
    params, rest = network.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, map(jnp.add, leaves, noise))

    def loss(params):
        found = call(network(params, rest))
        return jnp.mean(jnp.square(found)), found

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    "remat",
    # the policies are JAX's own; that it is applied at all shows in the first
    [layers.REMAT[1], *(pytest.param(name, marks=pytest.mark.slow) for name in layers.REMAT[2:])],
)
# both give the policy to the same function of layers.py
@pytest.mark.parametrize("name", ["gae", pytest.param("dit", marks=pytest.mark.slow)])
def test_rematerialisation_changes_no_number(name, remat):
    if name == "gae":
        sizes = SMALL | dict(num_layers=2)

        def build(rngs, remat="none"):
            return GAE(**sizes, remat=remat, rngs=rngs)

        def call(model):
            return model.decode(model.encode(images()))
    else:
        sizes = dict(input_size=4, in_channels=4, hidden_size=32, depth=2, num_heads=2)

        def build(rngs, remat="none"):
            return LightningDiT(**sizes, num_classes=3, remat=remat, rngs=rngs)

        def call(model):
            x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
            return model(x, jnp.array([0.1, 0.9]), jnp.array([0, 3]))

    want_grads, want = both(Network(build), call)
    got_grads, got = both(Network(partial(build, remat=remat)), call)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want_grads))
    assert scale > 0
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale)


def test_rematerialisation_keeps_less():
    def kept(remat):
        network = Network(lambda rngs: GAE(**SMALL, num_layers=2, remat=remat, rngs=rngs))
        params, rest = network.init(jax.random.key(0))
        _, back = jax.vjp(lambda p: network(p, rest).encode(images()), params)
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    none, dots, nothing = map(kept, ("none", "dots_saveable", "nothing_saveable"))
    assert none > dots > nothing


@pytest.mark.parametrize("model", [GAE, LightningDiT])
def test_an_unknown_policy_is_refused(model):
    with pytest.raises(
        ValueError, match=r"remat is 'all'; use one of none, nothing_saveable, dots"
    ):
        nnx.eval_shape(lambda: model(remat="all", rngs=Keys(0)))


def one_call(build, call):
    """(the module, what the call of it gives)."""
    module = build()
    return module, call(module)


def test_the_name_of_a_dtype_is_a_dtype():
    """Parameters and what leaves the models are fp32, whatever is computed in between."""
    more = dict(dtype="bfloat16", rngs=Keys(0))
    model = GAE(**SMALL, num_layers=1, **more)
    exact = small_gae()
    latents, _, features = encode_all(model, images())
    decoded = decode(model, latents)
    assert nnx.eval_shape(model.foundation_encoder, images()).dtype == jnp.bfloat16
    assert latents.dtype == features.dtype == decoded.dtype == jnp.float32
    np.testing.assert_allclose(latents, encode(exact, images()), atol=0.1)
    np.testing.assert_allclose(decoded, decode(exact, latents), atol=0.1)
    vit = dict(image_size=16, patch_size=4, embed_dim=32, num_layers=1, num_heads=2, num_classes=3)
    dit = dict(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    small = dict(feature_dim=32, latent_dim=4, decoder_layers=1, num_patches=16, heads=2)
    tokens, labels = jnp.zeros((2, 16, 32)), jnp.zeros(2, jnp.int32)
    for kind, sizes, call in (
        (GAE, SMALL | dict(num_layers=1, bottleneck="kl"), lambda m: m.encode_all(images()).logvar),
        (LightningDiT, dit, lambda m: m(jnp.zeros((2, 4, 4, 4)), jnp.zeros(2), labels)),
        (PatchGAN, dict(ndf=8, n_layers=1), lambda m: m(images(), train=True)),
        (ViTClassifier, vit, lambda m: m(images())),
        (SemanticTeacher, small | dict(window_size=2), lambda m: m.downsample(tokens)),
    ):
        module, found = nnx.eval_shape(partial(one_call, partial(kind, **sizes, **more), call))
        if kind is SemanticTeacher:
            assert found.shape == (2, 16, 4)
        else:
            assert found.dtype == jnp.float32, kind.__name__
        every = jax.tree.leaves(variables_of(module))
        assert {leaf.dtype for leaf in every} == {jnp.dtype("float32")}, kind.__name__
    every = jax.tree.leaves(variables_of(model))
    assert {leaf.dtype for leaf in every} == {jnp.dtype("float32")}


def test_groups_of_a_batch_have_their_own_statistics():
    def critic(groups):
        return PatchGAN(ndf=8, n_layers=2, stat_groups=groups, rngs=Keys(0))

    def train(model, x):
        return model(x, train=True)

    train = nnx.jit(train)
    x, model, alone = images(6), nnx.jit(lambda: critic(3))(), []
    new = nnx.jit(lambda: critic(1))
    logits = train(model, x)
    for start in (0, 2, 4):
        alone.append(new())
        expected = train(alone[-1], x[start : start + 2])
        np.testing.assert_allclose(logits[start : start + 2], expected, atol=1e-6)
    assert jnp.max(jnp.abs(logits - train(new(), x))) > 1e-3
    statistics = [variables_of(one)[1] for one in alone]
    mean = jax.tree.map(lambda *parts: sum(parts) / 3, *statistics)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), variables_of(model)[1], mean)
    call = nnx.jit(lambda model, x: model(x, train=False))
    np.testing.assert_allclose(call(model, x[:4])[:1], call(model, x[:1]), atol=1e-6)
    with pytest.raises(ValueError, match="batch of 4 does not divide into stat_groups=3"):
        model(x[:4], train=True)


@pytest.mark.parametrize("shape", [(2, 15, 16, 3), (2, 32, 32, 3), (2, 16, 16, 1), (16, 16, 3)])
def test_another_image_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"takes images \[B, 16, 16, 3\], got .* crop"):
        small_gae().encode(jnp.zeros(shape))


def test_dit_starts_at_zero_and_drops_labels():
    model = LightningDiT(
        input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=10,
        rngs=Keys(0),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    call = nnx.jit(lambda model, *inputs: model(*inputs))
    np.testing.assert_array_equal(call(model, x, jnp.array([0.1, 0.9]), jnp.array([0, 10])), 0)
    labels = model.drop_labels(jnp.zeros(10_000, jnp.int32), jax.random.key(0))
    assert set(np.unique(labels)) == {0, 10}
    np.testing.assert_allclose(jnp.mean(labels == 10), 0.1, atol=0.01)


def test_normalize_and_denormalize_are_inverse():
    mean, std = np.arange(4.0), np.arange(1.0, 5.0)
    model = LatentDiffusion(
        mean=mean, std=std, latent_multiplier=0.5, input_size=4, in_channels=4, hidden_size=32,
        depth=1, num_heads=2, num_classes=10, rngs=Keys(0),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4)) * std + mean
    normal = model.normalize(x)
    np.testing.assert_allclose(normal, (x - mean) / std * 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.denormalize(normal), x, rtol=1e-5, atol=1e-5)


def test_ten_and_more_blocks_keep_their_weights():
    network = Network(lambda rngs: GAE(**SMALL, num_layers=12, rngs=rngs))
    model = GAE(**SMALL, num_layers=12, rngs=nnx.Rngs(jax.random.key(3)))
    merged = network(*variables_of(model))
    np.testing.assert_array_equal(encode(merged, images()), encode(model, images()))


def count(module):
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module)))
    return sum(leaf.size for leaf in leaves)


def gae_counts(embed_dim, num_layers, patch=16, latent=32, tokens=256):
    """(encoder, projector, decoder) of Table 13, added up by hand."""
    hidden = -(-int(embed_dim * 8 / 3) // 256) * 256
    blocks = num_layers * (4 * embed_dim**2 + 3 * embed_dim * hidden)
    pixels = 3 * patch**2 * embed_dim
    table = tokens * embed_dim
    encoder = pixels + table + blocks + embed_dim**2
    return encoder, embed_dim * latent, latent * embed_dim + table + blocks + pixels


@pytest.mark.parametrize("size", gae_kind.SIZES)
def test_parameter_counts_of_table_8(size):
    model = nnx.eval_shape(lambda: GAE(**gae_kind.SIZES[size], rngs=Keys(0)))
    parts = [count(x) for x in (model.foundation_encoder, model.adapter, model.decoder)]
    expected = gae_counts(
        model.foundation_encoder.pos_embed.shape[-1], gae_kind.SIZES[size]["num_layers"]
    )
    assert tuple(parts) == expected


def dit_count(hidden_size, depth, patch_size, channels=32, grid=16, classes=1000, **_):
    """Parameters and fixed position table of LightningDiT, added up by hand."""
    d, hidden = hidden_size, int(2 / 3 * hidden_size * 4)
    pixels = channels * patch_size**2
    attention = d * 3 * d + 3 * d + d * d + d
    mlp = d * 2 * hidden + 2 * hidden + hidden * d + d
    block = 2 * d + attention + mlp + d * 6 * d + 6 * d
    embedders = (pixels * d + d) + (256 * d + d + d * d + d) + (classes + 1) * d
    final = d + (d * pixels + pixels) + (d * 2 * d + 2 * d)
    return embedders + (grid // patch_size) ** 2 * d + depth * block + final


@pytest.mark.parametrize("size", dit.SIZES)
def test_parameter_counts_of_lightning_dit(size):
    model = nnx.eval_shape(lambda: LightningDiT(**dit.SIZES[size], rngs=Keys(0)))
    assert count(model) == dit_count(**dit.SIZES[size])


def test_parameter_counts_of_the_paper():
    model = nnx.eval_shape(lambda: GAE(rngs=Keys(0)))
    assert count(model.foundation_encoder) == 310_378_496
    assert count(model.adapter) == 32_768
    assert count(model.decoder) == 309_362_688
    generator = nnx.eval_shape(lambda: LightningDiT(rngs=Keys(0)))
    assert count(generator) == 675_256_736


@pytest.mark.parametrize(
    ("latent_dim", "to_latent", "reconstruct"),
    [(32, 8_388_608, 51_412_992), (64, 16_777_216, 51_445_760)],
)
def test_parameter_counts_of_the_teacher(latent_dim, to_latent, reconstruct):
    """The paper's over DINOv2-L and 256 patches."""
    sizes = dict(feature_dim=1024, decoder_layers=4, num_patches=256, window_size=4, heads=16)
    model = nnx.eval_shape(lambda: SemanticTeacher(**sizes, latent_dim=latent_dim, rngs=Keys(0)))
    assert count(model.projector_block) == 4_194_304
    assert count(model.to_latent) == to_latent
    assert count(model.recon_head) + count(model.decoder_layers) == reconstruct
    tables = 2 * 256 * 1024
    assert count(model) == 4_194_304 + to_latent + reconstruct + tables
    if latent_dim == 32:  # DINOv2-L, attention and projection, as the paper counts the teacher
        assert count_of(dinov2.Dinov2, dinov2.PRESETS["large"]) + 12_582_912 == 316_951_552


def count_of(module, arguments):
    return Network(partial(module, **arguments)).size


def vit_count(width, layers, mlp, *, patch, tokens, scales=0):
    """A vision encoder of ``tokens`` learned or fixed tokens and positions, added up by hand."""
    attention = width * 3 * width + 3 * width + width * width + width
    block = 4 * width + attention + mlp + scales * width
    return (3 * patch**2 * width + width) + tokens * width + layers * block + 2 * width


@pytest.mark.slow  # test_vision_parity has the numbers as they are printed
@pytest.mark.parametrize("size", dinov2.PRESETS)
def test_parameter_counts_of_dinov2(size):
    arguments = dinov2.PRESETS[size]
    width, layers = arguments["hidden_size"], arguments["num_hidden_layers"]
    mlp = 8 * width**2 + 5 * width
    if arguments.get("use_swiglu_ffn"):  # giant
        mlp = 1536 * 2 * 4096 + 2 * 4096 + 4096 * 1536 + 1536
    tokens = 1 + 1 + (1 + 37**2) + arguments.get("num_register_tokens", 0)  # CLS, mask, positions
    expected = vit_count(width, layers, mlp, patch=14, tokens=tokens, scales=2)
    assert count_of(dinov2.Dinov2, arguments) == expected


@pytest.mark.parametrize("size", mae.PRESETS)
def test_parameter_counts_of_mae(size):
    width, layers = mae.PRESETS[size]["hidden_size"], mae.PRESETS[size]["num_hidden_layers"]
    mlp, tokens = 8 * width**2 + 5 * width, 1 + (1 + 14**2)
    expected = vit_count(width, layers, mlp, patch=16, tokens=tokens)
    assert count_of(mae.MAEEncoder, mae.PRESETS[size]) == expected
