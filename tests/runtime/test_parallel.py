"""Meshes, rules, and the same step on one device and on eight."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax.data.latents import LatentSet
from gae_jax.nn.network import Network
from gae_jax.pretrained import dinov2, mae
from gae_jax.pretrained.dinov2 import Dinov2
from gae_jax.pretrained.inception import FIDInception
from gae_jax.pretrained.lpips import LPIPS
from gae_jax.pretrained.mae import MAEEncoder
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime import sharding
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.keys import stage_key
from gae_jax.runtime.mesh import (
    check_batch,
    local_part,
    local_rows,
    make_mesh,
    put_batch,
    put_rows,
    to_host,
)
from gae_jax.stages import backbone, diffusion, teacher, tokenizer
from gae_jax.train.fit import init_state, jit_step


def make_stage(name, config, path):
    session = Session(config, Run(path))
    if name == "diffusion":
        return diffusion.make_stage(session, LatentSet.open(path / "latents"))
    return {"backbone": backbone, "teacher": teacher, "tokenizer": tokenizer}[name].make_stage(
        session
    )


NAMES = ("backbone", "teacher", "tokenizer", "diffusion")


def test_one_device_is_a_mesh_of_one_and_minus_one_takes_the_rest():
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == dict(data=1, fsdp=1, tensor=1)
    assert dict(make_mesh(-1, 2, 2).shape) == dict(data=2, fsdp=2, tensor=2)
    assert all(axis.name == "Auto" for axis in make_mesh().axis_types)


@pytest.mark.parametrize("shape", [(3, 1, 1), (16, 1, 1), (-1, 3, 1)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        make_mesh(*shape)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="batch_size 12 does not divide over 8 devices"):
        check_batch(12, make_mesh(), "batch_size")


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_of_every_stage_has_a_rule(name, config, small_run):
    abstract = jax.eval_shape(make_stage(name, config, small_run).init, jax.random.key(0))
    sharding.shard(abstract, make_mesh(-1, 2, 2))


def test_every_leaf_of_the_frozen_networks_has_a_rule():
    for build in (
        lambda rngs: Dinov2(**dinov2.PRESETS["large_registers"], rngs=rngs),
        lambda rngs: Dinov2(**dinov2.PRESETS["giant"], rngs=rngs),
        lambda rngs: MAEEncoder(**mae.PRESETS["large"], rngs=rngs),
        lambda rngs: LPIPS(rngs=rngs),
        lambda rngs: FIDInception(rngs=rngs),
    ):
        sharding.shard(Network(build).abstract, make_mesh(1, 4, 2))


def test_an_unknown_leaf_is_an_error():
    with pytest.raises(ConfigError, match="no sharding rule matches params/x/mystery"):
        sharding.spec_of("params/x/mystery", (8, 8), make_mesh())


def test_rules_hold_for_parameters_moments_and_ema_alike():
    mesh = make_mesh(1, 4, 2)
    for prefix in ("params/tokenizer", "opt/tokenizer/0/mu", "ema/tokenizer"):
        path = f"{prefix}/decoder/blocks/3/attn/qkv/kernel"
        assert sharding.spec_of(path, (256, 768), mesh) == P("fsdp", "tensor")
    assert sharding.spec_of("params/a/mlp/fc1/kernel", (258, 256), mesh) == P(None, "tensor")
    assert sharding.spec_of("params/a/mlp/fc1/kernel", (16, 16), mesh) == P()


def test_large_models_are_sharded_but_for_two_percent():
    from gae_jax.config import default_config
    from gae_jax.generators.latent_diffusion import diffusion_network
    from gae_jax.tokenizers import tokenizer_network

    config, mesh = default_config(), make_mesh(1, 8, 1)
    for network in (
        tokenizer_network(config),
        diffusion_network(config.diffusion, (16, 16, 32)),
    ):
        leaves = jax.tree.leaves(network.abstract[0])
        shardings = jax.tree.leaves(sharding.shard(network.abstract[0], mesh))
        whole = sum(
            leaf.size
            for leaf, sharding in zip(leaves, shardings, strict=True)
            if sharding.is_fully_replicated
        )
        assert whole < 0.02 * sum(leaf.size for leaf in leaves)


def train(name, config, path, mesh, steps):
    """(metrics of every step, final state on the host)."""
    stage = make_stage(name, config, path)
    step, shardings = jit_step(stage, mesh)
    state = init_state(stage, shardings, 0)
    batches = [
        {key: np.asarray(value) for key, value in batch.items()}
        for batch in itertools.islice(stage.batches(16).read(), steps)
    ]
    frozen = jax.device_put(jax.device_get(stage.frozen), NamedSharding(mesh, P()))
    metrics = []
    for index, batch in enumerate(batches):
        old = jax.tree.leaves(state.params)[0]
        state, scalars = step(
            state,
            put_batch(batch, mesh),
            stage_key(name, 0),
            frozen,
            stage.phase(index),
        )
        assert old.is_deleted(), "the old state was not donated"
        metrics.append(jax.device_get(scalars))
    return metrics, jax.device_get(state)


@pytest.mark.parametrize(
    ("name", "shape"),
    # on other meshes its shards are compared in test_resume, and its rules are above
    [pytest.param("tokenizer", (2, 2, 2), marks=pytest.mark.slow), ("diffusion", (2, 2, 2))],
)
def test_a_step_on_eight_devices_equals_one_on_one(name, shape, config, small_run, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 0)  # shard even these small models
    steps = 2
    config.tokenizer.gan.update(discriminator_start=0, start=0)  # everything from the first step
    one = make_mesh(devices=jax.devices()[:1])
    alone, alone_state = train(name, config, small_run, one, steps)
    eight, eight_state = train(name, config, small_run, make_mesh(*shape), steps)
    for a, b in zip(alone, eight, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=2e-3, atol=2e-5, err_msg=key)
    if name == "tokenizer":
        assert "gan" in alone[-1]
    # Adam divides by the root of tiny second moments: compare what the steps changed, loosely
    for a, b in zip(
        jax.tree.leaves(alone_state.params), jax.tree.leaves(eight_state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=5e-4)


def test_state_is_born_sharded(config, small_run, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 0)
    mesh = make_mesh(1, 8, 1)
    stage = make_stage("diffusion", config, small_run)
    state = init_state(stage, jit_step(stage, mesh)[1], 0)
    kernel = state.params["diffusion"]["dit"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
    moment = state.opt["diffusion"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    mu = jax.tree.leaves(moment[0].mu["dit"]["blocks"]["0"]["attn"]["qkv"])[-1]
    assert mu.sharding == kernel.sharding
    assert jnp.all(mu == 0)


def test_activations_are_held_to_the_batch_and_the_state_is_donated(config, small_run):
    mesh = make_mesh(1, 8, 1)
    stage = make_stage("diffusion", config, small_run)
    step, shardings = jit_step(stage, mesh)
    state = init_state(stage, shardings, 0)
    batch = put_batch(next(iter(stage.batches(16).read())), mesh)
    lowered = step.lower(state, batch, stage_key("diffusion", 0), stage.frozen, None)
    blocks = config.diffusion.model.depth
    # forward and backward; the batch is the axis that data and fsdp share
    split = [line for line in lowered.as_text().splitlines() if '{"data", "fsdp"}' in line]
    assert sum("sdy.sharding_constraint" in line for line in split) >= 2 * blocks
    found = lowered.compile().memory_analysis()
    size = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert found.alias_size_in_bytes == size
    alone = make_mesh(devices=jax.devices()[:1])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
    text = jit_step(stage, alone)[0].lower(*shapes, stage_key("d", 0), None, None).as_text()
    assert '{"data", "fsdp"}' not in text


class Device:
    """What `mesh_utils` asks of a device."""

    platform = device_kind = "gpu"

    def __init__(self, index, slice_index=None, process_index=0):
        self.id, self.process_index = index, process_index
        if slice_index is not None:
            self.slice_index = slice_index

    def __repr__(self):
        return f"d{self.id}"


def ids(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices).tolist()


def test_data_is_split_over_slices_first():
    devices = [Device(i, slice_index=i % 2) for i in range(8)]
    mesh = make_mesh(4, 2, devices=devices)
    # the devices of slice 0 are 0, 2, 4, 6
    assert ids(mesh) == [[[0], [2]], [[4], [6]], [[1], [3]], [[5], [7]]]
    with pytest.raises(ConfigError, match=r"mesh.data is 1, which does not divide over 2 slices"):
        make_mesh(1, 8, devices=devices)
    # told to ignore the slices, it takes the devices as they come
    assert ids(make_mesh(1, 8, slices=1, devices=devices))[0][0] == [0]


def test_devices_that_know_no_slices_are_grouped_by_process():
    devices = [Device(i, process_index=i // 2) for i in range(8)]
    assert ids(make_mesh(2, 4, slices=2, devices=devices)) == [
        [[0], [1], [2], [3]],
        [[4], [5], [6], [7]],
    ]
    with pytest.raises(ConfigError, match=r"mesh.slices is 3, but there are 4 processes"):
        make_mesh(-1, slices=3, devices=devices)


def test_a_preset_gives_the_mesh():
    devices = [Device(i) for i in range(8)]
    assert dict(make_mesh(preset="h100-8", devices=devices).shape) == dict(data=1, fsdp=8, tensor=1)
    with pytest.raises(ConfigError, match=r"mesh.preset is 'h100-8', but mesh.data"):
        make_mesh(2, 4, preset="h100-8", devices=devices)
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        make_mesh(preset="v5p-64", devices=devices)


def test_what_no_axis_divides_is_told():
    def tree(width):
        return {"attn": {"qkv": {"kernel": jax.ShapeDtypeStruct((width, 3456), jnp.float32)}}}

    mesh = make_mesh(1, 8, 1)
    assert sharding.unsharded(tree(1154), make_mesh()) == (0.0, "", ())
    assert sharding.unsharded(tree(1152), mesh)[:2] == (0.0, "")
    assert sharding.unsharded(tree(1154), mesh) == (1.0, "attn/qkv/kernel", (1154, 3456))


def test_rows_of_a_batch_that_processes_hold():
    mesh = make_mesh(2, 2, 2)
    np.testing.assert_array_equal(local_rows(mesh, 16), np.arange(16))
    batch = {"x": np.arange(32).reshape(16, 2)}
    placed = put_rows(batch, mesh, 16)
    np.testing.assert_array_equal(to_host(placed)["x"], batch["x"])
    np.testing.assert_array_equal(local_part(placed["x"]), batch["x"])
