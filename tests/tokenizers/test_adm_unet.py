"""ADM's U-Net against guided_diffusion's UNetModel, and its weights there and back.

Golden files as in test_conv_vae.py; that of the larger network is kept in two files.
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
from gae_jax.nn.network import Keys, Network
from gae_jax.nn.torch_names import Row, Table, biased, norm
from gae_jax.runtime import sharding
from gae_jax.runtime.mesh import make_mesh
from gae_jax.tokenizers import dgae_unet
from gae_jax.tokenizers.dgae_unet import UNetModel

FILES = {
    "adm_unet": ("adm_unet", "adm_unet_output_blocks"),
    "adm_unet_updown": ("adm_unet_updown",),
}


def res_block_rows(name: str) -> tuple[Row, ...]:
    return (
        *norm(f"{name}.in_layers.0", weight="scale"),
        *biased(f"{name}.in_layers.2", transform="conv"),
        *biased(f"{name}.emb_layers.1"),
        *norm(f"{name}.out_layers.0", weight="scale"),
        *biased(f"{name}.out_layers.3", transform="conv"),
        *biased(f"{name}.skip_connection", transform="conv"),
    )


def attention_rows(name: str) -> tuple[Row, ...]:
    return (
        *norm(f"{name}.norm", weight="scale"),
        *biased(f"{name}.qkv"),
        *biased(f"{name}.proj_out"),
    )


UNET = Table(
    UNetModel,
    (
        *biased("time_embed.{n}"),
        *biased("input_blocks.0.0", transform="conv"),
        *res_block_rows("input_blocks.{n}.0"),
        *attention_rows("input_blocks.{n}.1"),
        *biased("input_blocks.{n}.0.op", transform="conv"),
        *res_block_rows("middle_block.{n}"),
        *attention_rows("middle_block.1"),
        # the resampling comes last, after the attention if there is any
        *(row for place in range(3) for row in res_block_rows(f"output_blocks.{{n}}.{place}")),
        *attention_rows("output_blocks.{n}.1"),
        *(
            row
            for place in (1, 2)
            for row in biased(f"output_blocks.{{n}}.{place}.conv", transform="conv")
        ),
        *norm("out.0", weight="scale"),
        *biased("out.2", transform="conv"),
    ),
)
SMALL = dict(
    in_channels=5,
    model_channels=32,
    out_channels=3,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_heads=2,
    use_scale_shift_norm=True,
)
TINY = SMALL | dict(channel_mult=(1,), num_res_blocks=0, attention_resolutions=())
run = nnx.jit(lambda model, *inputs: model(*inputs))


def golden(name):
    """(arguments of the module, {torch name: weight}, {name: input or output, channels last})."""
    config, groups = golden_files.golden(*FILES[name])
    return arguments_of(UNetModel, config), groups["state"], channels_last(groups["io"])


@cache
def network_of(name, **more):
    return Network(partial(UNetModel, **golden(name)[0], **more))


def load(name, **more):
    """The module with the golden weights."""
    network = network_of(name, **more)
    return network(*jax.tree.map(jnp.asarray, import_torch(UNET, golden(name)[1], network)))


def random_model(module, **sizes):
    """A module whose arrays are all random, those that start at zero too."""
    network, rng = Network(partial(module, **sizes)), np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), network.abstract
    )
    return network(*arrays)


def images(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("name", FILES)
def test_output(name):
    io = golden(name)[2]
    check("out", run(load(name), io["x"], io["timesteps"]), io["out"])


def test_timestep_embedding():
    """PyTorch's own fp32 angles are 2e-5 away from its fp64 ones at t = 981.5, says the file."""
    io = golden("adm_unet")[2]
    got = dgae_unet.timestep_embedding(jnp.asarray(io["timesteps"]), 32)
    check("timestep_embedding", got[:2], io["timestep_embedding"][:2])
    check("timestep_embedding", got, io["timestep_embedding"], tolerance=5e-5)
    odd = dgae_unet.timestep_embedding(jnp.asarray([0.0, 1.0]), 5)
    np.testing.assert_allclose(
        odd, [[1, 1, 0, 0, 0], [np.cos(1), np.cos(0.01), np.sin(1), np.sin(0.01), 0]], atol=1e-6
    )


@pytest.mark.parametrize("name", FILES)
def test_weights_survive_the_round_trip(name):
    sizes, state, _ = golden(name)
    exported = export_torch(UNET, *import_torch(UNET, state, network_of(name)), **sizes)
    assert exported.keys() == state.keys()
    for key, want in state.items():
        assert exported[key].dtype == want.dtype, key
        np.testing.assert_array_equal(exported[key], want, err_msg=key)


@pytest.mark.parametrize("updown", [False, True])
def test_weights_of_other_sizes_survive_the_round_trip(updown):
    """Attention at the highest resolution too, none at the middle one."""
    sizes = SMALL | dict(
        model_channels=64, channel_mult=(0.5, 1, 0.5), attention_resolutions=(1, 4),
        resblock_updown=updown,
    )  # fmt: skip
    network, rng = Network(partial(UNetModel, **sizes)), np.random.default_rng(0)
    arrays = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), network.abstract
    )
    tensors = export_torch(UNET, *arrays, **sizes)
    jax.tree.map(np.testing.assert_array_equal, import_torch(UNET, tensors, network), arrays)
    assert len(tensors) == len(jax.tree.leaves(arrays))
    layer = "in_layers.2" if updown else "conv"
    for place in ("1.2", "3.1"):  # behind attention, and without
        assert f"output_blocks.{place}.{layer}.weight" in tensors


@pytest.mark.parametrize("name", FILES)
def test_every_missing_tensor_is_named(name):
    _, state, _ = golden(name)
    for missing in list(state)[::20]:
        rest = {key: value for key, value in state.items() if key != missing}
        with pytest.raises(ConversionError) as error:
            import_torch(UNET, rest, network_of(name))
        lines = [line.strip() for line in str(error.value).splitlines()[1:]]
        assert lines == [f"missing: {missing} {list(state[missing].shape)}"]


def group_norm(x):
    """In NumPy, with weights of one."""
    shape = x.shape
    x = x.reshape(shape[0], -1, 32, shape[-1] // 32)
    x = x - x.mean(axis=(1, 3), keepdims=True)
    return (x / np.sqrt(np.mean(x**2, axis=(1, 3), keepdims=True) + 1e-5)).reshape(shape)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_residual_block_is_what_it_says(scale_shift, resample):
    """With kernels that are zero but for their middle, against NumPy in float64."""
    sizes = dict(scale_shift=scale_shift, resample=resample, dtype=jnp.float32)
    block = nnx.jit(lambda: dgae_unet.ResBlock(64, 64, 8, **sizes, rngs=Keys(0)))()
    rng = np.random.default_rng(0)
    kernels = 0.2 * rng.normal(size=(2, 64, 64))
    for layer, kernel in zip((block.in_layers["2"], block.out_layers["3"]), kernels, strict=True):
        layer.kernel[...] = jnp.zeros((3, 3, 64, 64)).at[1, 1].set(kernel)
        layer.bias[...] = jnp.zeros(64)
    x, emb = rng.normal(size=(2, 4, 4, 64)), rng.normal(size=(2, 8))
    linear = block.emb_layers["1"]
    moved = silu(emb) @ np.asarray(linear.kernel) + np.asarray(linear.bias)

    def resized(x):
        if resample == "up":
            return x.repeat(2, axis=1).repeat(2, axis=2)
        if resample == "down":
            return x.reshape(2, 2, 2, 2, 2, 64).mean(axis=(2, 4))
        return x

    h = resized(silu(group_norm(x))) @ kernels[0]
    if scale_shift:
        scale, shift = np.split(moved[:, None, None], 2, axis=-1)
        h = group_norm(h) * (1 + scale) + shift
    else:
        h = group_norm(h + moved[:, None, None])
    want = resized(x) + silu(h) @ kernels[1]
    check("block", jax.jit(block)(x.astype(np.float32), emb.astype(np.float32)), want)


def test_branches_and_output_of_a_fresh_network_start_at_zero():
    params, _ = jax.jit(Network(partial(UNetModel, **TINY)).init)(jax.random.key(0))
    zero = {
        sharding.path_of(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if not np.any(leaf) and path[-1].key == "kernel"
    }
    blocks = ("middle_block/0", "middle_block/2", "output_blocks/0/0")
    assert zero == {
        *(f"{block}/out_layers/3/kernel" for block in blocks),
        "middle_block/1/proj_out/kernel",
        "out/2/kernel",
    }


def test_condition_is_repeated_and_appended():
    """Every pixel of the latent belongs to a square of the image; the latent matters."""
    model = random_model(UNetModel, **TINY)
    x, z, t = images(1, 8, 8, 3), images(1, 2, 2, 2), jnp.asarray([0.3])
    wide = np.asarray(z).repeat(4, axis=1).repeat(4, axis=2)
    got = run(model, x, t, z)
    np.testing.assert_array_equal(got, run(model, jnp.concatenate([x, wide], axis=-1), t))
    assert np.max(np.abs(got - run(model, x, t, -z))) > 1e-3
    assert np.max(np.abs(got - run(model, x, 1 - t, z))) > 1e-3


@pytest.mark.parametrize(
    ("x", "z", "message"),
    [
        ((1, 8, 8, 3), (1, 3, 3, 2), "a latent of 3 x 3 does not fit an image of 8 x 8"),
        ((1, 8, 8, 3), (1, 4, 2, 2), "a latent of 4 x 2 does not fit"),
        ((1, 8, 8, 3), (1, 16, 16, 2), "a latent of 16 x 16 does not fit"),
        ((1, 8, 8, 3), (1, 4, 4, 4), r"takes \[B, H, W, 5\] .* got \[1, 8, 8, 7\]"),
        ((1, 8, 7, 5), None, r"multiples of 2, latent included, got \[1, 8, 7, 5\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, z, message):
    model = nnx.eval_shape(lambda: UNetModel(**SMALL, rngs=Keys(0)))
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(x), jnp.zeros(1), None if z is None else jnp.zeros(z))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=5), "32 channels do not divide into 5 heads"),
        (dict(num_head_channels=24), "32 channels do not divide into heads of 24"),
        (dict(model_channels=16), "16 channels do not divide into 32 groups"),
        (dict(remat="some"), "remat is 'some'"),
        (dict(attention="flash"), "attention is 'flash'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    sizes = TINY | changes
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: UNetModel(**sizes, rngs=Keys(0)))


def test_bf16_stays_near_fp32_with_parameters_in_fp32():
    model, io = load("adm_unet", dtype=jnp.bfloat16), golden("adm_unet")[2]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    got = run(model, io["x"], io["timesteps"])
    assert got.dtype == jnp.float32
    difference = np.max(np.abs(got - io["out"])) / np.max(np.abs(io["out"]))
    assert 1e-4 < difference < 0.1  # in half precision, but near


@cache
def large():
    """The decoder of epsilon-VAE that DGAE's spec calls L, for a latent of 16 channels."""
    return Network(
        partial(
            UNetModel, in_channels=19, model_channels=128, out_channels=3, num_res_blocks=2,
            attention_resolutions=(16,), channel_mult=(1, 1, 2, 2, 4), num_head_channels=64,
            use_scale_shift_norm=True, resblock_updown=True,
        )
    )  # fmt: skip


def test_parameters_of_the_large_decoder():
    """epsilon-VAE says 89.0 M of a U-Net that it describes by these figures only."""
    assert large().size == 86_344_067
    assert abs(large().size / 89.0e6 - 1) < 0.05


def test_rules_shard_the_network():
    mesh = make_mesh(1, 8, 1)
    tree = {"params": {"decoder": large().abstract[0]}}
    sharding.shard({"params": {"decoder": network_of("adm_unet").abstract[0]}}, mesh)
    assert sharding.unsharded(tree, mesh)[0] < 0.02
