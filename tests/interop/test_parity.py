"""The released modules' outputs, and their weights there and back again.

A golden file holds weights (`state.NAME`, torch layout), inputs and outputs (`io.NAME`, channels
first) of a released PyTorch module in fp32.
"""

from functools import partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import check

from gae_jax.generators import flow, guidance, samplers
from gae_jax.interop import tables, vision_tables
from gae_jax.interop.convert import ConversionError, export_torch, import_torch
from gae_jax.interop.sizes import differing
from gae_jax.nn import losses
from gae_jax.nn.attention import Attention
from gae_jax.nn.layers import rms_norm
from gae_jax.nn.network import Network, variables_of
from gae_jax.tokenizers import gae_torch

TEACHERS = ["semantic_teacher_w1", "semantic_teacher_w2", "semantic_teacher_w4"]
DITS = [f"lightningdit_qk{qk}_noshift{shift}" for qk in (0, 1) for shift in (0, 1)]
DIT_OPTIONS = [
    "lightningdit_layernorm_gelu_norope",
    "lightningdit_layernorm_patch2",
    "lightningdit_gelu_noshift_nopos_nonull",
]
TABLES = {
    "gae_autoencoder": gae_torch.TABLE,
    **dict.fromkeys(TEACHERS, tables.TEACHER),
    **dict.fromkeys([*DITS, *DIT_OPTIONS], tables.DIT),
    "patchgan": tables.PATCHGAN,
}


def golden(name):
    """(config, {torch name: weight}, {name: input or output})."""
    config, groups = golden_files.golden(name)
    return config, groups.get("state", {}), groups.get("io", {})


def sizes_of(config):
    return {key: value for key, value in config.items() if not key.startswith("cfg_")}


def load(name):
    """(module with the golden weights, config, io)."""
    config, state, io = golden(name)
    table, sizes = TABLES[name], sizes_of(config)
    network = Network(partial(table.module, **sizes))
    arrays = import_torch(table, state, network, **sizes)
    return network(*jax.tree.map(jnp.asarray, arrays)), config, io


def channels_last(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def tokens(x):
    """[B, C, H, W] -> [B, N, C]."""
    return channels_last(x).reshape(len(x), -1, x.shape[1])


def test_autoencoder():
    model, _, io = load("gae_autoencoder")

    @jax.jit
    def outputs(image):
        latent = model.encode(image)
        return model.foundation_encoder(image), latent, model.decode(latent)

    features, latent, reconstruction = outputs(channels_last(io["image"]))
    check("features", features, tokens(io["features"]))
    check("latent_mean", latent, channels_last(io["latent_mean"]))
    check("reconstruction", reconstruction, channels_last(io["reconstruction"]))


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher(name):
    model, _, io = load(name)

    @jax.jit
    def outputs(features):
        latent = model.downsample(features)
        reconstruction, target = model.reconstruct(latent), rms_norm(features)
        distances = losses.mse(reconstruction, target), losses.cosine(reconstruction, target)
        return latent, reconstruction, target, distances

    latent, reconstruction, target, (mse, cosine) = outputs(tokens(io["features"]))
    check("latent", latent, io["latent"])
    check("reconstruction", reconstruction, tokens(io["reconstruction"]))
    check("target", target, tokens(io["target"]))
    check("mse", mse, io["mse"][0])
    check("cos", np.mean(cosine), io["cos"][0])


@pytest.mark.parametrize("name", [*DITS, *DIT_OPTIONS])
def test_dit(name):
    model, config, io = load(name)
    model = partial(jax.jit(lambda model, *inputs: model(*inputs)), model)
    check(
        "velocity", model(channels_last(io["x"]), io["t"], io["y"]), channels_last(io["velocity"])
    )

    def call(x, t, labels):
        return model(x, jnp.full(len(x), t), labels)

    half = len(io["cfg_y"]) // 2  # conditional, then the same x without class (or with another)

    def both(x, t):
        return jnp.split(call(jnp.concatenate([x, x]), t, io["cfg_y"]), 2)

    velocity = guidance.guided(
        lambda x, t: call(x, t, io["cfg_y"][:half]),
        both,
        guidance.in_interval(config["cfg_scale"], config["cfg_interval_start"], 1.0),
    )
    guided = jax.jit(velocity)
    for key, t in (("cfg_guided_t06", 0.6), ("cfg_unguided_t02", 0.2)):
        got = guided(channels_last(io["cfg_x"])[:half], jnp.float32(t))
        check(key, jnp.concatenate([got, got]), channels_last(io[key]))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_heads_of_keys_and_values_are_shared_by_consecutive_queries(kv_heads):
    """The released rule, written out: head j serves queries j * rep to j * rep + rep - 1."""
    layer = nnx.jit(lambda: Attention(48, 6, num_kv_heads=kv_heads, rngs=nnx.Rngs(0)))()
    x = np.random.default_rng(0).normal(size=(2, 5, 48))
    qkv, proj = (np.asarray(x.kernel[...], np.float64) for x in (layer.qkv, layer.proj))
    q, k, v = np.split(x @ qkv, [48, 48 + 8 * kv_heads], axis=-1)

    def head(x, index):
        return x[..., 8 * index : 8 * index + 8]

    def unit(x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    rep, heads = 6 // kv_heads, []
    for j in range(kv_heads):
        for index in range(j * rep, j * rep + rep):
            scores = unit(head(q, index)) @ unit(head(k, j)).swapaxes(1, 2) / np.sqrt(8)
            weights = np.exp(scores) / np.sum(np.exp(scores), axis=-1, keepdims=True)
            heads.append(weights @ head(v, j))
    check(
        "attention",
        nnx.jit(Attention.__call__)(layer, jnp.float32(x)),
        np.concatenate(heads, axis=-1) @ proj,
    )


def test_discriminator():
    image = channels_last(golden("patchgan")[2]["image"])
    model, config, io = load("patchgan")
    call = nnx.jit(lambda model, image, train: model(image, train=train), static_argnums=2)
    check("eval", call(model, image, False), channels_last(io["logits_eval"]))
    check("train", call(model, image, True), channels_last(io["logits_train"]))
    after = export_torch(tables.PATCHGAN, *variables_of(model), **config)
    statistics = [key for key in io if key.startswith("after_train.")]
    assert len(statistics) == 6
    for key in statistics:
        check(key, after[key.removeprefix("after_train.")], io[key])


@pytest.mark.parametrize("name", ["losses", "rae_gan_losses"])
def test_adversarial_losses(name):
    io = golden(name)[2]
    real, fake = io["logits_real"], io["logits_fake"]
    check("hinge_d", losses.hinge_discriminator(real, fake), io["hinge_d"][0])
    if name == "rae_gan_losses":
        check("vanilla_d", losses.vanilla_discriminator(real, fake), io["vanilla_d"][0])
        check("vanilla_g", losses.hinge_generator(fake), io["vanilla_g"][0])


def test_vf_loss():
    io = golden("losses")[2]
    found, target = tokens(io["h"]), tokens(io["h_frozen"])
    check("vf_total", losses.vf_loss(found, target), io["vf_total"][0])
    check("vf_cos", losses.vf_loss(found, target, distance_weight=0), io["vf_cos"][0])
    check("vf_distmat", losses.vf_loss(found, target, cos_weight=0), io["vf_distmat"][0])


def field(io):
    """A x over channels * (1 + t) + sin(3 t), for times [B] or a scalar."""

    def velocity(x, t):
        t = jnp.reshape(t, (-1, 1, 1, 1))
        return x @ jnp.asarray(io["A"]).T * (1 + t) + jnp.sin(3 * t)

    return velocity


def test_flow_loss():
    io = golden("transport")[2]
    noise, data, t = channels_last(io["x0"]), channels_last(io["x1"]), jnp.asarray(io["t"])
    velocity = field(io)(flow.interpolate(noise, data, t), t)
    # one value per sample
    losses = jax.vmap(lambda *one: flow.flow_loss(*(x[None] for x in one))[1])
    terms = losses(velocity, noise, data, t)
    check("mse", terms["mse"], io["mse"])
    check("cos", terms["cosine"], io["cos"])


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.7])
@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_ode(solver, shift):
    config, _, io = golden("transport")
    noise, key = channels_last(io["z"]), f"ode_{solver.replace('heun', 'heun2')}_n20_shift{shift}"
    if solver == "dopri5":  # which asks no grid
        got = samplers.dopri5(field(io), noise, 0.0, 1.0).x
    else:
        grid = flow.time_grid(config["steps"], shift=shift or 1.0)  # 0 stands for none
        got = getattr(samplers, solver)(field(io), noise, grid)
    check(key, got, channels_last(io[key]))


@pytest.mark.parametrize("shift", [0.4, 1.0])
def test_sde(shift):
    config, _, io = golden("transport")
    released, key = config["sde"], f"sde_Euler_n20_shift{shift}"
    noise = jnp.moveaxis(io[f"{key}_noise"], 2, -1)
    grid = flow.time_grid(config["steps"], shift=shift, start=released["t0"], end=released["t1"])
    for name, last_step in ((key, "reference"), (f"{key}_before_last", "none")):
        got = samplers.sde(
            field(io),
            channels_last(io["z"]),
            grid,
            noise=lambda index: noise[index],
            last_step=last_step,
            last_step_size=released["last_step_size"],
        )
        check(name, got, channels_last(io[name]))


def imported(name, **changes):
    """The golden weights imported with changes; a change to None leaves the tensor out."""
    config, state, _ = golden(name)
    table, sizes = TABLES[name], sizes_of(config)
    state = {key: value for key, value in (state | changes).items() if value is not None}
    return import_torch(table, state, Network(partial(table.module, **sizes)), **sizes)


@pytest.mark.parametrize("name", TABLES)
def test_weights_survive_the_round_trip(name):
    config, state, _ = golden(name)
    exported = export_torch(TABLES[name], *imported(name), **sizes_of(config))
    assert exported.keys() == state.keys()
    for key, want in state.items():
        assert exported[key].dtype == want.dtype, key
        if key.startswith("feat_rope."):  # computed, in fp32 by torch
            np.testing.assert_allclose(exported[key], want, rtol=0, atol=1e-7, err_msg=key)
        else:
            np.testing.assert_array_equal(exported[key], want, err_msg=key)


# Sizes that share as little as possible with the golden files: numbers of two digits, widths of
# heads that are no power of two, options.
OTHER_DIT = dict(input_size=6, patch_size=2, in_channels=3, hidden_size=144, num_heads=2)
OTHER_DINOV2 = dict(
    hidden_size=48, num_hidden_layers=11, num_attention_heads=3, image_size=20, patch_size=5
)
OTHER_SIZES = {
    "gae": (
        gae_torch.TABLE,
        dict(
            image_size=30,
            patch_size=6,
            embed_dim=48,
            num_layers=11,
            num_heads=6,
            num_kv_heads=2,
            latent_dim=5,
        ),
    ),
    "gae_kl": (
        gae_torch.TABLE,
        dict(
            image_size=8,
            patch_size=4,
            embed_dim=24,
            num_layers=1,
            num_heads=2,
            latent_dim=5,
            bottleneck="kl",
        ),
    ),
    **{
        f"teacher_{downsampler}": (
            tables.TEACHER,
            dict(
                feature_dim=48,
                latent_dim=5,
                decoder_layers=1,
                num_patches=9,
                downsampler=downsampler,
                window_size=4,
                heads=3,
            ),
        )
        for downsampler in ("attention", "attention_linear")
    },
    **{
        f"teacher_w{window}": (
            tables.TEACHER,
            dict(
                feature_dim=48,
                latent_dim=5,
                decoder_layers=layers,
                num_patches=(2 * window) ** 2,
                window_size=window,
                heads=heads,
            ),
        )
        for window, layers, heads in ((1, 11, 2), (2, 1, 3), (4, 0, 6))
    },
    "dit": (tables.DIT, OTHER_DIT | dict(depth=11, num_classes=5)),
    "dit_qknorm": (tables.DIT, OTHER_DIT | dict(depth=1, wo_shift=True, use_qknorm=True)),
    "dit_options": (
        tables.DIT,
        OTHER_DIT
        | dict(
            depth=1,
            class_dropout_prob=0.0,
            use_qknorm=True,
            use_swiglu=False,
            use_rope=False,
            use_rmsnorm=False,
            use_abs_pos=False,
        ),
    ),
    "patchgan": (tables.PATCHGAN, dict(ndf=6, n_layers=4)),
    "dinov2": (vision_tables.DINOV2, OTHER_DINOV2 | dict(use_mask_token=False)),
    "dinov2_swiglu_registers": (
        vision_tables.DINOV2,
        OTHER_DINOV2 | dict(num_register_tokens=3, use_swiglu_ffn=True),
    ),
    "dinov2_hub": (
        vision_tables.DINOV2_HUB,
        OTHER_DINOV2 | dict(num_register_tokens=3, use_swiglu_ffn=True),
    ),
    "mae": (vision_tables.MAE, OTHER_DINOV2 | dict(intermediate_size=80)),
}


def equal(got, want):
    """Every array of two trees, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (key, one), (_, other) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (got, want)), strict=True
    ):
        assert one.dtype == other.dtype, key
        np.testing.assert_array_equal(one, other, err_msg=str(key))


def random_arrays(table, sizes):
    """(network of these sizes, its arrays)."""
    network, rng = Network(partial(table.module, **sizes)), np.random.default_rng(0)
    return network, jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), network.abstract
    )


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_weights_of_other_sizes_survive_the_round_trip(name):
    table, sizes = OTHER_SIZES[name]
    network, arrays = random_arrays(table, sizes)
    tensors = export_torch(table, *arrays, **sizes)
    again = import_torch(table, tensors, network, **sizes)
    equal(again, arrays)
    equal(export_torch(table, *again, **sizes), tensors)


@pytest.mark.parametrize("name", ["gae", "gae_kl"])
def test_a_tokenizer_of_the_same_sizes_needs_no_flags(name):
    table, sizes = OTHER_SIZES[name]
    tensors = export_torch(table, *random_arrays(table, sizes)[1], **sizes)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    section = dict(num_kv_heads=0) | sizes
    assert differing("gae", shapes, section, "tokenizer.model") == []
    flags = differing("gae", shapes, section | dict(latent_dim=7), "tokenizer.model")
    assert flags == ["--config.tokenizer.model.latent_dim=5"]


def test_rotated_channels_of_any_head_are_reordered():
    """Torch's channel 2j + s of each head of q and k is ours j + 36 s; those of v stay."""
    table, sizes = OTHER_SIZES["dit_qknorm"]
    _, (params, rest) = random_arrays(table, sizes)
    params["blocks"]["0"]["attn"]["q_norm"]["weight"] = np.arange(72.0)
    tensors = export_torch(table, params, rest, **sizes)
    ours = params["blocks"]["0"]["attn"]["qkv"]["kernel"].T
    theirs = tensors["blocks.0.attn.qkv.weight"]
    for part, head, j, half in np.ndindex(2, 2, 36, 2):
        start = (part * 2 + head) * 72
        np.testing.assert_array_equal(theirs[start + 2 * j + half], ours[start + j + 36 * half])
    np.testing.assert_array_equal(theirs[288:], ours[288:])
    want = np.arange(72.0).reshape(2, 36).T.ravel()
    np.testing.assert_array_equal(tensors["blocks.0.attn.q_norm.weight"], want)


@pytest.mark.parametrize("name", ["gae_autoencoder", TEACHERS[0], DITS[-1], "patchgan"])
def test_import_names_every_tensor_that_does_not_fit(name):
    _, state, _ = golden(name)
    missing, misshapen = [key for key in state if key.endswith("weight")][:2]
    changes = {missing: None, misshapen: np.zeros((3, 5)), "surplus.weight": np.zeros(7)}
    with pytest.raises(ConversionError) as error:
        imported(name, **changes)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        f"missing: {missing} {list(state[missing].shape)}",
        "unexpected: surplus.weight [7]",
        f"misshapen: {misshapen} is [3, 5], must be {list(state[misshapen].shape)}",
    ]


def test_export_names_every_array_that_does_not_fit():
    config, _, _ = golden("patchgan")
    params, rest = imported("patchgan")
    params["main"]["0"]["kernel"] = np.zeros((4, 4, 3, 9))
    params["surplus"] = np.zeros(7)
    del rest["main"]["3"]["running_var"]
    with pytest.raises(ConversionError) as error:
        export_torch(tables.PATCHGAN, params, rest, **config)
    for line in (
        "missing: main.3.running_var [16]",
        "unexpected: surplus [7]",
        "misshapen: main.0.kernel is [4, 4, 3, 9], must be [4, 4, 3, 8]",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("name", "key"), [(DITS[0], "feat_rope.freqs_sin"), ("patchgan", "main.3.num_batches_tracked")]
)
def test_derived_buffers_are_required(name, key):
    with pytest.raises(ConversionError, match=f"missing: {key}"):
        imported(name, **{key: None})


def test_a_network_without_rotation_refuses_a_rotary_table():
    table = golden(DITS[0])[1]["feat_rope.freqs_cos"]
    with pytest.raises(ConversionError, match=r"unexpected: feat_rope.freqs_cos \[16, 16\]"):
        imported("lightningdit_layernorm_gelu_norope", **{"feat_rope.freqs_cos": table})


def test_another_rotary_table_is_refused():
    _, state, _ = golden(DITS[0])
    changed = state["feat_rope.freqs_cos"] + np.float32(0.01)
    with pytest.raises(ConversionError, match=r"wrong values: feat_rope.freqs_cos is off .* 0\.01"):
        imported(DITS[0], **{"feat_rope.freqs_cos": changed})


def test_twelve_blocks_keep_their_numbers():
    config, _, _ = golden("gae_autoencoder")
    sizes = config | {"num_layers": 12}
    network = Network(partial(gae_torch.TABLE.module, **sizes))
    params, rest = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), network.abstract)
    tensors = export_torch(gae_torch.TABLE, params, rest, **sizes)
    for n in range(12):
        tensors[f"decoder.blocks.{n}.attn.qkv.weight"][:] = n
    model = network(*import_torch(gae_torch.TABLE, tensors, network, **sizes))
    assert [float(block.attn.qkv.kernel[0, 0]) for block in model.decoder.blocks] == [*range(12)]
