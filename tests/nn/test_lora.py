"""AlignTok's LoRA arm: what stays, what learns, and the update merged into the kernels."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import get_config
from test_aligntok import SMALL, VIT, dinov2, random_arrays_like, same, small_backbone

from gae_jax.config import flatten, load_config
from gae_jax.config.validate import validate
from gae_jax.nn.lora import LAYERS, merged
from gae_jax.nn.network import Network, variables_of
from gae_jax.nn.quantized import with_fp8_matmuls
from gae_jax.nn.vit import through_blocks
from gae_jax.objectives.objective import Targets
from gae_jax.runtime import sharding
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.mesh import jit_on, make_mesh, put_batch
from gae_jax.stages import tokenizer
from gae_jax.tokenizers import aligntok_kind
from gae_jax.train.warm_start import lend

ROOT = Path(__file__).parents[2]
SECTION = SMALL | dict(decoder="vit")
LORA = dict(rank=2, alpha=6.0, layers=("qkv", "fc2"))  # updates count three times


def make(lora, section=SECTION, backbone=small_backbone, image_size=8):
    more = dict(image_size=image_size, dtype=jnp.float32, remat="none", attention="xla")
    return Network(
        functools.partial(aligntok_kind.KIND.build, section | dict(lora=lora), backbone, **more)
    )


def paths(tree):
    return {sharding.path_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


class Training:
    """Two steps of the second phase, from a lent encoder."""

    def __init__(self):
        config = get_config()
        config.data.image_size = 8
        config.backbone.vit.update(VIT)
        config.tokenizer.name = "aligntok"
        config.tokenizer.aligntok.update(SECTION | dict(lora=LORA))
        config.tokenizer.losses.update(l1=1.0, perceptual=0.0, gan=0.0, align=1.0)
        config.tokenizer.align.target = "snapshot"
        config.tokenizer.phases = ((2, "", ("l1", "align")),)
        config.tokenizer.train.steps, config.tokenizer.ema_decay = 2, 0.9
        config.tokenizer.optim.update(warmup_steps=0, weight_decay=0.0)
        validate(config)
        networks, init, step = tokenizer.make_step(config, lambda *_: Targets(None, None))
        self.network, compiled = networks["tokenizer"], jax.jit(step, static_argnums=4)
        rng = np.random.default_rng(0)
        self.lent = random_arrays_like(make(dict(LORA, rank=0)).abstract[0]["encoder"], rng)
        state = lend(begun(jax.eval_shape(init, jax.random.key(0)), rng), self.lent, {})
        image = rng.integers(0, 255, (4, 8, 8, 3), np.uint8)
        self.states, self.figures = [jax.device_get(state)], []
        for number in range(2):
            phase = tokenizer.phase_of(config.tokenizer, number)
            state, figures = compiled(state, {"image": image}, jax.random.key(0), {}, phase)
            self.states.append(jax.device_get(state))
            self.figures.append(jax.device_get(figures))


def begun(abstract, rng):
    """A state at step 0 without compiling: B and moments are zero, all else is random."""
    state = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract))
    start = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "lora_b" in sharding.path_of(path) else random_arrays_like(x, rng),
        state.params["tokenizer"],
    )
    start = jax.device_put(start)
    ema, rest = {"tokenizer": start}, {**state.rest, "snapshot": start}
    return dataclasses.replace(state, params={"tokenizer": start}, ema=ema, rest=rest)


@pytest.fixture(scope="module")
def training():
    return Training()


def test_the_encoder_is_the_lent_one_and_stays_bit_for_bit(training):
    for state in training.states:
        same(state.rest["tokenizer"]["encoder"], training.lent)
        # it has no moments and no average
        for tree in (state.params, state.ema):
            assert all("/lora/" in path for path in paths(tree["tokenizer"]["encoder"]))
        moments = [path for path in paths(state.opt["tokenizer"]) if "/encoder/" in path]
        assert moments
        assert all("/lora/" in path for path in moments)


def test_updates_learn_and_begin_with_nothing(training):
    first, *later = (paths(state.params["tokenizer"]["encoder"]) for state in training.states)
    assert len(first) == 2 * 2, "of qkv and fc2"
    for path, start in first.items():
        moved = [(x[path] != start).any() for x in later]
        if path.endswith("lora_b"):
            assert not start.any()
            assert all(moved), path
        else:  # B is zero at first: A waits for it
            assert moved == [False, True], path


def test_the_second_phase_begins_at_its_target(training):
    # 0, but for how the compiler rounds two passes that it may fuse otherwise
    assert training.figures[0]["align"] < 1e-15
    assert 1e-9 < training.figures[1]["align"] < 1
    for state in training.states:
        same(state.rest["snapshot"], training.states[0].params["tokenizer"])


def test_merged_kernels_encode_the_same_without_updates(training):
    state = training.states[-1]
    rng = np.random.default_rng(1)
    arrays = random_arrays_like(state.params["tokenizer"], rng), state.rest["tokenizer"]
    arrays = jax.tree.map(jnp.asarray, arrays)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)
    network = training.network.changed(merged)
    after = variables_of(merged(training.network(*arrays)))
    assert paths(after[1]["encoder"]).keys() == paths(training.lent).keys()
    assert "encoder" not in after[0]
    at = ("encoder", "encoder", "blocks", "0", "attn", "qkv")
    lora, before, kernel = (
        functools.reduce(dict.get, names, tree)
        for names, tree in ((at, arrays[0]), (at[1:], training.lent), (at, after[1]))
    )
    update = 3.0 * np.asarray(lora["lora"]["lora_a"]) @ lora["lora"]["lora_b"]
    assert np.abs(update).max() > 0.01
    np.testing.assert_allclose(kernel["kernel"], before["kernel"] + update, rtol=1e-5, atol=1e-6)

    @jax.jit
    def encode(arrays, after):
        return training.network(*arrays).encode(images), network(*after).encode(images)

    one, two = encode(arrays, after)
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    # what is rounded is the sum
    rounded = paths(training.network.changed(with_fp8_matmuls).abstract)
    assert not any("lora" in path for path in rounded)
    assert rounded["1/encoder/encoder/blocks/0/attn/qkv/quantized"].ndim == 2


def test_updates_of_all_layers_count_and_no_kernel_leaves_them_out():
    """The layers that GAE's blocks join in a kernel may be any of them."""
    network = make(dict(LORA, layers=LAYERS))
    arrays = jax.tree.map(
        jnp.asarray, random_arrays_like(network.abstract, np.random.default_rng(3))
    )
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)
    merge = network.changed(merged)
    after = variables_of(merged(network(*arrays)))

    @jax.jit
    def encode(arrays, after):
        return network(*arrays).encode(images), merge(*after).encode(images)

    one, two = encode(arrays, after)
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    block = network(*arrays).encoder.encoder.blocks[0]
    assert "gate are other layers than Linear" in block.mlp.obstacle
    with pytest.raises(ValueError, match="fc1 and gate are other layers than Linear"):
        through_blocks(
            [block], jnp.zeros((1, 16, 32), jnp.bfloat16), remat="none", kernels="interpret"
        )
    assert merge(*after).encoder.encoder.blocks[0].mlp.obstacle is None


def test_all_else_starts_as_without():
    """And the updates start as nothing: the first phase is that of the plain arm."""

    @jax.jit
    def starts(key):
        """A kernel of each part; nothing else is computed."""
        plain, low = (make(dict(LORA, rank=rank)).init(key) for rank in (0, 2))
        found = [
            params[part][layer]["kernel"]
            for params in (plain[0], low[0])
            for part, layer in (("adapter", "fc2"), ("decoder", "linear_out"))
        ]
        encoders = plain[0]["encoder"], low[1]["encoder"]
        return found, [e["encoder"]["proj_out"]["kernel"] for e in encoders]

    found, encoders = starts(jax.random.key(3))
    same(found[:2], found[2:])
    same(*encoders)


def test_size_and_rules_at_full_size():
    config = load_config(ROOT / "configs", "aligntok:lora")
    section = config.tokenizer.aligntok.to_dict()
    network = make(section["lora"], section, dinov2, 256)
    updates = paths(network.abstract[0]["encoder"])
    # of one of its 24 blocks: 16 x (in + out) of qkv, proj, fc1 and fc2
    assert sum(x.size for x in updates.values()) == 16 * (4096 + 2048 + 5120 + 5120) == 262_144
    mesh = make_mesh(1, 2, 4)
    at = "params/tokenizer/encoder/encoder/blocks/0"
    for path, spec in (
        (f"{at}/attn/qkv/lora/lora_a", ("fsdp", None)),
        (f"{at}/attn/qkv/lora/lora_b", (None, "tensor")),
        (f"{at}/mlp/fc2/lora/lora_a", ("tensor", None)),
        (f"{at}/mlp/fc2/lora/lora_b", (None, "fsdp")),
    ):
        shape = updates[path.removeprefix("params/tokenizer/encoder/")].shape
        assert tuple(sharding.spec_of(path, shape, mesh)) == spec
    params, rest = network.abstract
    tree = {"params": {"tokenizer": params}, "rest": {"tokenizer": rest}}
    assert sharding.unsharded(tree, make_mesh(1, 8, 1))[0] < 0.02
    assert network.size == make(dict(LORA, rank=0), section, dinov2, 256).size + 262_144


def test_a_mesh_gives_the_same(training):
    state = training.states[-1]
    arrays = state.params["tokenizer"], state.rest["tokenizer"]
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    found = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = make_mesh(*shape, devices=devices)
        # small as they are, they are split all the same
        specs = jax.tree_util.tree_map_with_path(
            lambda path, x, mesh=mesh: jax.sharding.NamedSharding(
                mesh, spec_whatever_the_size(sharding.path_of(path), x.shape, mesh)
            ),
            arrays,
        )
        placed = jax.device_put(arrays, specs)
        encode = jit_on(mesh)(lambda arrays, x: training.network(*arrays).encode(x))
        found.append(encode(placed, put_batch(images, mesh)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def spec_whatever_the_size(path, shape, mesh):
    """`sharding.spec_of` of an array that is not small."""
    spec = sharding.spec_of(path, (*shape[:-1], shape[-1] * sharding.SMALL), mesh)
    sizes = zip(spec, shape[: len(spec)], strict=True)
    fits = all(axis is None or size % mesh.shape[axis] == 0 for axis, size in sizes)
    return spec if fits else jax.sharding.PartitionSpec()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(rank=-1), r"lora.rank is -1; it must be at least 0"),
        (dict(rank=33), r"lora.rank is 33"),
        (dict(alpha=0.0), r"lora.alpha is 0.0; it must be > 0"),
        (dict(layers=()), r"lora.layers is \(\); name some of qkv"),
        (dict(layers=("query",)), r"lora.layers is \('query',\); name some of qkv"),
    ],
)
def test_clashes_are_explained(config, change, says):
    config.data.image_size = 8
    config.backbone.vit.update(VIT)
    config.tokenizer.name = "aligntok"
    config.tokenizer.losses.update(align=0.0)
    config.tokenizer.aligntok.update(SECTION | dict(lora=LORA | change))
    with pytest.raises(ConfigError, match=rf"tokenizer.aligntok(: |\.){says}"):
        validate(config)


def test_an_encoder_without_such_layers_is_named():
    with pytest.raises(ValueError, match=r"\('w12',\), of which ViTBackbone has none; its layers"):
        make(dict(LORA, layers=("w12",)))


@pytest.mark.parametrize(("size", "without"), [("lora", "full"), ("digits_lora", "digits")])
def test_configs_differ_in_the_updates_alone(size, without):
    found, plain = (load_config(ROOT / "configs", f"aligntok:{name}") for name in (size, without))
    validate(found)
    assert found.tokenizer.optim.scales == ()
    changed = {"tokenizer.optim.scales", *(f"tokenizer.aligntok.lora.{x}" for x in LORA)}
    one, two = flatten(found), flatten(plain)
    assert {path for path in one if one[path] != two[path]} <= changed
    trained = [re.compile(phase[1]) for phase in found.tokenizer.phases]
    at = "tokenizer/encoder/encoder/blocks/0/attn/qkv/lora/lora_a"
    assert [bool(pattern.search(at)) for pattern in trained] == [False, True, False]
    assert found.tokenizer.aligntok.lora.rank > 0 == plain.tokenizer.aligntok.lora.rank
