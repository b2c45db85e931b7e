"""Files of the frozen vision encoders, and the encoders inside of the tokenizers.

Their outputs are compared in tests/pretrained/test_vision_parity.py.
"""

import re
from functools import partial

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_parts import write_parts

from gae_jax import tokenizers
from gae_jax.commands import import_torch
from gae_jax.config import default_config
from gae_jax.config.validate import validate
from gae_jax.interop import convert, vision_files
from gae_jax.interop.convert import ConversionError
from gae_jax.interop.files import digest, write_safetensors
from gae_jax.interop.signatures import WeightFileError
from gae_jax.interop.vision_tables import TABLES
from gae_jax.nn.lora import with_lora
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import IMAGENET_MEAN, IMAGENET_STD
from gae_jax.nn.quantized import with_fp8_matmuls
from gae_jax.porting import encoders, exporting
from gae_jax.porting.released import BACKBONE_IN_TEACHER
from gae_jax.porting.sources import Source
from gae_jax.pretrained import dinov3, siglip
from gae_jax.pretrained.backbone import VisionBackbone, backbone_network, backbone_shape
from gae_jax.pretrained.dinov3 import Dinov3Attention
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime import sharding
from gae_jax.runtime.errors import ConfigError
from gae_jax.runtime.mesh import make_mesh

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SIZES |= dict(patch_size=8)


def state_of(name):
    return dict(golden_files.golden(name)[1]["state"])


# Those of the modules of transformers 5.24.0 on torch's device "meta", without SigLIP's head; the
# mask token of DINOv3 counts.
@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        (dinov3, "small", 21_596_544),
        (dinov3, "small_plus", 28_692_864),
        (dinov3, "base", 85_660_416),
        (dinov3, "large", 303_129_600),
        (dinov3, "huge_plus", 840_592_640),
        (dinov3, "7b", 6_716_035_072),
        (siglip, "base", 85_843_200),
        (siglip, "large", 303_361_024),
        (siglip, "so400m", 412_649_712),
        (siglip, "giant_opt", 1_134_838_272),
    ],
)
def test_parameters(module, name, count):
    encoder = {dinov3: dinov3.Dinov3, siglip: siglip.SiglipVision}[module]
    assert Network(partial(encoder, **module.PRESETS[name])).size == count


def test_the_rotation_is_of_the_places_in_the_image():
    """Rows first; a patch in the middle is not turned, and the edges of any grid are the same."""
    cos, sin = dinov3.rotation_table((3, 5), 8)
    angles = np.arctan2(sin, cos).reshape(3, 5, 2, 2)
    np.testing.assert_allclose(angles[1, 2], 0, atol=1e-6)
    np.testing.assert_allclose(angles[0, :, 0, 1], 2 * np.pi * (-2 / 3) / 10, rtol=1e-5)
    np.testing.assert_allclose(angles[:, 4, 1, 1], 2 * np.pi * (4 / 5) / 10, rtol=1e-5)


HUB_NAMES = (
    (r"embeddings.register_tokens", "storage_tokens"),
    (r"embeddings.patch_embeddings", "patch_embed.proj"),
    (r"embeddings\.", ""),
    (r"^layer\.", "blocks."),
    (r"attention.o_proj", "attn.proj"),
    (r"layer_scale(\d).lambda1", r"ls\1.gamma"),
)
MLP = {
    "dinov3": {"up_proj": "fc1", "down_proj": "fc2"},
    "dinov3_gated": {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"},
}


def hub_state(name):
    """A golden DINOv3 as its own repository saves it."""
    state, hub = state_of(name), {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"layer\.(\d)\.attention\.q_proj\.(weight|bias)", key):
            block, kind = match.groups()
            parts = [
                state.get(f"layer.{block}.attention.{x}_proj.{kind}", np.full(32, 7, np.float32))
                for x in "qkv"
            ]
            hub[f"blocks.{block}.attn.qkv.{kind}"] = np.concatenate(parts)
            if kind == "bias":  # that of the keys is there, and multiplied by 0
                hub[f"blocks.{block}.attn.qkv.bias_mask"] = np.repeat(np.float32([1, 0, 1]), 32)
        elif not re.search(r"attention\.[kv]_proj", key):
            for old, new in (*HUB_NAMES, *MLP[name].items()):
                key = re.sub(old, new, key)
            hub[key] = tensor[0] if key == "mask_token" else tensor
    hub["rope_embed.periods"] = np.float32([1, 100**0.25, 10, 100**0.75])
    return hub | {"local_cls_norm.weight": np.ones(32), "local_cls_norm.bias": np.ones(32)}


@pytest.mark.parametrize("name", MLP)
def test_dinov3_by_the_names_of_its_own_repository(name):
    hub = hub_state(name)
    assert vision_files.kind_of_names(hub) == "dinov3"
    assert vision_files.set_aside("dinov3", hub) == {"local_cls_norm.": 2}
    found, want = vision_files.encoder_tensors("dinov3", hub, num_heads=2), state_of(name)
    assert found.keys() == want.keys()
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        ({}, 4, r"of 2 heads, but the config has 4; pass --config.backbone.dinov3.num_att"),
        ({"rope_embed.periods": np.arange(4.0)}, 2, "not those of base 100"),
        ({"blocks.1.attn.qkv.bias_mask": np.ones(96)}, 2, "layer.1.attention: its bias_mask"),
    ],
)
def test_another_dinov3_is_refused(change, heads, message):
    with pytest.raises(ConversionError, match=message):
        vision_files.encoder_tensors("dinov3", hub_state("dinov3") | change, num_heads=heads)


@pytest.fixture
def small(config):
    """(config of small encoders, function of a name and changes that gives a session)."""
    for name in ("dinov3", "siglip"):
        config.backbone[name].update(**SIZES, input_size=32)
    config.backbone.siglip.image_size = 40

    def start(path):
        return Session(config, Run(path), devices=tuple(jax.devices()[:1]))

    return config, start


def test_the_vision_tower_of_a_whole_siglip_becomes_the_backbone(small, tmp_path, capsys):
    config, start = small
    state = state_of("siglip2")
    write_safetensors(tmp_path / "model.safetensors", state)
    config.backbone.name = "siglip"
    config.import_torch.backbone = str(tmp_path / "model.safetensors")
    session = start(tmp_path / "run")
    import_torch.run(session)
    told = capsys.readouterr().out
    assert "left out: text_model.* (22 tensors)" in told
    assert "left out: vision_model.head.* (11 tensors)" in told
    assert "tensors that differ when exported again: 0" in told
    network, arrays = load(session.run.stage("backbone"), session.mesh)
    table = state["vision_model.embeddings.position_embedding.weight"]
    np.testing.assert_array_equal(arrays[0]["encoder"]["pos_embed"], table[None])
    with pytest.raises(ValueError, match="SiglipVision has no CLS token"):
        network(*arrays).class_token(jnp.zeros((1, 32, 32, 3)))
    # inside of a teacher's file, and out of it again
    inside = exporting.backbone_tensors(session)
    out = {name.removeprefix(BACKBONE_IN_TEACHER): tensor for name, tensor in inside.items()}
    tower = vision_files.encoder_tensors("siglip", state, num_heads=2)
    jax.tree.map(np.testing.assert_array_equal, out, tower)
    assert vision_files.encoder_tensors("siglip", out, num_heads=2).keys() == tower.keys()


@pytest.mark.parametrize(
    ("kind", "name"),
    # parts are put together before the kind of backbone matters
    [("dinov3", "dinov3"), pytest.param("siglip", "siglip2", marks=pytest.mark.slow)],
)
def test_a_backbone_in_parts_is_the_one_in_one_file(small, tmp_path, capsys, kind, name):
    config, start = small
    config.backbone.name = kind
    one, index = tmp_path / "one.safetensors", write_parts(tmp_path / "parts", state_of(name), 3)
    write_safetensors(one, state_of(name))
    stages, arrays, told = [], [], []
    for path in (one, index, index.parent):
        config.import_torch.backbone = str(path)
        session = start(tmp_path / f"run{len(stages)}")
        import_torch.run(session)
        told.append(capsys.readouterr().out.replace(str(path), "FILE"))
        stages.append(session.run.stage("backbone").done)
        arrays.append(load(session.run.stage("backbone"), session.mesh)[1])
    assert told[0] == told[1] == told[2], "the same tensors are mapped and left out"
    parts = [index.parent / f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    sources = ([one], [index, *parts], [index, *parts])
    for done, found, files in zip(stages, arrays, sources, strict=True):
        jax.tree.map(partial(np.testing.assert_array_equal, strict=True), found, arrays[0])
        assert done["fingerprint"] == stages[0]["fingerprint"]
        assert done["imported"]["files"] == {str(file): digest(file) for file in files}
    parts[1].unlink()
    with pytest.raises(WeightFileError, match=f"1 are not next to it: {parts[1].name}; download"):
        import_torch.run(start(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("change", [with_fp8_matmuls, partial(with_lora, rank=2, alpha=2.0)])
def test_biases_stay_where_products_are_exchanged(change):
    attn = Dinov3Attention(32, 2, qkv_bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    attn.q_bias[...], attn.v_bias[...] = jnp.full(32, 3.0), jnp.full(32, -5.0)
    attn.proj.kernel[...] = jnp.eye(32)
    x = jax.random.normal(jax.random.key(0), (1, 4, 32))
    before = attn(x)
    np.testing.assert_allclose(before.mean(), -5, atol=0.3)
    more = {} if change is with_fp8_matmuls else dict(rngs=nnx.Rngs(1))
    after = change(nnx.Dict(attn=attn), **more).attn
    assert not isinstance(after.qkv, nnx.Linear)
    np.testing.assert_allclose(after(x), before, atol=0.05)


# Where PAE's code has each, and what it has no weights of.
INSIDE = {
    "dinov3": ("encoder.encoder.", "norm."),
    "siglip2": ("encoder.model.", "post_layernorm."),
}


@pytest.mark.parametrize("name", INSIDE)
def test_the_encoder_inside_of_a_pae_is_compared(small, name, capsys):
    config, _ = small
    config.backbone.name = kind = vision_files.kind_of_names(state_of(name))
    tower = vision_files.encoder_tensors(kind, state_of(name), num_heads=2)
    sizes = {k: v for k, v in config.backbone[kind].items() if k != "input_size"}
    table = TABLES[kind]
    params, rest = convert.import_torch(table, tower, Network(partial(table.module, **sizes)))
    backbone = {"encoder": params}, {"encoder": rest}
    prefix, norm = INSIDE[name]
    found = {prefix + key: x for key, x in tower.items() if not key.startswith(norm)}
    if kind == "siglip":
        found[f"{prefix}head.probe"] = np.zeros((1, 1, 32))
    source = Source(found, ("pae.pt",), "model", ())
    encoders.require_same_encoder(config, source, backbone)
    assert "its encoder is the run's backbone, " in capsys.readouterr().out
    found[f"{prefix}{next(iter(tower))}"] = np.zeros(1)
    with pytest.raises(ConversionError, match="not the run's backbone"):
        encoders.require_same_encoder(config, source, backbone)


def test_what_is_no_part_of_a_released_file_is_refused(small, tmp_path):
    config, start = small
    config.backbone.name = "siglip"
    config.import_torch.backbone = str(tmp_path / "model.safetensors")
    refused = partial(pytest.raises, ConversionError)
    write_safetensors(
        tmp_path / "model.safetensors", state_of("siglip2") | {"text_models.x": np.zeros(3)}
    )
    with refused(match=r"unexpected: text_models.x \[3\]"):
        import_torch.run(start(tmp_path / "run"))
    config.backbone.siglip.update(num_hidden_layers=3, image_size=16)
    with refused() as error:
        import_torch.run(start(tmp_path / "run"))
    for flag in ("num_hidden_layers=2", "image_size=40"):
        assert f"--config.backbone.siglip.{flag}" in str(error.value)
    config.backbone.name = "dinov2"
    with refused(match="holds the encoder 'siglip' .* pass --config.backbone.name=siglip"):
        import_torch.run(start(tmp_path / "run"))
    write_safetensors(tmp_path / "model.safetensors", state_of("dinov3_gated"))
    config.backbone.name = "dinov3"
    with refused() as error:
        import_torch.run(start(tmp_path / "run"))
    for flag in ("num_register_tokens=1", "use_gated_mlp=True", "qkv_bias=False"):
        assert f"--config.backbone.dinov3.{flag}" in str(error.value)


def test_every_released_kind_is_known_by_its_names():
    found = {name: vision_files.kind_of_names(state_of(name)) for name in ("dinov2", "vit_mae")}
    found |= {name: vision_files.kind_of_names(state_of(name)) for name in ("dinov3", "siglip2")}
    assert found == dict(dinov2="dinov2", vit_mae="mae", dinov3="dinov3", siglip2="siglip")
    assert vision_files.kind_of_names(state_of("gae_autoencoder")) is None


@pytest.mark.parametrize("kind", ["dinov3", "siglip"])
@pytest.mark.parametrize("tokenizer", ["pae", "rae", "fae", "aligntok"])
def test_the_tokenizers_stand_on_it(small, tokenizer, kind):
    """Shapes, without weights: 32 pixels are 4 x 4 tokens."""
    config, _ = small
    config.data.image_size, config.backbone.name = 32, kind
    config.tokenizer.name = tokenizer
    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1)
    decoder |= dict(decoder_num_attention_heads=2, decoder_intermediate_size=16)
    config.tokenizer.pae.update(num_heads=2, delta_depth=1, decoder_patch_size=8, **decoder)
    config.tokenizer.rae.update(patch_size=8, **decoder)
    config.tokenizer.aligntok.decoder = "vit"
    config.tokenizer.aligntok.vit.update(embed_dim=32, num_layers=1, num_heads=2)
    config.tokenizer.fae.update(encoder_heads=2, encoder_head_dim=8, decoder_depth=1)
    config.tokenizer.fae.update(decoder_heads=2, pixel_dim=32, pixel_depth=1, pixel_heads=2)
    network = Network(tokenizers.builder(config))
    assert sharding.shard(network.abstract, make_mesh(devices=jax.devices()[:1]))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def there_and_back(arrays, images):
        module = network(*arrays)
        latents = module.encode(images)
        return latents, module.decode(latents)

    latents, restored = jax.eval_shape(there_and_back, network.abstract, images)
    assert latents.shape == (2, *tokenizers.latent_shape(config))
    assert restored.shape == images.shape


def zeros_of(build):
    """The module with zeros for all of its arrays."""
    network = Network(build)
    return network(*jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), network.abstract))


def test_decoded_images_have_the_statistics_of_the_encoder(small):
    """RAE's decoder gives normalised patches: those of zeros are the mean of the images."""
    config, _ = small
    config.data.image_size, config.tokenizer.name = 32, "rae"
    sizes = dict(patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1)
    sizes |= dict(decoder_num_attention_heads=2, decoder_intermediate_size=16)
    config.tokenizer.rae.update(sizes)
    for kind, mean, std in (("dinov3", IMAGENET_MEAN, IMAGENET_STD), ("siglip", 0.5, 0.5)):
        config.backbone.name = kind
        model = zeros_of(tokenizers.builder(config))
        model.decoder.decoder_pred.bias[...] = jnp.ones_like(model.decoder.decoder_pred.bias[...])
        got = jax.jit(model.decode)(jnp.zeros((1, 4, 4, 32)))[0, 0, 0]
        np.testing.assert_allclose(got, 2 * (mean + std * np.ones(3)) - 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_a_backbone_is_asked_for_its_attention(kind):
    config = default_config()
    config.backbone.name = kind
    config.backbone.dinov2.num_hidden_layers = config.backbone.vit.num_layers = 2
    network = backbone_network(config.backbone, 3, attention="cudnn")
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    with pytest.raises(ValueError, match="attention is 'cudnn', but activations are float32"):
        jax.eval_shape(lambda *a: network(*a[:2]).features(a[2]), *network.abstract, image)
    with pytest.raises(ValueError, match="attention is 'flash'; use one of"):
        backbone_network(config.backbone, 3, attention="flash")


@pytest.mark.parametrize("kind", ["dinov3", "siglip"])
def test_preprocessing_takes_off_what_each_was_trained_with(kind):
    sizes = SIZES | dict(num_hidden_layers=1)
    backbone = zeros_of(partial(VisionBackbone, kind=kind, input_size=8, **sizes))
    white = np.asarray(backbone.preprocess(jnp.ones((1, 8, 8, 3))))[0, 0, 0]
    want = {"dinov3": (1 - IMAGENET_MEAN) / IMAGENET_STD, "siglip": np.ones(3)}
    np.testing.assert_allclose(white, want[kind], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("dinov4", {}, "backbone.name is 'dinov4'; use one of dinov2, dinov3, mae, siglip"),
        ("dinov3", {"input_size": 250}, "dinov3.input_size 250 is not .* patch_size 16; take 256"),
        ("siglip", {"image_size": 250}, "siglip.image_size 250 is not .* patch_size 16; take 256"),
        ("dinov3", {"num_attention_heads": 512}, "hidden_size 1024 is not a multiple of 2048"),
    ],
)
def test_settings_that_clash(kind, changes, message):
    config = default_config()
    config.backbone.name = kind
    if changes:
        config.backbone[kind].update(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize(("kind", "width"), [("dinov3", 1024), ("siglip", 1152)])
def test_256_pixels_are_16_tokens_an_edge(kind, width):
    config = default_config()
    config.backbone.name = kind
    assert backbone_shape(config.backbone) == (16, width)
