"""Meshes, rules, and the same step on one device and on eight."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gae_jax import parallel
from gae_jax.data.latents import LatentSet
from gae_jax.errors import ConfigError
from gae_jax.models import dinov2, mae
from gae_jax.models.dinov2 import Dinov2
from gae_jax.models.inception import FIDInception
from gae_jax.models.lpips import LPIPS
from gae_jax.models.mae import MAEEncoder
from gae_jax.run import Run
from gae_jax.stages import backbone, diffusion, teacher, tokenizer
from gae_jax.stages.session import Session
from gae_jax.train.fit import init_state, jit_step, stage_key
from gae_jax.train.state import Network


def make_stage(name, config, path):
    session = Session(config, Run(path))
    if name == "diffusion":
        return diffusion.make_stage(session, LatentSet.open(path / "latents"))
    return {"backbone": backbone, "teacher": teacher, "tokenizer": tokenizer}[name].make_stage(
        session
    )


NAMES = ("backbone", "teacher", "tokenizer", "diffusion")


def test_one_device_is_a_mesh_of_one_and_minus_one_takes_the_rest():
    assert dict(parallel.make_mesh(devices=jax.devices()[:1]).shape) == dict(
        data=1, fsdp=1, tensor=1
    )
    assert dict(parallel.make_mesh(-1, 2, 2).shape) == dict(data=2, fsdp=2, tensor=2)
    assert all(axis.name == "Auto" for axis in parallel.make_mesh().axis_types)


@pytest.mark.parametrize("shape", [(3, 1, 1), (16, 1, 1), (-1, 3, 1)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        parallel.make_mesh(*shape)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="batch_size 12 does not divide over 8 devices"):
        parallel.check_batch(12, parallel.make_mesh(), "batch_size")


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_of_every_stage_has_a_rule(name, config, small_run):
    abstract = jax.eval_shape(make_stage(name, config, small_run).init, jax.random.key(0))
    parallel.shard(abstract, parallel.make_mesh(-1, 2, 2))


def test_every_leaf_of_the_frozen_networks_has_a_rule():
    for build in (
        lambda rngs: Dinov2(**dinov2.PRESETS["large_registers"], rngs=rngs),
        lambda rngs: Dinov2(**dinov2.PRESETS["giant"], rngs=rngs),
        lambda rngs: MAEEncoder(**mae.PRESETS["large"], rngs=rngs),
        lambda rngs: LPIPS(rngs=rngs),
        lambda rngs: FIDInception(rngs=rngs),
    ):
        parallel.shard(Network(build).abstract, parallel.make_mesh(1, 4, 2))


def test_an_unknown_leaf_is_an_error():
    with pytest.raises(ConfigError, match="no sharding rule matches params/x/mystery"):
        parallel.spec_of("params/x/mystery", (8, 8), parallel.make_mesh())


def test_rules_hold_for_parameters_moments_and_ema_alike():
    mesh = parallel.make_mesh(1, 4, 2)
    for prefix in ("params/tokenizer", "opt/tokenizer/0/mu", "ema/tokenizer"):
        path = f"{prefix}/decoder/blocks/3/attn/qkv/kernel"
        assert parallel.spec_of(path, (256, 768), mesh) == P("fsdp", "tensor")
    assert parallel.spec_of("params/a/mlp/fc1/kernel", (258, 256), mesh) == P(None, "tensor")
    assert parallel.spec_of("params/a/mlp/fc1/kernel", (16, 16), mesh) == P()


def test_large_models_are_sharded_but_for_two_percent():
    from gae_jax.config import default_config
    from gae_jax.stages.load import diffusion_network, tokenizer_network

    config, mesh = default_config(), parallel.make_mesh(1, 8, 1)
    for network in (
        tokenizer_network(config.tokenizer.model),
        diffusion_network(
            config.diffusion.model, (16, 16, 32), mean=np.zeros(32), std=np.ones(32),
            latent_multiplier=1.0,
        ),
    ):  # fmt: skip
        leaves = jax.tree.leaves(network.abstract[0])
        shardings = jax.tree.leaves(parallel.shard(network.abstract[0], mesh))
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
            parallel.put_batch(batch, mesh),
            stage_key(name, 0),
            frozen,
            stage.phase(index),
        )
        assert old.is_deleted(), "the old state was not donated"
        metrics.append(jax.device_get(scalars))
    return metrics, jax.device_get(state)


@pytest.mark.parametrize(("name", "shape"), [("tokenizer", (2, 2, 2)), ("diffusion", (8, 1, 1))])
def test_a_step_on_eight_devices_equals_one_on_one(name, shape, config, small_run, monkeypatch):
    monkeypatch.setattr(parallel, "SMALL", 0)  # shard even these small models
    steps = 2
    config.tokenizer.gan.update(discriminator_start=0, start=0)  # everything from the first step
    one = parallel.make_mesh(devices=jax.devices()[:1])
    alone, alone_state = train(name, config, small_run, one, steps)
    eight, eight_state = train(name, config, small_run, parallel.make_mesh(*shape), steps)
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
    monkeypatch.setattr(parallel, "SMALL", 0)
    mesh = parallel.make_mesh(1, 8, 1)
    stage = make_stage("diffusion", config, small_run)
    state = init_state(stage, jit_step(stage, mesh)[1], 0)
    kernel = state.params["diffusion"]["dit"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
    moment = state.opt["diffusion"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    mu = jax.tree.leaves(moment[0].mu["dit"]["blocks"]["0"]["attn"]["qkv"])[-1]
    assert mu.sharding == kernel.sharding
    assert jnp.all(mu == 0)
