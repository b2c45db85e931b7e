"""PAE and the decoder of RAE against the released modules, and weights there and back again.

A golden file holds weights (`state.NAME`, torch layout), inputs and outputs (`io.NAME`, channels
first) of a released PyTorch module in fp32.
"""

from functools import partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import arguments_of, check

from gae_jax.interop.convert import ConversionError, export_torch, import_torch
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.nn.torch_names import Row, Table
from gae_jax.tokenizers import pae_torch
from gae_jax.tokenizers.pae_modulator import DeltaEncoder
from gae_jax.tokenizers.pae_networks import Bottleneck, onto_sphere


def part(module, prefix, *, keep=""):
    """The table of a part of PAE, whose names begin with the prefix."""
    rows = (row for row in pae_torch.PAE_MODEL.rows if row.ours.startswith(keep or prefix))
    return Table(
        module, tuple(Row(*(x.removeprefix(prefix) for x in row[:2]), row[2]) for row in rows)
    )


DELTA_ENCODER = part(DeltaEncoder, "delta_encoder.")
BOTTLENECK = part(Bottleneck, "", keep="latent_")
MODULATORS = ["pae_dam", "pae_dam_add", "pae_dam_concat"]
DECODERS = ["pae_decoder", "rae_decoder"]
TABLES = {
    **dict.fromkeys(MODULATORS, DELTA_ENCODER),
    "pae_bottleneck": BOTTLENECK,
    **dict.fromkeys(DECODERS, pae_torch.DECODER),
}


def golden(name):
    """(arguments of the module, {torch name: weight}, {name: input or output})."""
    config, groups = golden_files.golden(name)
    return arguments_of(TABLES[name].module, config), groups["state"], groups["io"]


def network_of(name, **more):
    return Network(partial(TABLES[name].module, **golden(name)[0] | more))


def load(name, **more):
    """(module with the golden weights, io)."""
    network = network_of(name, **more)
    arrays = import_torch(TABLES[name], golden(name)[1], network)
    return network(*jax.tree.map(jnp.asarray, arrays)), golden(name)[2]


def last(x):
    """Channels last."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


@pytest.mark.parametrize("name", MODULATORS)
def test_modulator(name):
    model, io = load(name)
    check("out", jax.jit(model)(last(io["pixel_values"]), io["vfm_tokens"]), io["out"])


def test_a_modulator_without_fusion_gives_what_the_others_fuse():
    """It has neither `fusion_proj` nor `final_ln`; with "concat" both can be undone."""
    sizes, state, io = golden("pae_dam_concat")
    inputs = last(io["pixel_values"]), io["vfm_tokens"]
    bare = {k: v for k, v in state.items() if not k.startswith(("fusion_proj", "final_ln"))}
    network = Network(partial(DeltaEncoder, **sizes | {"fusion_mode": "none"}))
    arrays = import_torch(DELTA_ENCODER, bare, network)
    tokens = network(*jax.tree.map(jnp.asarray, arrays))(*inputs)
    with pytest.raises(ConversionError, match=r"unexpected: final_ln.bias \[64\]"):
        import_torch(DELTA_ENCODER, state, network)
    both = np.concatenate([io["vfm_tokens"], tokens], axis=-1).astype(np.float64)
    fused = both @ state["fusion_proj.weight"].T + state["fusion_proj.bias"]
    fused = (fused - fused.mean(-1, keepdims=True)) / np.sqrt(fused.var(-1, keepdims=True) + 1e-5)
    check("out", fused * state["final_ln.weight"] + state["final_ln.bias"], io["out"])


def test_bottleneck():
    model, io = load("pae_bottleneck")
    check("attn_tokens", model.latent_compressor[0](io["tokens"]), io["attn_tokens"])
    check("pre_norm_latent", model.project(io["tokens"]), last(io["pre_norm_latent"]))
    latent = model.compress(io["tokens"])
    check("latent", latent, last(io["latent"]))
    check("decoded_tokens", model.decompress(latent), io["decoded_tokens"])
    sampled = model.decompress(last(io["sampled_latent"]))
    check("sampled_decoded_tokens", sampled, io["sampled_decoded_tokens"])


def test_both_norms_of_the_bottleneck():
    _, io = load("pae_bottleneck")
    before = last(io["pre_norm_latent"])
    check("latent", onto_sphere(before), last(io["latent"]))
    want = last(io["latent_per_sample_norm"])
    check("latent_per_sample_norm", onto_sphere(before, "per-sample"), want)
    check("latent", load("pae_bottleneck", sphere="per-sample")[0].compress(io["tokens"]), want)
    with pytest.raises(ValueError, match="sphere is 'per-image'; use one of per-token, per-sample"):
        onto_sphere(before, "per-image")


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name):
    model, io = load(name)
    call = jax.jit(model)
    logits = call(io["tokens"])
    image = model.unpatchify(logits)
    check("logits", logits, io["logits"])
    check("image", image, last(io["image"]))
    denormalised = image * IMAGENET_STD + IMAGENET_MEAN
    check("image_denormalised", denormalised, last(io["image_denormalised"]))
    check("logits_other_grid", call(io["tokens_other_grid"]), io["logits_other_grid"])
    check("logits_with_cls", call(io["tokens_with_cls"][:, 1:]), io["logits_with_cls"])


def test_decoder_refuses_a_cls():
    model, io = load("pae_decoder")
    with pytest.raises(ValueError, match=r"a square grid, got 17; .*such as CLS"):
        model(io["tokens_with_cls"])


# in fp32 all three are compared above; the decoder has the layers of the others, and more
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("pae_dam", "pae_bottleneck")),
        "pae_decoder",
    ],
)
def test_bf16_stays_near_fp32(name):
    model, io = load(name, dtype=jnp.bfloat16)
    if name == "pae_dam":
        got, want = model(last(io["pixel_values"]), io["vfm_tokens"]), io["out"]
        assert got.dtype == jnp.bfloat16
    elif name == "pae_bottleneck":
        got, want = model.compress(io["tokens"]), last(io["latent"])
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(jnp.mean(got**2, axis=-1), 1, atol=1e-4)  # the norm is in fp32
    else:
        got, want = jax.jit(model)(io["tokens"]), io["logits"]
        assert got.dtype == jnp.float32
    check(name, got, want, tolerance=0.1)


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


@pytest.mark.parametrize("name", ["pae_dam", "pae_bottleneck", "pae_decoder"])
def test_every_missing_tensor_is_named(name):
    _, state, _ = golden(name)
    network = network_of(name)
    for missing in state:
        rest = {key: value for key, value in state.items() if key != missing}
        with pytest.raises(ConversionError) as error:
            import_torch(TABLES[name], rest, network)
        lines = [line.strip() for line in str(error.value).splitlines()[1:]]
        assert lines == [f"missing: {missing} {list(state[missing].shape)}"]


def test_position_tables_are_the_released_ones():
    for name, key, layers in (
        ("pae_dam", "pos_embed", "depth"),
        ("pae_decoder", "decoder_pos_embed", "decoder_num_hidden_layers"),
    ):
        _, rest = network_of(name, **{layers: 0}).init(jax.random.key(0))
        np.testing.assert_allclose(rest[key], golden(name)[1][key], atol=1e-6)


def whole():
    """(arguments, state dict) of a PAE made of the golden modulator and bottleneck."""
    sizes = dict(
        hidden_size=64,
        num_heads=4,
        encoder_input_size=32,
        encoder_patch_size=8,
        delta_depth=2,
        latent_dim=8,
        decoder_patch_size=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    network = Network(partial(pae_torch.PAE_MODEL.module, **sizes))
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 10, network.abstract
    )
    state = export_torch(pae_torch.PAE_MODEL, *arrays, **sizes)
    parts = {f"delta_encoder.{k}": v for k, v in golden("pae_dam")[1].items()}
    parts |= golden("pae_bottleneck")[1]
    assert parts.keys() == {k for k in state if not k.startswith("decoder.")}
    return sizes, network, state | parts


def test_a_checkpoint_of_all_of_pae():
    sizes, network, state = whole()
    assert {k.partition(".")[0] for k in state} == {
        "delta_encoder",
        "latent_compressor",
        "latent_decompressor",
        "decoder",
    }
    # the frozen encoder's tensors are left aside
    stored = state | {"encoder.encoder.layernorm.weight": np.zeros(3, np.float32)}
    arrays = import_torch(pae_torch.PAE_MODEL, stored, network)
    exported = export_torch(pae_torch.PAE_MODEL, *arrays, **sizes)
    assert exported.keys() == state.keys()
    jax.tree.map(np.testing.assert_array_equal, exported, state)
    model = network(*jax.tree.map(jnp.asarray, arrays))
    io, latents = golden("pae_dam")[2], golden("pae_bottleneck")[2]
    got = model.delta_encoder(last(io["pixel_values"]), io["vfm_tokens"])
    check("out", got, io["out"])
    check("latent", model.compress(latents["tokens"]), last(latents["latent"]))
    with pytest.raises(ConversionError, match=r"unexpected: discriminator.weight \[3\]"):
        import_torch(pae_torch.PAE_MODEL, state | {"discriminator.weight": np.zeros(3)}, network)
