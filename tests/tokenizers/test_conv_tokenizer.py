"""KL-VAE and VA-VAE as tokenizers: their Gaussian, their last layer, their sizes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from small import get_config

from gae_jax.commands import import_torch as import_stage
from gae_jax.config.validate import validate
from gae_jax.interop.convert import ConversionError, export_torch, import_torch
from gae_jax.interop.sizes import differing
from gae_jax.nn.network import Network
from gae_jax.objectives.objective import Targets
from gae_jax.porting.exporting import why_not
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.stages import tokenizer
from gae_jax.tokenizers import conv_kind, conv_torch, latent_shape
from gae_jax.tokenizers.conv_kind import PRESETS
from gae_jax.tokenizers.conv_vae import ConvDecoder

SMALL = dict(
    ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(8,), resolution=16, z_channels=4,
    embed_dim=4,
)  # fmt: skip


# Quick to compile: no blocks but those in the middle, and one per level of the decoder.
TINY = SMALL | dict(num_res_blocks=0, attn_resolutions=())


def make(section=SMALL, image_size=16):
    more = dict(image_size=image_size, dtype=jnp.float32, remat="none", attention="xla")
    return Network(partial(conv_kind.KIND.build, section, None, **more))


def random_arrays(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), tree)


@pytest.fixture(scope="module")
def small():
    """(network, arrays, the same as a torch state dict)."""
    network = make()
    arrays = random_arrays(network.abstract)
    return network, arrays, export_torch(conv_torch.AUTOENCODER, *arrays, **SMALL)


def test_training_decodes_a_sample_and_encoding_gives_the_mean():
    network = make(TINY)
    arrays = random_arrays(network.abstract)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)

    @jax.jit
    def compute(arrays, key):
        model = network(*arrays)
        encoded, decoded = model.forward(images, key, terms=("l1", "kl"))
        noise = jax.random.normal(key, encoded.latents.shape)
        sample = encoded.latents + jnp.exp(encoded.logvar / 2) * noise
        return encoded, decoded, model.decode(sample), model.encode(images)

    encoded, decoded, wanted, latents = compute(arrays, jax.random.key(2))
    assert encoded.latents.shape == encoded.logvar.shape == (2, 4, 4, 4)
    np.testing.assert_array_equal(encoded.latents, latents)
    np.testing.assert_allclose(decoded.images, wanted, rtol=1e-4, atol=1e-5)
    other = compute(arrays, jax.random.key(3))
    np.testing.assert_array_equal(other[3], latents)
    assert np.abs(other[1].images - decoded.images).max() > 1e-3
    assert (decoded.images.dtype, latents.dtype) == (jnp.float32, jnp.float32)


def test_presets():
    """Their networks are counted in test_conv_vae.py."""
    sizes = conv_kind.KIND.sizes()
    assert sizes | PRESETS["vavae"] == sizes
    assert conv_kind.KIND.latent_shape(sizes, None, 256) == (16, 16, 32)
    assert conv_kind.KIND.latent_shape(sizes | PRESETS["sdvae"], None, 256) == (32, 32, 4)


def test_images_that_the_levels_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"2 levels.*2 times.*image_size is 17"):
        conv_kind.KIND.latent_shape(SMALL, None, 17)


def test_a_released_file_becomes_the_tokenizer_and_comes_back(small):
    network, arrays, state = small
    assert {name.split(".")[0] for name in state} == {
        "encoder", "quant_conv", "post_quant_conv", "decoder",
    }  # fmt: skip
    # what VA-VAE's training keeps beside it
    more = ("loss.logvar", "linear_proj.weight", "foundation_model.model.cls_token")
    whole = state | {name: np.zeros(3, np.float32) for name in more}
    found = import_torch(conv_torch.AUTOENCODER, whole, network, **SMALL)
    jax.tree.map(np.testing.assert_array_equal, found, arrays)
    # the halves are those of the tables that the golden files hold
    half = import_torch(conv_torch.DECODER, state, Network(partial(ConvDecoder, **SMALL)))
    jax.tree.map(np.testing.assert_array_equal, half[0], found[0]["decoder"])
    with pytest.raises(ConversionError, match=r"unexpected: surplus \[3\]"):
        import_torch(conv_torch.AUTOENCODER, whole | {"surplus": np.zeros(3)}, network, **SMALL)
    missing = {name: x for name, x in whole.items() if name != "quant_conv.bias"}
    with pytest.raises(ConversionError, match=r"missing: quant_conv.bias \[8\]"):
        import_torch(conv_torch.AUTOENCODER, missing, network, **SMALL)


def test_a_released_file_becomes_the_stage(tmp_path):
    config = get_config()
    config.data.image_size, config.tokenizer.name = 8, "conv"
    sizes = TINY | dict(ch_mult=(1,), num_res_blocks=1)
    config.tokenizer.conv.update(sizes | dict(embed_dim=2))
    arrays = random_arrays(make(sizes, 8).abstract)
    tensors = export_torch(conv_torch.AUTOENCODER, *arrays, **sizes)
    config.import_torch.tokenizer = str(tmp_path / "vae.safetensors")
    save_file(tensors, config.import_torch.tokenizer)
    session = Session(config, Run(tmp_path / "run"), devices=tuple(jax.devices()[:1]))
    with pytest.raises(ConversionError, match=r"--config.tokenizer.conv.embed_dim=4$"):
        import_stage.run(session)
    config.tokenizer.conv.embed_dim = 4
    import_stage.run(session)
    folder = session.run.stage("tokenizer")
    jax.tree.map(np.testing.assert_array_equal, load(folder, session.mesh)[1], arrays)
    assert latent_shape(folder.config) == (8, 8, 4)
    assert "released with GAE" in why_not(folder)


def test_sizes_are_read_off_a_file(small):
    shapes = {name: x.shape for name, x in small[2].items()}
    assert differing("conv", shapes, SMALL, "tokenizer.conv") == []
    section = SMALL | dict(ch=64, ch_mult=(1, 2, 2), attn_resolutions=(), embed_dim=8)
    assert differing("conv", shapes, section, "tokenizer.conv") == [
        "--config.tokenizer.conv.ch=32",
        "--config.tokenizer.conv.ch_mult=(1, 1)",
        "--config.tokenizer.conv.attn_resolutions=(8,)",
        "--config.tokenizer.conv.embed_dim=4",
    ]


@pytest.fixture(scope="module")
def step():
    """(state, figures of one step of VA-VAE with each of its terms, the state after it, step)."""
    config = get_config()
    config.data.image_size = 8
    config.backbone.vit.update(image_size=8, patch_size=2)
    config.tokenizer.name = "conv"
    config.tokenizer.conv.update(TINY)
    config.tokenizer.losses.update(l1=1.0, perceptual=0.0, gan=0.5, align=0.3, kl=1e-3)
    config.tokenizer.align.update(point="post", loss="vf")
    config.tokenizer.gan.update(weight="adaptive", start=0, discriminator_start=0, ramp=0)
    config.tokenizer.optim.warmup_steps = config.tokenizer.discriminator_optim.warmup_steps = 0
    validate(config)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 16, 32)).astype(np.float32)
    targets = Targets(aligned=features, perceptual=None)
    _, init, step = tokenizer.make_step(config, lambda *_: targets)
    abstract = jax.eval_shape(init, jax.random.key(0))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    image = rng.integers(0, 255, (4, 8, 8, 3), np.uint8)
    phase = tokenizer.phase_of(config.tokenizer, 0)
    compiled = jax.jit(lambda state: step(state, {"image": image}, jax.random.key(0), {}, phase))
    state = dataclasses.replace(state, params=random_arrays(abstract.params))
    return state, *reversed(compiled(state)), compiled


def test_a_step_of_va_vae_moves_all_and_aligns_by_its_loss(step):
    before, figures, after, _ = step
    assert set(before.params) == {"tokenizer", "discriminator", "aligner"}
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), before.params, jax.device_get(after.params)
    )
    # of biases in front of a norm with as many groups as channels the gradient is nothing
    for path, one in jax.tree_util.tree_flatten_with_path(moved)[0]:
        assert one or "kernel" not in str(path), path
    weights = dict(l1=1.0, align=0.3, kl=1e-3, gan=figures["gan_weight"])
    total = sum(weight * figures[name] for name, weight in weights.items())
    np.testing.assert_allclose(figures["total"], total, rtol=1e-5)
    # cosines lie far from the margin, so that both of its parts count
    assert 0.3 < figures["align"] < 1.5


def test_the_weight_of_the_gan_does_not_care_for_the_scale_of_its_logits(step):
    state, _, _, compiled = step
    judge = state.params["discriminator"]["main"]
    last = max(judge, key=int)
    found = []
    for scale in (1e3, 2e3):
        scaled = {**judge, last: jax.tree.map(lambda x, by=scale: x * by, judge[last])}
        params = {**state.params, "discriminator": {"main": scaled}}
        found.append(compiled(dataclasses.replace(state, params=params))[1])
    one, two = found
    np.testing.assert_allclose(two["gan"], 2 * one["gan"], rtol=1e-4)
    np.testing.assert_allclose(two["last_layer/gan"], one["last_layer/gan"], rtol=1e-3)
    np.testing.assert_allclose(one["last_layer/gan"], 0.5 * one["last_layer/l1"], rtol=1e-3)
