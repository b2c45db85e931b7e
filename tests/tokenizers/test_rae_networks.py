"""RAE's networks against the outputs of the released modules, and what its paper says of them.

Golden files as in `test_parity.py`; here a file may hold a second network (`weak_state.NAME`,
`dino_state.NAME`).
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import arguments_of, check, golden

from gae_jax.generators import ddt, dit, guidance
from gae_jax.interop import rae_tables
from gae_jax.interop.convert import ConversionError, export_torch, import_torch
from gae_jax.interop.tables import DIT
from gae_jax.nn.network import Keys, Network, variables_of
from gae_jax.nn.torch_names import Table, same
from gae_jax.objectives import dino_discriminator
from gae_jax.objectives.dino_discriminator import DinoDisc, DinoFeatures
from gae_jax.runtime import sharding
from gae_jax.runtime.mesh import make_mesh

DDT = ["rae_ditdh", "rae_ditdh_equalwidth_qknorm"]
LIGHTNING = ["rae_lightningdit", "rae_lightningdit_qknorm"]
# (file, group of the weights)
NETWORKS = [
    *((name, "state") for name in (*DDT, *LIGHTNING)),
    ("rae_ditdh", "weak_state"),
    ("rae_disc", "state"),
    ("rae_disc", "dino_state"),
]


def table_and_sizes(name, group="state"):
    config, _ = golden(name)
    if group == "weak_state":
        config = config["weak"]
    if name == "rae_disc":
        table = rae_tables.DINO_DISC if group == "state" else rae_tables.DINO
        config = config["recipe"] | dict(ks=config["ks"], image_size=config["input_resize"])
    elif name in DDT:
        table = rae_tables.ditdh(config["depth"])
    else:
        table = Table(DIT.module, (*same("t_embedder.W"), *DIT.rows))  # with ``use_gembed``
    return table, arguments_of(table.module, config)


@cache
def network_of(name, group):
    table, sizes = table_and_sizes(name, group)
    return Network(partial(table.module, **sizes))


def imported(name, group="state", **changes):
    """The golden weights imported with changes; a change to None leaves the tensor out."""
    table, sizes = table_and_sizes(name, group)
    state = {
        key: value for key, value in (golden(name)[1][group] | changes).items() if value is not None
    }
    network = network_of(name, group)
    return network, import_torch(table, state, network, **sizes)


def load(name, group="state"):
    """(module with the golden weights, {input or output: array})."""
    network, arrays = imported(name, group)
    return network(*jax.tree.map(jnp.asarray, arrays)), golden(name)[1]["io"]


def channels_last(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def call_at(model, labels):
    """(x, scalar t) -> velocity."""
    return jax.jit(lambda x, t: model(x, jnp.full(len(x), t), labels))


def guide(model, io):
    """(x, t, scale, start, end) -> guidance of the first half of cfg_y by the second."""
    half = len(io["cfg_y"]) // 2
    conditional, both = (call_at(model, labels) for labels in (io["cfg_y"][:half], io["cfg_y"]))

    @jax.jit
    def velocity(x, t, scale, start, end):
        def halves(x, t):
            return jnp.split(both(jnp.concatenate([x, x]), t), 2)

        return guidance.guided(conditional, halves, guidance.in_interval(scale, start, end))(x, t)

    return velocity


@pytest.mark.parametrize("name", DDT)
def test_ditdh(name):
    config, (model, io) = golden(name)[0], load(name)
    got = jax.jit(model)(channels_last(io["x"]), io["t"], io["y"])
    check("velocity", got, channels_last(io["velocity"]))
    velocity, (start, end) = guide(model, io), config["cfg_interval"]
    x = channels_last(io["cfg_x"])
    half = len(x) // 2
    seen = set()
    for index in range(half):  # the released code decides for each sample, ours for the batch
        t = io["cfg_t"][index]
        seen.add(bool(start <= t <= end))
        got = velocity(x[:half], t, config["cfg_scale"], start, end)[index]
        for place in (index, index + half):
            check("cfg_out", got, channels_last(io["cfg_out"])[place])
    assert seen == {True, False}


def test_autoguidance():
    config, (model, io) = golden("rae_ditdh")[0], load("rae_ditdh")
    weak, _ = load("rae_ditdh", "weak_state")
    x, labels = channels_last(io["x"]), io["y"]
    got = jax.jit(weak)(x, io["t"], labels)
    check("weak_velocity", got, channels_last(io["weak_velocity"]))
    start, end = config["autoguidance_interval"]
    strong, weaker = call_at(model, labels), call_at(weak, labels)

    @jax.jit
    def velocity(x, t, scale):
        return guidance.guided(
            strong,
            lambda x, t: (strong(x, t), weaker(x, t)),
            guidance.in_interval(scale, start, end),
        )(x, t)

    inside = [bool(start <= t <= end) for t in io["t"]]
    assert inside == [False, True, False]
    for index, t in enumerate(io["t"]):
        got = velocity(x, jnp.float32(t), config["autoguidance_scale"])[index]
        check("autoguidance_out", got, channels_last(io["autoguidance_out"])[index])
        # the plain model: outside the interval, and inside it at scale 1
        plain = velocity(x, jnp.float32(t), 1.0)[index]
        check("plain", plain, channels_last(io["velocity"])[index])


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightningdit(name):
    config, (model, io) = golden(name)[0], load(name)
    got = jax.jit(model)(channels_last(io["x"]), io["t"], io["y"])
    check("velocity", got, channels_last(io["velocity"]))
    velocity, x = guide(model, io), channels_last(io["cfg_x"])
    half = len(x) // 2
    # inside these intervals the release leaves guidance out, or takes the other scale
    ((_, start),) = config["cfg_intervals"]
    for key, t, scale, first in (
        ("cfg_t08_guided", 0.8, config["cfg_scale"], start),
        ("cfg_t02_conditional", 0.2, config["cfg_scale"], start),
        ("cfg_t02_interval_cfg", 0.2, config["interval_cfg"], 0.0),
    ):
        got = velocity(x[:half], t, scale, first, 1.0)
        check(key, jnp.concatenate([got, got]), channels_last(io[key]))


@pytest.mark.parametrize("train", [False, True])
def test_discriminator(train):
    features, io = load("rae_disc", "dino_state")
    model, _ = load("rae_disc")
    maps = jax.jit(features.maps)(channels_last(io["image"]))
    assert len(maps) == 3
    for index, found in enumerate(maps):
        check("activation", found, channels_last(io[f"dino_activation_{index}"]))
    np.testing.assert_array_equal(maps[0], maps[-1])
    before = jax.tree.map(np.asarray, variables_of(model))
    check(
        "logits",
        nnx.jit(lambda model, maps: model(maps, train=train))(model, maps),
        io["logits_train" if train else "logits"],
    )
    table, sizes = table_and_sizes("rae_disc")
    after = variables_of(model)
    jax.tree.map(np.testing.assert_array_equal, after[0], before[0])
    tensors = export_torch(table, *after, **sizes)
    vectors = [key for key in tensors if key.endswith("weight_u")]
    assert len(vectors) == 9
    for key in vectors:
        want = io[f"after_train.{key}"] if train else golden("rae_disc")[1]["state"][key]
        check(key, tensors[key], want, tolerance=1e-5 if train else 0)


def convolutions(model):
    return [conv for head in model.heads for conv in (head.embed, head.mix, head.out)]


def test_spectral_norm():
    model, io = load("rae_disc")
    sigmas = [conv.sigma(train=False) for conv in convolutions(model)]
    check("sigma_eval", jnp.stack(sigmas), io["sigma_eval"])
    first, _, last = convolutions(model)[:3]
    for key, conv in (("conv_0", first), ("out", last)):
        weight = (conv.kernel[...] / conv.sigma(train=False)).transpose(2, 1, 0)
        check(key, weight, io[f"normalised_weight_head_0_{key}"])
    trained = [conv.sigma(train=True) for conv in convolutions(model)]
    check("sigma_train", jnp.stack(trained), io["sigma_train"])


def test_heads():
    model, io = load("rae_disc")
    for index, head in enumerate(model.heads):
        got = head(channels_last(io["feature_map"]), train=False)
        check("head", got[:, None], io[f"head_{index}_out"])


def test_power_iterations_find_the_largest_singular_value():
    conv = dino_discriminator.SpectralConv(6, 5, 3, dtype=jnp.float32, rngs=Keys(0))
    step = nnx.jit(lambda conv: conv.sigma(train=True))
    for _ in range(200):
        got = step(conv)
    matrix = np.moveaxis(conv.kernel[...], -1, 0).reshape(5, -1)
    np.testing.assert_allclose(got, np.linalg.norm(matrix, 2), rtol=1e-5)
    # a step in training passes no gradient through the vectors: d sigma / d W = u v^T, of norm 1
    gradient = nnx.grad(lambda conv: conv.sigma(train=True))(conv)["kernel"][...]
    np.testing.assert_allclose(np.linalg.norm(gradient), 1, rtol=1e-5)


def test_every_image_is_normalised_by_itself():
    model, io = load("rae_disc")
    maps = [channels_last(io["feature_map"])] * 3
    both = model(maps, train=False)
    alone = model([x[:1] for x in maps], train=False)
    check("first image", both[:1], alone, tolerance=1e-6)


def test_circular_convolution_follows_a_rotation_of_the_tokens():
    model, io = load("rae_disc")
    x = channels_last(io["feature_map"])
    got = model.heads[0](jnp.roll(x, 7, axis=1), train=False)
    check("rolled", got, jnp.roll(model.heads[0](x, train=False), 7, axis=1), tolerance=1e-5)


def test_gradients_reach_images_through_the_frozen_features():
    features, io = load("rae_disc", "dino_state")
    model, _ = load("rae_disc")
    image = channels_last(io["image"])
    gradient = jax.jit(jax.grad(lambda x: -jnp.mean(model(features.maps(x), train=False))))(image)
    assert np.all(np.isfinite(gradient))
    assert np.max(np.abs(gradient)) > 0


@pytest.mark.parametrize(("name", "group"), NETWORKS)
def test_weights_survive_the_round_trip(name, group):
    table, sizes = table_and_sizes(name, group)
    state = golden(name)[1][group]
    exported = export_torch(table, *imported(name, group)[1], **sizes)
    assert exported.keys() == state.keys()
    for key, want in state.items():
        assert exported[key].dtype == want.dtype, key
        if "feat_rope." in key:  # computed, in fp32 by torch
            np.testing.assert_allclose(exported[key], want, rtol=0, atol=1e-7, err_msg=key)
        else:
            np.testing.assert_array_equal(exported[key], want, err_msg=key)


OTHER_DITDH = dict(
    input_size=6, patch_size=2, in_channels=3, hidden_size=(48, 72), num_heads=(2, 6),
    depth=(11, 2), num_classes=5,
)  # fmt: skip
OTHER_SIZES = {
    "ditdh": OTHER_DITDH,
    "ditdh_options": OTHER_DITDH
    | dict(use_qknorm=True, wo_shift=True, use_pos_embed=False, hidden_size=(72, 72)),
    "ditdh_gelu_norope": OTHER_DITDH
    | dict(use_swiglu=False, use_rope=False, use_rmsnorm=False, class_dropout_prob=0.0),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_weights_of_other_sizes_survive_the_round_trip(name):
    sizes = OTHER_SIZES[name]
    table = rae_tables.ditdh(sizes["depth"])
    network, rng = Network(partial(table.module, **sizes)), np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), network.abstract
    )
    tensors = export_torch(table, *arrays, **sizes)
    assert ("dec_feat_rope.freqs_cos" in tensors) == sizes.get("use_rope", True)
    again = import_torch(table, tensors, network, **sizes)
    jax.tree.map(np.testing.assert_array_equal, again, arrays)


@pytest.mark.parametrize(("name", "group"), NETWORKS)
def test_import_names_every_tensor_that_does_not_fit(name, group):
    state = golden(name)[1][group]
    with pytest.raises(ConversionError) as error:
        imported(name, group, **dict.fromkeys(state) | {"surplus.weight": np.zeros(7)})
    lines = {line.strip() for line in str(error.value).splitlines()[1:]}
    missing = {f"missing: {key} {list(tensor.shape)}" for key, tensor in state.items()}
    assert lines == missing | {"unexpected: surplus.weight [7]"}


@pytest.mark.parametrize(
    ("name", "group", "key"),
    [("rae_ditdh", "state", "dec_feat_rope.freqs_cos"), ("rae_disc", "dino_state", "x_shift")],
)
def test_other_derived_values_are_refused(name, group, key):
    changed = golden(name)[1][group][key] + np.float32(0.01)
    with pytest.raises(ConversionError, match=f"wrong values: {key} is off by up to 0.01"):
        imported(name, group, **{key: changed})


def test_dinos_own_file():
    state = golden("rae_disc")[1]["dino_state"]
    own = {key: value for key, value in state.items() if not key.startswith("x_s")}
    bias = "blocks.0.attn.qkv.bias"
    own[bias] = own[bias] + np.float32(0.5)
    found = rae_tables.dino_tensors(own)
    assert found.keys() == state.keys()
    np.testing.assert_array_equal(found[bias][64:128], 0)
    np.testing.assert_array_equal(np.delete(found[bias], range(64, 128)),
                                  np.delete(own[bias], range(64, 128)))  # fmt: skip
    imported("rae_disc", "dino_state", **found)


def abstract(module, **sizes):
    return Network(partial(module, **sizes))


def trained(network):
    return sum(leaf.size for leaf in jax.tree.leaves(network.abstract[0]))


# Trained parameters; positions and frequencies are fixed and not among them.
@pytest.mark.parametrize(("name", "millions"), [("DH-XL", 838.4), ("DH-S", 196.4)])
def test_parameters_of_ditdh(name, millions):
    network = abstract(ddt.DiTwDDTHead, **ddt.SIZES[name])
    assert round(trained(network) / 1e6, 1) == millions
    width = ddt.SIZES[name]["hidden_size"][0]
    assert network.size - trained(network) == 256 * width + 256


def test_parameters_of_the_discriminator():
    features, heads = abstract(DinoFeatures), abstract(DinoDisc)
    assert features.size == 21_670_272  # ViT-S/8 with its final norm
    assert not jax.tree.leaves(features.abstract[1])
    # two convolutions and norms of 384 channels and the last convolution, five times
    assert trained(heads) == 5 * (384 * 384 * (1 + 9) + 2 * 3 * 384 + 384 + 1)
    maps = [jax.ShapeDtypeStruct((2, 784, 384), jnp.float32)] * 5

    def logits(maps):
        return DinoDisc(rngs=Keys(0))(maps, train=False)

    assert jax.eval_shape(logits, maps).shape == (2, 3920)
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    found = jax.eval_shape(lambda x: DinoFeatures(rngs=Keys(0)).maps(x), images)
    assert [x.shape for x in found] == [(2, 784, 384)] * 5


@pytest.mark.parametrize(
    "module",
    [
        partial(ddt.DiTwDDTHead, **ddt.SIZES["DH-S"]),
        partial(dit.LightningDiT, use_gembed=True, depth=1),
        DinoFeatures,
        DinoDisc,
    ],
)
def test_every_leaf_has_a_rule(module):
    sharding.shard(Network(module).abstract, make_mesh(1, 4, 2))


def small(**more):
    sizes = dict(
        input_size=4, in_channels=8, hidden_size=(16, 32), depth=(1, 1), num_heads=(2, 2),
        num_classes=3,
    )  # fmt: skip
    return nnx.jit(lambda: ddt.DiTwDDTHead(**sizes | more, rngs=Keys(0)))()


def test_the_output_is_zero_at_first():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    call = nnx.jit(lambda model, *arrays: model(*arrays))
    got = call(small(), x, jnp.array([0.1, 0.9]), jnp.array([0, 3]))
    np.testing.assert_array_equal(got, np.zeros((2, 4, 4, 8)))


def test_initialisation():
    """Embedders Xavier, blocks PyTorch's default: what a standard deviation tells apart."""
    model = small(hidden_size=(64, 128), num_heads=(2, 2))
    kernel = model.blocks[1].attn.qkv.kernel[...]  # Xavier would be sqrt(2 / (128 + 384))
    np.testing.assert_allclose(np.std(kernel), np.sqrt(1 / (3 * 128)), rtol=0.05)
    kernel = model.x_embedder["proj"].kernel[...]
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (8 + 128)), rtol=0.1)
    np.testing.assert_allclose(np.std(model.t_embedder.W[...]), 1, rtol=0.15)


def test_a_token_is_modulated_by_its_own_condition():
    modulation = dit.Modulation(8, 6, dtype=jnp.float32, rngs=Keys(0))
    key = jax.random.key(0)
    modulation.linear.kernel[...] = jax.random.normal(key, (8, 48))
    s = jax.random.normal(key, (1, 5, 8))
    for before, after in zip(modulation(s), modulation(s.at[0, 2].add(1.0)), strict=True):
        np.testing.assert_array_equal(np.any(before != after, axis=(0, 2)), np.arange(5) == 2)


def test_the_head_is_told_of_each_token_apart():
    """Without attention in the head, a token's condition changes that token's velocity alone."""
    model, _ = load("rae_ditdh")
    block = model.blocks[2]
    block.attn.proj.kernel[...] = jnp.zeros_like(block.attn.proj.kernel[...])
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 16))
    s = jax.random.normal(jax.random.key(1), (1, 16, 96))
    head = nnx.jit(lambda model, x, s: model.head(x, s))
    moved = np.any(head(model, x, s) != head(model, x, s.at[0, 5].add(1.0)), axis=(0, 3))
    np.testing.assert_array_equal(moved.ravel(), np.arange(16) == 5)


def test_dropped_labels_become_the_null_class():
    model = small(class_dropout_prob=1.0)
    labels = model.drop_labels(jnp.array([0, 1, 2]), jax.random.key(0))
    np.testing.assert_array_equal(labels, [3, 3, 3])


def test_blocks_outside_the_depth_are_refused():
    with pytest.raises(ValueError, match=r"key_depths are \[2, 12\], but the blocks are 0 to 11"):
        DinoFeatures(key_depths=(2, 12), rngs=Keys(0))


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="ks is 8; the kernel must be odd"):
        DinoDisc(ks=8, rngs=Keys(0))
