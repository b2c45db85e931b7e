"""AlignTok: what its specification says of the tokenizer, and of its three phases."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import get_config

from gae_jax.config import load_config
from gae_jax.config.validate import validate
from gae_jax.nn import losses
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import to_float
from gae_jax.objectives.objective import Targets
from gae_jax.pretrained.backbone import VisionBackbone, ViTBackbone
from gae_jax.runtime import sharding
from gae_jax.runtime.mesh import make_mesh
from gae_jax.stages import tokenizer
from gae_jax.tokenizers import aligntok_kind

ROOT = Path(__file__).parents[2]
VIT = dict(image_size=8, patch_size=2, embed_dim=32, num_heads=2, num_layers=1)
DINOV2 = dict(
    hidden_size=1024, num_hidden_layers=1, num_attention_heads=16, input_size=224, patch_size=14
)
CONV = dict(ch=32, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(), resolution=8)
SMALL = aligntok_kind.KIND.sizes() | dict(
    latent_dim=4, hidden=32, conv=CONV, vit=dict(embed_dim=32, num_layers=1, num_heads=2)
)


def small_backbone(rngs):
    return ViTBackbone(**VIT, rngs=rngs)


def dinov2(rngs):
    return VisionBackbone(kind="dinov2", **DINOV2, rngs=rngs)


def make(section, backbone=small_backbone, image_size=8, **more):
    more = dict(dtype=jnp.float32, remat="none", attention="xla") | more
    return Network(
        partial(aligntok_kind.KIND.build, section, backbone, image_size=image_size, **more)
    )


def shapes(network):
    leaves = jax.tree_util.tree_flatten_with_path(network.abstract[0])[0]
    return {sharding.path_of(path): leaf.shape for path, leaf in leaves}


def count(network, part):
    sizes = shapes(network).items()
    return sum(int(np.prod(shape)) for path, shape in sizes if path.startswith(f"{part}/"))


def random_arrays(network):
    """Without compiling; what starts at zero is random too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), network.abstract
    )


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)


@pytest.fixture(scope="module", params=["conv", "vit"])
def small(request):
    """(network, arrays)."""
    network = make(SMALL | dict(decoder=request.param))
    return network, random_arrays(network)


@pytest.fixture(scope="module")
def full():
    """The paper's size, but for the encoder's depth."""
    return make(aligntok_kind.KIND.sizes(), dinov2, 256)


def test_size_and_parts_of_the_paper(full):
    """About 1.1 M and 41.42 M; latents of 16 x 16 x 32. DINOv2-L is counted where it is tested."""
    section = aligntok_kind.KIND.sizes()
    network = make(section, dinov2, 256)
    assert count(network, "adapter") == 1_082_400
    assert count(network, "decoder") == 41_417_603
    assert aligntok_kind.KIND.latent_shape(section, dict(name="dinov2", dinov2=DINOV2), 256) == (
        16,
        16,
        32,
    )


def test_the_width_changes_only_the_adapters_last_layer_and_the_decoders_first():
    one, other = (shapes(make(SMALL | dict(latent_dim=d))) for d in (32, 64))
    assert one.keys() == other.keys()
    assert sorted(path for path in one if one[path] != other[path]) == [
        "adapter/fc2/bias",
        "adapter/fc2/kernel",
        "decoder/decoder/conv_in/kernel",
    ]


def test_latents_are_the_adapters_and_nothing_is_random(small, images):
    network, arrays = small

    @jax.jit
    def compute(arrays, key):
        model = network(*arrays)
        encoded, decoded = model.forward(images, key, terms=("l1",))
        mlp = arrays[0]["adapter"]
        hidden = encoded.features @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
        hidden = hidden * jax.scipy.stats.norm.cdf(hidden)
        wanted = hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
        again = model.encode(images), model.decode(encoded.latents)
        return encoded, decoded, wanted.reshape(2, 4, 4, 4), again

    encoded, decoded, wanted, (latents, found) = compute(arrays, jax.random.key(2))
    assert encoded.latents.shape == (2, 4, 4, 4)
    assert decoded.images.shape == images.shape
    assert encoded.logvar is None
    np.testing.assert_allclose(encoded.latents, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(encoded.latents, latents)
    np.testing.assert_array_equal(decoded.images, found)
    jax.tree.map(
        np.testing.assert_array_equal,
        (encoded, decoded),
        compute(arrays, jax.random.key(3))[:2],
    )


def test_the_gradient_at_the_last_layer_is_that_of_its_kernel(small, images):
    network, (params, rest) = small

    @jax.jit
    def compute(params):
        def loss(params):
            _, decoded = network(params, rest).forward(images, None, terms=("l1",))
            return losses.l1(decoded.images, images), decoded

        grads, decoded = jax.grad(loss, has_aux=True)(params)
        gradient = jax.grad(losses.l1)(decoded.images, images)
        found = network(params, rest).at_last_layer(decoded.hidden, gradient)
        decoder = grads["decoder"]
        last = decoder["decoder"]["conv_out"] if "decoder" in decoder else decoder["linear_out"]
        return last["kernel"], found

    wanted, found = compute(params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_clashes_are_explained():
    backbone = dict(name="vit", vit=VIT)
    for section, size, says in (
        (SMALL | dict(decoder="mlp"), 8, "decoder is 'mlp'; use one of conv, vit"),
        (SMALL, 16, "4 x 4 tokens .* 8 x 8 pixels, but data.image_size is 16"),
        (SMALL | dict(decoder="vit"), 10, "8 x 8 pixels, but data.image_size is 10"),
        (SMALL, 9, "shrink images 2 times"),
    ):
        with pytest.raises(ValueError, match=says):
            aligntok_kind.KIND.latent_shape(section, backbone, size)


PHASES = (
    (1, r"^(tokenizer/(adapter|decoder)|discriminator)/", ("l1",)),
    (2, "", ("l1", "align")),
    (1, r"^(tokenizer/decoder|discriminator)/", ("l1", "gan")),
)


class Training:
    """The three phases in four steps; `states` and `figures` after each of them.

    With GAE's decoder, which compiles sooner; VA-VAE's is trained in test_conv_tokenizer.py.
    """

    def __init__(self, config):
        config.data.image_size = 8
        config.backbone.vit.update(VIT)
        config.tokenizer.name = "aligntok"
        config.tokenizer.aligntok.update(SMALL | dict(decoder="vit"))
        config.tokenizer.losses.update(l1=1.0, perceptual=0.0, gan=0.5, align=1.0)
        config.tokenizer.align.target = "snapshot"
        config.tokenizer.gan.update(weight="adaptive", start=3, discriminator_start=3, ramp=0)
        config.tokenizer.phases = PHASES
        config.tokenizer.train.steps, config.tokenizer.ema_decay = 4, 0.9
        config.tokenizer.optim.update(warmup_steps=0, weight_decay=0.1, clip_norm=1.0)
        validate(config)
        self.config = config.tokenizer
        no_targets = Targets(aligned=None, perceptual=None)
        networks, init, step = tokenizer.make_step(config, lambda *_: no_targets)
        self.network, self._step = networks["tokenizer"], jax.jit(step, static_argnums=4)
        rng = np.random.default_rng(0)
        image = rng.integers(0, 255, (4, 8, 8, 3), np.uint8)
        self.images, self._batch = to_float(image), {"image": image}
        abstract = jax.eval_shape(init, jax.random.key(0))
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        params = {name: random_arrays_like(state.params[name], rng) for name in state.params}
        rest = {**state.rest, "snapshot": jax.tree.map(np.zeros_like, params["tokenizer"])}
        ema = {"tokenizer": params["tokenizer"]}
        self.states = [dataclasses.replace(state, params=params, rest=rest, ema=ema)]
        self.figures = []
        for _ in range(4):
            state, figures = self.step(self.states[-1])
            self.states.append(jax.device_get(state))
            self.figures.append(jax.device_get(figures))

    def step(self, state):
        phase = tokenizer.phase_of(self.config, int(state.step))
        return self._step(state, self._batch, jax.random.key(0), {}, phase)

    def changed(self, step, part, which="params"):
        """Whether each of its arrays did, in the step of that number."""
        states = (getattr(self.states[n], which) for n in (step, step + 1))
        before, after = (state["tokenizer"][part] for state in states)
        return jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after))


def random_arrays_like(tree, rng):
    return jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), tree)


@pytest.fixture(scope="module")
def training():
    return Training(get_config())


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_phase_moves_its_parts_and_leaves_the_others_bit_for_bit(training):
    every = ("encoder", "adapter", "decoder")
    for step, learned in ((0, every[1:]), (1, every), (2, every), (3, every[2:])):
        for part in every:
            # momentum, weight decay and averages move nothing that is frozen
            for which in ("params", "ema"):
                moved = training.changed(step, part, which)
                assert all(moved) if part in learned else not any(moved), (step, part, which)


def test_the_second_phase_begins_at_its_target_which_stays(training):
    snapshots = [state.rest["snapshot"] for state in training.states]
    same(snapshots[1], training.states[1].params["tokenizer"])
    for later in snapshots[2:]:
        same(snapshots[1], later)
    first, second = (training.figures[step]["align"] for step in (1, 2))
    assert 0 <= first < 1e-12, "every latent equals its target, so the gradient is 0 as well"
    assert 0 < second < 1
    assert "align" not in training.figures[0]
    assert "align" not in training.figures[3]


def test_the_third_phase_leaves_latents_bit_for_bit(training):
    encode = jax.jit(lambda params: training.network(params, {}).encode(training.images))
    for which in ("params", "ema"):
        before, after, earlier = (
            encode(getattr(training.states[n], which)["tokenizer"]) for n in (3, 4, 2)
        )
        np.testing.assert_array_equal(before, after)
        assert (before != earlier).any()


def test_the_adversarial_term_begins_late_and_its_weight_adapts(training):
    assert all("gan" not in figures for figures in training.figures[:3])
    assert "gan" in training.figures[3]
    state = training.states[3]
    judge = state.params["discriminator"]["main"]
    last = max(judge, key=int)
    found = []
    for scale in (1e3, 2e3):
        scaled = {**judge, last: jax.tree.map(lambda x, by=scale: x * by, judge[last])}
        params = {**state.params, "discriminator": {"main": scaled}}
        found.append(training.step(dataclasses.replace(state, params=params))[1])
    one, two = found
    np.testing.assert_allclose(two["gan"], 2 * one["gan"], rtol=1e-4)
    np.testing.assert_allclose(two["last_layer/gan"], one["last_layer/gan"], rtol=1e-3)
    np.testing.assert_allclose(one["last_layer/gan"], 0.5 * one["last_layer/l1"], rtol=1e-3)


def test_the_configs_name_the_parts_as_they_are():
    config = load_config(ROOT / "configs", "aligntok")
    validate_phases = [re.compile(phase[1]) for phase in config.tokenizer.phases]
    ((pattern, factor),) = config.tokenizer.optim.scales
    paths = shapes(make(SMALL))
    for path in paths:
        part = path.split("/")[0]
        learns = [bool(phase.search(f"tokenizer/{path}")) for phase in validate_phases]
        assert learns == [part != "encoder", True, part == "decoder"], path
        assert bool(re.search(pattern, path)) == (part == "encoder"), path
    assert all(phase.search("discriminator/main/0/kernel") for phase in validate_phases)
    assert factor == 0.1


def test_rules_shard_all_of_it(full):
    mesh = make_mesh(1, 8, 1)
    tree = {"params": {"tokenizer": full.abstract[0]}}
    assert sharding.unsharded(tree, mesh)[0] < 0.02
    for network in (full, make(SMALL | dict(decoder="vit"))):
        sharding.shard({"params": {"tokenizer": network.abstract[0]}}, mesh)
