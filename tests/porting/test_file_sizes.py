"""What a file does not show: heads of attention, rounded buffers, whose weights they are."""

import json
import math
import re
from pathlib import Path

import golden_files
import jax
import numpy as np
import pytest
from torch_zip import half, write_torch

from gae_jax.commands import import_torch
from gae_jax.config import default_config
from gae_jax.interop import known_weights
from gae_jax.interop.convert import ConversionError
from gae_jax.interop.convert import import_torch as interop_import
from gae_jax.interop.files import read_state_dict, write_safetensors
from gae_jax.interop.sizes import differing, questions
from gae_jax.porting.file_sizes import require_sizes
from gae_jax.porting.importing import convert
from gae_jax.porting.released import released
from gae_jax.porting.sources import Source, read_sources
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError


def dinov2_file(width, registers=0, blocks=2, swiglu=0):
    """Random weights by the names of DINOv2's own repository; the table is of 3 x 3 patches.

    Args:
      swiglu: hidden width of the SwiGLU that ViT-g has; 0: an MLP.
    """
    rng = np.random.default_rng(0)

    def f(*shape):
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)

    found = {
        "cls_token": f(1, 1, width),
        "pos_embed": f(1, 10, width),
        "mask_token": f(1, width),
        "patch_embed.proj.weight": f(width, 3, 14, 14),
        "patch_embed.proj.bias": f(width),
        "norm.weight": 1 + f(width),
        "norm.bias": f(width),
    }
    if registers:
        found["register_tokens"] = f(1, registers, width)
    for i in range(blocks):
        for name, shape in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.w12" if swiglu else "mlp.fc1": (2 * swiglu or 4 * width, width),
            "mlp.w3" if swiglu else "mlp.fc2": (width, swiglu or 4 * width),
        }.items():
            found[f"blocks.{i}.{name}.weight"], found[f"blocks.{i}.{name}.bias"] = (
                f(*shape),
                f(shape[0]),
            )
        for name in ("norm1", "norm2"):
            found[f"blocks.{i}.{name}.weight"] = 1 + f(width)
            found[f"blocks.{i}.{name}.bias"] = f(width)
        for name in ("ls1", "ls2"):
            found[f"blocks.{i}.{name}.gamma"] = 1 + f(width)
    return found


def dinov2_tokens(state, pixels, heads):
    """DINOv2 in fp64 on pixels [S, S, 3] of the table's own size: [1 + R + N, C]."""
    state = {name: x.astype(np.float64) for name, x in state.items()}
    width, side = state["cls_token"].shape[-1], len(pixels) // 14

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = pixels.reshape(side, 14, side, 14, 3).transpose(0, 2, 4, 1, 3).reshape(side**2, -1)
    x = patches @ state["patch_embed.proj.weight"].reshape(width, -1).T
    x = np.concatenate([state["cls_token"][0], x + state["patch_embed.proj.bias"]])
    x = x + state["pos_embed"][0]
    x = np.concatenate([x[:1], state.get("register_tokens", np.zeros((1, 0, width)))[0], x[1:]])
    gelu = np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)
    for i in range(1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(width // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        mixed = linear(mixed.transpose(1, 0, 2).reshape(len(x), -1), f"{block}.attn.proj")
        x = x + mixed * state[f"{block}.ls1.gamma"]
        if f"{block}.mlp.w12.weight" in state:  # SwiGLUFFN: silu of the first half gates the other
            gate, value = np.split(
                linear(norm(x, f"{block}.norm2"), f"{block}.mlp.w12"), 2, axis=-1
            )
            out = linear(gate / (1 + np.exp(-gate)) * value, f"{block}.mlp.w3")
        else:
            hidden = gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            out = linear(hidden, f"{block}.mlp.fc2")
        x = x + out * state[f"{block}.ls2.gamma"]
    return norm(x, "norm")


def start(config, path):
    return Session(config, Run(path), devices=tuple(jax.devices()[:1]))


def follow(config, error):
    """Sets every flag that an error prints."""
    flags = re.findall(r"^--config\.(\S+?)=(\S+)$", str(error), re.MULTILINE)
    assert flags
    for path, value in flags:
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = type(section[name])(json.loads(value.lower()))
    return dict(flags)


@pytest.mark.parametrize(
    ("width", "registers", "heads", "stated"),
    [
        (384, 0, 6, None),
        (128, 4, 2, None),
        (384, 0, 3, 3),
        (128, 0, 2, "swiglu"),
        # heads of 64 channels as in those above, at another width, with or without registers
        pytest.param(128, 4, 2, "swiglu", marks=pytest.mark.slow),
        pytest.param(768, 0, 12, None, marks=pytest.mark.slow),
        pytest.param(128, 0, 2, None, marks=pytest.mark.slow),
    ],
)
def test_following_the_flags_gives_the_right_network(tmp_path, width, registers, heads, stated):
    """Compared with fp64; a config.json beside the file says of other heads. ViT-g has SwiGLU."""
    config = default_config()
    swiglu = 344 if stated == "swiglu" else 0  # 2/3 of 4 x 128, up to a multiple of 8
    stated = None if swiglu else stated
    state = dinov2_file(width, registers, swiglu=swiglu)
    write_safetensors(tmp_path / "w.safetensors", state)
    if stated:
        content = {"model_type": "dinov2", "hidden_size": width, "num_attention_heads": stated}
        (tmp_path / "config.json").write_text(json.dumps(content))
    config.import_torch.backbone = str(tmp_path / "w.safetensors")
    config.backbone.dinov2.input_size = 42
    with pytest.raises(ConversionError) as error:
        import_torch.run(start(config, tmp_path / "run"))
    flags = follow(config, error.value)
    assert flags["backbone.dinov2.num_attention_heads"] == str(heads)
    assert config.backbone.dinov2.interpolate_offset == (0.0 if registers else 0.1)
    session = start(config, tmp_path / "run")
    import_torch.run(session)
    network, arrays = load(session.run.stage("backbone"), session.mesh)
    pixels = np.random.default_rng(1).standard_normal((42, 42, 3)).astype(np.float32)
    found = jax.jit(lambda x: network(*arrays).encoder(x))(pixels[None])[0]
    np.testing.assert_allclose(found, dinov2_tokens(state, pixels, heads), atol=1e-4)
    config.backbone.dinov2.num_attention_heads = 16
    with pytest.raises(ConversionError, match=rf"num_attention_heads={heads}\b"):
        import_torch.run(start(config, tmp_path / "again"))


def test_a_config_of_another_network_is_refused_or_not_read(tmp_path, capsys):
    config = default_config()
    write_safetensors(tmp_path / "w.safetensors", dinov2_file(128))
    config.import_torch.backbone = str(tmp_path / "w.safetensors")
    config.backbone.dinov2.update(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=42, input_size=42
    )
    file, content = tmp_path / "config.json", {"model_type": "dinov2", "hidden_size": 128}
    file.write_text(json.dumps(content | {"layer_norm_eps": 1e-5}))
    with pytest.raises(ConversionError, match=r"has layer_norm_eps 1e-05, but .* have 1e-06"):
        import_torch.run(start(config, tmp_path / "run"))
    file.write_text(json.dumps(content | {"hidden_size": 768, "num_attention_heads": 12}))
    import_torch.run(start(config, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "config.json is of another network and was not read" in said
    assert "num_attention_heads shows in no tensor: 2 for a width of 128, as the config" in said


def test_heads_that_do_not_follow_are_asked_for(tmp_path):
    config = default_config()
    write_safetensors(tmp_path / "w.safetensors", dinov2_file(48))
    config.import_torch.backbone = str(tmp_path / "w.safetensors")
    with pytest.raises(ConversionError, match=r"hidden_size=48\n(.|\n)*pass --config.*heads=N"):
        import_torch.run(start(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gae_autoencoder", "lightningdit_qk0_noshift0"])
def test_heads_of_gae_and_of_a_diffusion_model(name):
    """Those of the published sizes; RoPE's tables show those of a LightningDiT."""
    config = default_config()
    if name == "gae_autoencoder":
        shapes = {
            "foundation_encoder.patch_embed.weight": (384, 3, 16, 16),
            "foundation_encoder.pos_embed": (1, 256, 384),
            "foundation_encoder.blocks.11.attn.qkv.weight": (1152, 384),
            "foundation_encoder.blocks.0.attn.qkv.weight": (1152, 384),
            "adapter.model.weight": (32, 384),
        }
        flags = differing("gae", shapes, config.tokenizer.model, "tokenizer.model")
        assert "--config.tokenizer.model.num_heads=6" in flags
        assert not any("num_kv_heads" in flag for flag in flags)
        return
    shapes = {
        "x_embedder.proj.weight": (768, 32, 1, 1),
        "y_embedder.embedding_table.weight": (1001, 768),
        "blocks.11.attn.qkv.weight": (2304, 768),
        "blocks.0.mlp.w12.weight": (4096, 768),
        "blocks.0.norm1.weight": (768,),
    }
    section = config.diffusion.model
    flags = differing("diffusion", shapes, section, "diffusion.model")
    assert "--config.diffusion.model.num_heads=12" in flags
    assert not any("use_rope" in flag for flag in flags), "what the network is, nobody may advise"
    (asked,) = questions("diffusion", shapes, section, "diffusion.model")
    assert "use_rope=False" in asked
    assert "leave_out=" in asked
    rope = {"feat_rope.freqs_cos": (256, 48)}
    flags = differing("diffusion", shapes | rope, section, "diffusion.model")
    assert not any("num_heads" in flag for flag in flags), "768 / 48 = 16, as the config"


@pytest.fixture
def dit(tmp_path):
    """(config of the golden LightningDiT with its tokenizer, its state dict)."""
    config = default_config()
    sizes, groups = golden_files.golden("lightningdit_qk1_noshift0")
    gae, gae_groups = golden_files.golden("gae_autoencoder")
    write_safetensors(tmp_path / "gae.safetensors", gae_groups["state"])
    ones = np.ones((1, 8, 1, 1), np.float32)
    write_safetensors(tmp_path / "stats.safetensors", {"mean": ones, "std": ones})
    config.data.image_size = 32
    config.tokenizer.model.update(**gae)
    config.diffusion.model.update(
        hidden_size=64, depth=2, num_heads=4, num_classes=10, use_qknorm=sizes["use_qknorm"]
    )
    config.import_torch.update(
        tokenizer=str(tmp_path / "gae.safetensors"), statistics=str(tmp_path / "stats.safetensors")
    )
    return config, dict(groups["state"])


def converted(config, path, tmp_path):
    """The diffusion model of a file, as it would become a stage."""
    config.import_torch.diffusion = str(path)
    session = start(config, tmp_path / "run")
    source = read_sources(session)["diffusion"]
    return convert(session, "diffusion", source)


@pytest.mark.parametrize("name", ["rae_ditdh", "rae_ditdh_equalwidth_qknorm"])
def test_the_sizes_of_ditdh_come_as_flags(tmp_path, name):
    config = default_config()
    sizes, groups = golden_files.golden(name)
    state, grid = dict(groups["state"]), sizes["input_size"]
    config.diffusion.name = "ddt"

    def required():
        source = Source(state, (str(tmp_path / "ditdh.pt"),), "", ())
        return require_sizes(config, "diffusion", source, state)

    with pytest.raises(ConversionError) as error:
        required()
    flags = follow(config, error.value)
    for field in ("hidden_size", "depth", "num_heads"):
        assert config.diffusion.model[field] == sizes[field][0], field
        assert config.diffusion.head[field] == sizes[field][1], field
    assert config.diffusion.model.num_classes == 10
    assert config.diffusion.model.use_qknorm == sizes["use_qknorm"]
    assert flags["diffusion.head.hidden_size"] == str(sizes["hidden_size"][1])
    required()
    counterpart = released(
        "diffusion", config.to_dict(), names=state, shape=(grid, grid, sizes["in_channels"])
    )
    interop_import(counterpart.table, state, counterpart.network, **counterpart.sizes)
    # without what shows them: asked for, and the file of another network is refused
    for key in [key for key in state if "feat_rope" in key]:
        del state[key]
    with pytest.raises(ConversionError, match=r"use_rope=False; if they were taken"):
        required()
    config.import_torch.leave_out = ("*feat_rope.*",)
    required()
    del state["s_embedder.proj.weight"]
    with pytest.raises(ConversionError, match=r"no tensor 's_embedder\.proj"):
        required()


def test_two_parts_of_ditdh_that_are_alike_are_asked_for():
    _, groups = golden_files.golden("rae_ditdh_equalwidth_qknorm")
    shapes = {k: x.shape for k, x in groups["state"].items() if "norm.weight" not in k}
    section = {**default_config().diffusion.head, "other_depth": 1}
    asked = questions("ddt_head", shapes, section | {"depth": 9}, "diffusion.head")
    assert any(line.startswith("depth shows in no tensor") for line in asked)
    assert "--config.diffusion.head.depth=N" in str(asked)
    assert not questions("ddt_head", shapes, section | {"depth": 2}, "diffusion.head")


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["safetensors", "torch", "widened"])
def test_files_in_half_precision_come_exactly_and_with_rope(dit, tmp_path, kind, form):
    config, state = dit
    rounded = {name: half(x, kind) if x.dtype == np.float32 else x for name, x in state.items()}
    path = tmp_path / "dit.safetensors"
    if form == "torch":
        path = write_torch(tmp_path / "dit.pt", {"ema": rounded, "args": None})
    else:
        if form == "widened":
            rounded = {name: x.astype(np.float32) for name, x in rounded.items()}
        write_safetensors(path, rounded)
    found = converted(config, path, tmp_path)
    assert any("freqs_cos is rounded in the file" in line for line in found.source.remarks)
    params, _ = found.arrays
    for name, mine in (("weight", "kernel"), ("bias", "bias")):
        want = rounded[f"final_layer.linear.{name}"].astype(np.float32)
        np.testing.assert_array_equal(params["dit"]["final_layer"]["linear"][mine], want.T)
    # buffers of another network are still refused
    rounded["feat_rope.freqs_cos"] = rounded["feat_rope.freqs_cos"][::-1].copy()
    write_safetensors(tmp_path / "other.safetensors", rounded)
    with pytest.raises(ConversionError, match=r"wrong values: feat_rope.freqs_cos is off"):
        converted(config, tmp_path / "other.safetensors", tmp_path)


def test_a_file_without_its_buffers_does_not_become_another_network(dit, tmp_path):
    config, state = dit
    bare = {name: x for name, x in state.items() if not name.startswith("feat_rope.")}
    write_safetensors(tmp_path / "bare.safetensors", bare)
    with pytest.raises(ConversionError, match=r"use_rope=False; if they were taken out of the"):
        converted(config, tmp_path / "bare.safetensors", tmp_path)
    config.import_torch.leave_out = ("feat_rope.*",)
    found = converted(config, tmp_path / "bare.safetensors", tmp_path)
    assert found.counterpart.sizes["use_rope"]
    assert any("freqs_sin is not in the file" in line for line in found.source.remarks)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x * np.nan, r"final_layer.linear.bias has 8 NaN of 8 numbers"),
        (lambda x: x + np.inf, r"final_layer.linear.bias has 8 infinite of 8 numbers"),
        (lambda x: x.astype(np.int8), r"final_layer.linear.bias is of int8, no real numbers"),
    ],
)
def test_weights_that_are_no_numbers_are_named(dit, tmp_path, change, says):
    config, state = dit
    name = "final_layer.linear.bias"
    write_safetensors(tmp_path / "x.safetensors", state | {name: change(state[name])})
    with pytest.raises(ConversionError, match=says):
        converted(config, tmp_path / "x.safetensors", tmp_path)


def test_an_average_is_not_taken_unasked_and_a_choice_is_said(dit, tmp_path):
    config, state = dit
    path = write_torch(tmp_path / "dit.pt", {"model": state, "opt": {}})
    with pytest.raises(UserError, match=r"no entry 'ema' .*import_torch.entry=model"):
        converted(config, path, tmp_path)
    config.import_torch.entry = "model"
    assert converted(config, path, tmp_path).which == "params"
    write_torch(path, {"model": state, "ema": state})
    config.import_torch.entry = ""
    found = converted(config, path, tmp_path)
    assert found.which == "ema"
    assert "its entry 'ema' was taken" in found.source.remarks[0]
    write_torch(path, {"a": state, "b": state})
    with pytest.raises(UserError, match=r"import_torch.entry=a or --config.import_torch.entry=b"):
        converted(config, path, tmp_path)
    config.import_torch.entry = "b"
    assert converted(config, path, tmp_path).source.entry == "b"


def test_metric_networks_are_named_by_their_hash(tmp_path, monkeypatch):
    tensors = {"features.0.weight": np.ones((2, 3)), "lin0.model.1.weight": np.ones((1, 2, 1, 1))}
    files = [tmp_path / "vgg.safetensors", tmp_path / "heads.safetensors"]
    for file, (name, x) in zip(files, tensors.items(), strict=True):
        write_safetensors(file, {name: x})
    names = [str(file) for file in files]
    found = known_weights.identities("lpips", tensors, names)
    assert set(found) == {"backbone", "heads"}
    assert [x["name"] for x in found.values()] == ["", ""]
    heads = found["heads"]["sha256"]
    other = known_weights.identities("lpips", tensors | {"lin0.model.1.weight": np.zeros(2)}, names)
    assert other["heads"]["sha256"] != heads
    assert other["backbone"] == found["backbone"]
    monkeypatch.setitem(known_weights.TENSORS, heads, "LPIPS heads v0.0, vgg")
    known = known_weights.identities("lpips", tensors, names)
    text = "\n".join(known_weights.lines(known))
    assert "heads: LPIPS heads v0.0, vgg (SHA-256" in text
    assert "warning: LPIPS of these heads is another figure" in text
    assert "backbone: not among the weights whose hashes are known" in text


def test_the_published_heads_of_lpips_are_known():
    lpips = pytest.importorskip("lpips", reason="torch is optional")
    for version in ("v0.0", "v0.1"):
        file = Path(lpips.__file__).parent / "weights" / version / "vgg.pth"
        digest = known_weights.tensors_digest(read_state_dict(file))
        assert known_weights.TENSORS[digest] == f"LPIPS heads {version}, vgg"
