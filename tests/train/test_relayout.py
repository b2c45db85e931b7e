"""Checkpoints that are read into states which are laid out differently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gae_jax.nn.layers import linear
from gae_jax.nn.network import Network
from gae_jax.runtime import sharding
from gae_jax.runtime.mesh import make_mesh
from gae_jax.train import relayout
from gae_jax.train.checkpoint import Checkpoints
from gae_jax.train.optim import make_optimizer
from gae_jax.train.state import apply_gradients, make_state

OPTIM = dict(
    learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=2, b1=0.9, b2=0.9, weight_decay=0.1
)


def maker(names="a", *, clip_norm=0.0, scales=(), ema=(), width=4):
    """(key -> state of networks of these names, their optimizer)."""
    network = Network(lambda rngs: nnx.Dict(head=linear(4, width, dtype=jnp.float32, rngs=rngs)))
    optimizer = make_optimizer(100, clip_norm=clip_norm, scales=scales, **OPTIM)
    networks, optimizers = (dict.fromkeys(names, item) for item in (network, optimizer))
    return lambda key: make_state(key, networks, optimizers, ema=ema), optimizer


def trained(make, optimizer, steps=3):
    state = make(jax.random.key(0))
    for _ in range(steps):
        grads = jax.tree.map(jnp.ones_like, state.params["a"])
        state = apply_gradients(state, "a", grads, optimizer)
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(trained state of two networks, its item on the disk)."""
    folder = tmp_path_factory.mktemp("stage")
    state = trained(*maker("ab"))
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, state, {"seconds": 0.0, "batches": "x"})
    checkpoints.wait()
    checkpoints.close()
    return state, folder / "checkpoints" / "3" / "state"


def restored(make, path):
    abstract = jax.eval_shape(make, jax.random.key(0))
    shardings = sharding.shard(abstract, make_mesh())
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    assert not relayout.misfits(abstract, path)
    found = relayout.restore(abstract, path, lambda: make(jax.random.key(5)))
    assert jax.tree.structure(found) == jax.tree.structure(abstract)
    return found


def moments(state, network="a"):
    """Adam's numbers, wherever they lie."""
    leaves = jax.tree_util.tree_flatten_with_path(state.opt[network])[0]
    named = [(jax.tree_util.keystr(path[-3:]), np.asarray(leaf)) for path, leaf in leaves]
    return [leaf for name, leaf in named if "count" in name or "mu" in name or "nu" in name]


@pytest.mark.parametrize(
    "change", [dict(clip_norm=1.0), dict(scales=(("head", 0.5),)), dict(clip_norm=1.0, ema=("a",))]
)
def test_clipping_factors_and_an_average_keep_weights_and_moments(saved, change):
    state, path = saved
    found = restored(maker("ab", **change)[0], path)
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    expected, there = moments(state), moments(found)
    assert len(expected) == len(there) == 4  # Adam's and the schedule's count, mu, nu
    for one, other in zip(expected, there, strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(expected[0]) == 3
    if change.get("ema"):  # begins at the weights, in memory of its own
        jax.tree.map(np.testing.assert_array_equal, found.ema["a"], state.params["a"])
        pointers = [
            tree["head"]["kernel"].addressable_data(0).unsafe_buffer_pointer()
            for tree in (found.ema["a"], found.params["a"])
        ]
        assert pointers[0] != pointers[1]


def test_a_network_is_left_out_or_begins_anew(saved):
    state, path = saved
    found = restored(maker("a")[0], path)
    jax.tree.map(np.testing.assert_array_equal, found.params["a"], state.params["a"])
    make = maker("ac")[0]
    found, new = restored(make, path), make(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, found.params["a"], state.params["a"])
    jax.tree.map(np.testing.assert_array_equal, found.params["c"], new.params["c"])
    assert int(moments(found, "c")[0]) == 0


def test_another_shape_is_named(saved):
    abstract = jax.eval_shape(maker("ab", width=5)[0], jax.random.key(0))
    problems = relayout.misfits(abstract, saved[1])
    assert any(text == "params/a/head/kernel: [4, 4] in the checkpoint, [4, 5] here"
               for text in problems)  # fmt: skip
