"""The released vision encoders against Hugging Face's modules, and weights there and back again.

A golden file holds weights (`state.NAME`, names and layouts of Hugging Face transformers), inputs
and outputs (`io.NAME`) of a released PyTorch module in fp32.
"""

import inspect
from functools import partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import arguments_of, check

from gae_jax.interop import vision_files, vision_tables
from gae_jax.interop.convert import ConversionError, export_torch, import_torch
from gae_jax.nn import positions
from gae_jax.nn.network import Network
from gae_jax.pretrained import dinov2, mae

TABLES = {
    "dinov2": vision_tables.DINOV2,
    "dinov2_registers": vision_tables.DINOV2,
    "vit_mae": vision_tables.MAE,
    "dinov3": vision_tables.DINOV3,
    "dinov3_gated": vision_tables.DINOV3,
    "siglip2": vision_tables.SIGLIP,
}
SIZES = {"": "the configured", "_small": "a smaller", "_rect": "a rectangular"}


def golden(name):
    """(arguments of the module, {torch name: weight}, {name: input or output}).

    That of SigLIP 2 is the file of a whole model, of which the vision tower is taken.
    """
    config, groups = golden_files.golden(name)
    state = groups["state"]
    if name == "siglip2":
        state = vision_files.encoder_tensors("siglip", state, num_heads=2)
    return arguments_of(TABLES[name].module, config), state, groups["io"]


def network_of(name, **more):
    return Network(partial(TABLES[name].module, **golden(name)[0], **more))


def load(name, **more):
    """The module with the golden weights."""
    network = network_of(name, **more)
    arrays = import_torch(TABLES[name], golden(name)[1], network)
    return network(*jax.tree.map(jnp.asarray, arrays))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TABLES)
def test_outputs(name, size):
    model, io = load(name), golden(name)[2]
    outputs = {
        "last_hidden_state": model,
        "patch_tokens": model.patch_tokens,
        "patch_tokens_no_affine": partial(model.patch_tokens, affine=False),
    }
    image = jnp.moveaxis(io[f"image{size}"], 1, -1)
    found = jax.jit(lambda image: {key: call(image) for key, call in outputs.items()})(image)
    for key, got in found.items():
        check(key, got, io[f"{key}{size}"])


def test_bf16_stays_near_fp32():
    io = golden("dinov2_registers")[2]
    model = load("dinov2_registers", dtype=jnp.bfloat16)
    got = jax.jit(model)(jnp.moveaxis(io["image_small"], 1, -1))
    assert got.dtype == jnp.bfloat16
    check("last_hidden_state", got, io["last_hidden_state_small"], tolerance=0.1)


@pytest.mark.parametrize("name", ["dinov2", "vit_mae"])
def test_images_that_do_not_divide_into_patches_are_refused(name):
    with pytest.raises(ValueError, match=r"multiples of .* got \[1, 42, 45, 3\]"):
        load(name)(jnp.zeros((1, 42, 45, 3)))


@pytest.mark.parametrize("name", TABLES)
def test_weights_survive_the_round_trip(name):
    sizes, state, _ = golden(name)
    exported = export_torch(
        TABLES[name], *import_torch(TABLES[name], state, network_of(name)), **sizes
    )
    assert exported.keys() == state.keys()
    for key, want in state.items():
        assert exported[key].dtype == want.dtype, key
        np.testing.assert_array_equal(exported[key], want, err_msg=key)


@pytest.mark.parametrize("name", TABLES)
def test_every_missing_tensor_is_named(name):
    _, state, _ = golden(name)
    network = network_of(name)
    for missing in state:
        rest = {key: value for key, value in state.items() if key != missing}
        with pytest.raises(ConversionError) as error:
            import_torch(TABLES[name], rest, network)
        lines = [line.strip() for line in str(error.value).splitlines()[1:]]
        assert lines == [f"missing: {missing} {list(state[missing].shape)}"]


def test_a_network_without_mask_token_refuses_one():
    sizes, state, _ = golden("dinov2")
    network = Network(partial(dinov2.Dinov2, **sizes | {"use_mask_token": False}))
    with pytest.raises(ConversionError, match=r"unexpected: embeddings.mask_token \[1, 64\]"):
        import_torch(vision_tables.DINOV2, state, network)


HUB_NAMES = (  # first match wins
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer", "blocks"),
    ("layernorm", "norm"),
)


def hub_state(state):
    """A DINOv2 of Hugging Face by the names of the DINOv2 repository."""
    hub = {}
    for name, tensor in state.items():
        old, new = next(pair for pair in HUB_NAMES if name.startswith(pair[0]))
        name = (name.replace(old, new, 1)).replace("attention.output.dense", "attn.proj")
        for n in "12":
            name = name.replace(f"layer_scale{n}.lambda1", f"ls{n}.gamma")
        if "attention.attention" in name:
            kind = name.rpartition(".")[2]
            block = name.partition(".attention")[0]
            source = f"{block.replace('blocks', 'encoder.layer')}.attention.attention"
            hub[f"{block}.attn.qkv.{kind}"] = np.concatenate(
                [state[f"{source}.{part}.{kind}"] for part in ("query", "key", "value")]
            )
        else:
            name = name.replace("weights_in", "w12").replace("weights_out", "w3")
            hub[name] = tensor
    return hub


def swiglu():
    """(arguments, weights by the names of Hugging Face) of a small network with SwiGLU."""
    sizes = golden("dinov2_registers")[0] | dict(use_swiglu_ffn=True, num_hidden_layers=11)
    network = Network(partial(dinov2.Dinov2, **sizes))
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), network.abstract
    )
    return sizes, export_torch(vision_tables.DINOV2, *arrays, **sizes)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers", "swiglu"])
def test_both_kinds_of_names_give_the_same_network(name):
    sizes, state = swiglu() if name == "swiglu" else golden(name)[:2]
    network, hub = Network(partial(dinov2.Dinov2, **sizes)), hub_state(state)
    assert "blocks.1.attn.qkv.weight" in hub
    one = import_torch(vision_tables.DINOV2, state, network)
    other = import_torch(vision_tables.DINOV2_HUB, hub, network)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    exported = export_torch(vision_tables.DINOV2_HUB, *one, **sizes)
    assert exported.keys() == hub.keys()
    jax.tree.map(np.testing.assert_array_equal, exported, hub)


def test_swiglu_is_what_the_names_say():
    _, state = swiglu()
    hidden = 176  # 2/3 of 4 * 64, up to a multiple of 8
    assert state["encoder.layer.10.mlp.weights_in.weight"].shape == (2 * hidden, 64)
    assert state["encoder.layer.10.mlp.weights_out.weight"].shape == (64, hidden)


def test_the_encoder_of_a_pretraining_checkpoint():
    _, state, _ = golden("vit_mae")
    whole = {f"vit.{key}": value for key, value in state.items()}
    whole |= {"decoder.mask_token": np.zeros((1, 1, 8)), "surplus": np.zeros(7)}
    tensors = vision_files.encoder_tensors("mae", whole, num_heads=4)
    assert tensors.keys() == state.keys() | {"surplus"}
    with pytest.raises(ConversionError, match=r"unexpected: surplus \[7\]"):
        import_torch(vision_tables.MAE, tensors, network_of("vit_mae"))
    del tensors["surplus"]
    import_torch(vision_tables.MAE, tensors, network_of("vit_mae"))
    assert vision_files.encoder_tensors("mae", state, num_heads=4).keys() == state.keys()
    with pytest.raises(ConversionError, match=r"1 tensor twice, with 'vit\.' before"):
        vision_files.encoder_tensors("mae", whole | {"surplus": 0, "vit.surplus": 0}, num_heads=4)


# Mask token and learned position table included, as in the released checkpoints.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("small", 22_056_576),
        ("base", 86_580_480),
        ("large", 304_368_640),  # as the paper of GAE counts its teacher
        ("giant", 1_136_480_768),
        ("large_registers", 304_368_640 + 4 * 1024),
    ],
)
def test_parameters_of_dinov2(name, count):
    network = Network(partial(dinov2.Dinov2, **dinov2.PRESETS[name]))
    assert network.size == count
    assert not jax.tree.leaves(network.abstract[1])  # all of it is learned


@pytest.mark.parametrize(("name", "count"), [("base", 85_798_656), ("large", 303_301_632)])
def test_parameters_of_mae(name, count):
    network = Network(partial(mae.MAEEncoder, **mae.PRESETS[name]))
    assert network.size == count
    assert network.abstract[1]["pos_embed"].shape == (1, 197, mae.PRESETS[name]["hidden_size"])


def test_positions_of_mae():
    """CLS at zero; then half the channels for the column, half for the row, sines first."""
    sizes = golden("vit_mae")[0] | {"image_size": 40}
    _, rest = Network(partial(mae.MAEEncoder, **sizes)).init(jax.random.key(0))
    want = np.zeros((1, 26, 64))
    for row, column in np.ndindex(5, 5):
        frequencies = 10_000.0 ** (-np.arange(16) / 16)
        want[0, 1 + 5 * row + column] = np.concatenate(
            [wave(place * frequencies) for place in (column, row) for wave in (np.sin, np.cos)]
        )
    np.testing.assert_allclose(rest["pos_embed"], want, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_mae_interpolates_as_dinov2_does(size):
    """The position table of the golden MAE is zero, so DINOv2's stands in for it.

    With the layer scales multiplied into the layers before them, DINOv2 is the encoder of MAE.
    """
    sizes, state, io = golden("dinov2")
    params, _ = import_torch(vision_tables.DINOV2, state, network_of("dinov2"))
    for block in params["blocks"].values():
        for scale, layer in (
            (block.pop("ls1"), block["attn"]["proj"]),
            (block.pop("ls2"), block["mlp"]["fc2"]),
        ):
            for name in ("kernel", "bias"):
                layer[name] = layer[name] * scale["gamma"]
    del params["mask_token"]
    rest = {"pos_embed": params.pop("pos_embed")}
    same = inspect.signature(mae.MAEEncoder.__init__).parameters.keys() & sizes.keys()
    network = Network(
        partial(mae.MAEEncoder, intermediate_size=256, **{key: sizes[key] for key in same})
    )
    model = network(*jax.tree.map(jnp.asarray, (params, rest)))
    got = nnx.jit(mae.MAEEncoder.__call__)(model, jnp.moveaxis(io[f"image{size}"], 1, -1))
    check("last_hidden_state", got, io[f"last_hidden_state{size}"])


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("size_in", "size_out"), [(37, 16), (5, 6), (4, 4)])
def test_resizing_keeps_constants_and_the_same_size(size_in, size_out, antialias):
    matrix = positions.resize_matrix(size_in, size_out, antialias=antialias)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
    if size_in == size_out:
        np.testing.assert_allclose(matrix, np.eye(size_in), atol=1e-7)


def test_offset_of_the_hub_moves_the_sampled_points():
    """The cubic kernel keeps a straight line to about 0.1, so the points can be read off one."""
    shift = np.diff(
        [
            positions.resize_matrix(37, 16, antialias=False, offset=offset)[-1] @ np.arange(37)
            for offset in (0.0, 0.1)
        ]
    )
    np.testing.assert_allclose(shift, 15.5 * (37 / 16.1 - 37 / 16), atol=0.1)
