"""Networks with released weights against their PyTorch code, run side by side at released sizes.

The weights are random: this shows that the code is the same function, and that files as Hugging
Face, torch.hub and lpips write them can be read. Every check prints its relative difference;
docs/parity.md lists them.
"""

import os
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optional_torch import REASON, declare_operators

from gae_jax.interop import metric_tables, vision_files, vision_tables
from gae_jax.interop.convert import import_torch
from gae_jax.interop.files import read_state_dict
from gae_jax.nn import positions
from gae_jax.nn.layers import sincos_table
from gae_jax.nn.network import Network
from gae_jax.pretrained import dinov2, dinov3, lpips, mae, siglip

torch = pytest.importorskip("torch", reason=REASON)
LIBRARY = declare_operators(torch)
transformers = pytest.importorskip("transformers", reason=REASON)

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes
SQUARE = (224, 224)  # from 37 x 37 positions to 16 x 16
OTHERS = ((154, 308), (140, 560), (518, 518))  # shrunk, shrunk and stretched, as it is


def check(name, got, want, tolerance=1e-5):
    """Largest difference over largest expected value."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    difference = np.max(np.abs(got - want)) / np.max(np.abs(want))
    print(f"{name}: {difference:.1e}")
    assert difference <= tolerance, f"{name}: relative difference {difference:.2e}"


def image_of(size):
    return np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def randomise(model):
    """Values at which nothing is silent: activations near 1, no norm, scale or bias at 1 or 0.

    Layer scales are near 0.1, as in released networks: at 1, the blocks would outweigh the input.
    The fixed position table of MAE stays.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if not x.requires_grad:
                continue
            x.normal_(generator=generator)
            if "layer_scale" in name:
                x.mul_(0.05).add_(0.1)
            elif "norm" in name and name.endswith("weight"):
                x.mul_(0.1).add_(1)
            elif name.endswith("weight"):
                x.mul_(x[0].numel() ** -0.5)
            else:
                x.mul_(0.5 if x.ndim > 1 else 0.1)  # tokens and positions, or a bias
    return model.eval()


def make_dinov2(sizes):
    kind = "Dinov2WithRegisters" if sizes.get("num_register_tokens") else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(image_size=518, patch_size=14, **sizes)
    with torch.device("meta"):  # without the start values, which take longer than the test
        model = getattr(transformers, f"{kind}Model")(config)
    return randomise(model.to_empty(device="cpu"))


def make_mae(sizes, kind="ViTMAEModel"):
    model = getattr(transformers, kind)(transformers.ViTMAEConfig(mask_ratio=0.0, **sizes))
    embeddings = getattr(model, "vit", model).embeddings
    if not embeddings.position_embeddings.any():
        # transformers 5.23 finds the projection initialised by then and leaves the table zero,
        # which no released checkpoint has.
        embeddings.patch_embeddings.projection._is_hf_initialized = False
        embeddings.initialize_weights()
    assert embeddings.position_embeddings.abs().max() == 1
    return randomise(model)


def outputs_of(model, image, **options):
    """{name: what Hugging Face's module gives for the image}."""
    last = []
    names = ("layernorm", "norm", "post_layernorm")  # SigLIP has the third, and no CLS
    name = next(name for name in names if hasattr(model, name))
    hook = getattr(model, name).register_forward_pre_hook(
        lambda module, given: last.append(given[0])
    )
    with torch.no_grad():
        hidden = model(channels_first(image), **options).last_hidden_state
    hook.remove()
    first = 0 if name == names[2] else 1 + getattr(model.config, "num_register_tokens", 0)
    plain = torch.nn.functional.layer_norm(
        last[0], last[0].shape[-1:], eps=model.config.layer_norm_eps
    )
    return {
        "last_hidden_state": hidden,
        "patch_tokens": hidden[:, first:],
        "patch_tokens_no_affine": plain[:, first:],
    }


def load(table, sizes, tensors):
    """image -> {name: output} of our network with these tensors."""
    network = Network(partial(table.module, **sizes))
    arrays = jax.tree.map(jnp.asarray, import_torch(table, tensors, network))

    @jax.jit
    def run(arrays, image):
        model = network(*arrays)
        return {
            "last_hidden_state": model(image),
            "patch_tokens": model.patch_tokens(image),
            "patch_tokens_no_affine": model.patch_tokens(image, affine=False),
        }

    def call(image):
        with jax.default_matmul_precision("highest"):
            return run(arrays, image)

    return call


def check_outputs(label, got, want):
    for name, value in want.items():
        check(f"{label} {name}", got[name], value)


def saved(model, folder):
    """The tensors of the file that Hugging Face writes; the file goes, it may have gigabytes."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = read_state_dict(path)
    path.unlink()
    return tensors


@pytest.mark.timeout(900)  # giant: three minutes on two busy cores
@pytest.mark.parametrize("name", dinov2.PRESETS)
def test_dinov2(name, tmp_path):
    arguments = dinov2.PRESETS[name]
    if name == "giant" and MEMORY < 20e9:
        pytest.skip("giant takes 15 GB of memory")
    if name == "giant_registers":  # 40 blocks are tested without registers
        arguments = arguments | dict(num_hidden_layers=4)
    model = make_dinov2(arguments)
    sizes = (SQUARE, *OTHERS) if name.startswith("small") else (SQUARE,)
    images = [image_of(size) for size in sizes]
    want = [outputs_of(model, image) for image in images]
    tensors = saved(model, tmp_path)
    del model  # giant: 4.5 GB, and the same again for each form the weights are in
    call = load(vision_tables.DINOV2, arguments, tensors)
    for size, image, expected in zip(sizes, images, want, strict=True):
        check_outputs(f"{name} {size}", call(image), expected)


def hub_state(tensors):
    """The tensors of Hugging Face's DINOv2 by the names of the DINOv2 repository."""
    hub = {}
    for name, x in tensors.items():
        name = name.replace("embeddings.position_embeddings", "pos_embed")
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = re.sub(r"^embeddings\.", "", name)
        name = re.sub(r"^encoder\.layer\.", "blocks.", name)
        name = re.sub(r"^layernorm\.", "norm.", name)
        name = re.sub(r"layer_scale(\d)\.lambda1", r"ls\1.gamma", name)
        name = name.replace("attention.output.dense", "attn.proj")
        name = name.replace("mlp.weights_in", "mlp.w12").replace("mlp.weights_out", "mlp.w3")
        hub[name] = torch.from_numpy(x)
    for query in [name for name in hub if ".attention.attention.query." in name]:
        parts = [hub.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        hub[query.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return hub


@pytest.mark.parametrize(
    "changes", [{}, {"num_register_tokens": 4}, {"use_swiglu_ffn": True}], ids=str
)
def test_dinov2_by_the_names_of_torch_hub(changes, tmp_path):
    sizes = dinov2.PRESETS["small"] | changes
    model, image = make_dinov2(sizes), image_of(SQUARE)
    state = hub_state(saved(model, tmp_path))
    ffn = "w12" if sizes.get("use_swiglu_ffn") else "fc1"
    assert {"cls_token", "pos_embed", "mask_token", "norm.bias", "patch_embed.proj.weight"} <= {
        *state
    }
    assert {f"blocks.11.{x}" for x in ("attn.qkv.bias", "ls1.gamma", f"mlp.{ffn}.weight")} <= {
        *state
    }
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(state, path)
    call = load(vision_tables.DINOV2_HUB, sizes, read_state_dict(path))
    check_outputs("hub", call(image), outputs_of(model, image))


@pytest.mark.parametrize("grid", [(16, 16), (11, 22), (10, 40), (37, 20), (45, 45)], ids=str)
@pytest.mark.parametrize("registers", [False, True])
def test_positions_as_torch_hub_interpolates_them(registers, grid):
    """`interpolate_pos_encoding` of facebookresearch/dinov2, in the two ways of its networks."""
    side, width = 37, 32
    table = np.random.default_rng(0).normal(size=(1, 1 + side**2, width)).astype(np.float32)
    patches = channels_first(table[:, 1:].reshape(1, side, side, width))
    if registers:
        options, offset = dict(size=grid, antialias=True), 0.0
    else:
        options, offset = dict(scale_factor=tuple((size + 0.1) / side for size in grid)), 0.1
    want = torch.nn.functional.interpolate(patches, mode="bicubic", **options)
    assert want.shape == (1, width, *grid)
    got = positions.resize_positions(jnp.asarray(table), grid, antialias=registers, offset=offset)
    np.testing.assert_array_equal(got[:, 0], table[:, 0])
    got = np.asarray(got)[:, 1:].reshape(1, *grid, width)
    check(f"registers {registers} {grid}", got, want.permute(0, 2, 3, 1))


def mae_options(image, patch=16):
    """Makes ViTMAEModel keep the tokens in their order, and take images of any size."""
    tokens = image.shape[1] * image.shape[2] // patch**2
    other = image.shape[1:3] != SQUARE
    return dict(noise=torch.arange(tokens)[None], interpolate_pos_encoding=other)


@pytest.mark.parametrize("name", mae.PRESETS)
def test_mae(name, tmp_path):
    model = make_mae(mae.PRESETS[name])
    tensors = saved(model, tmp_path)
    table = tensors["embeddings.position_embeddings"][0]
    check("positions", sincos_table(mae.PRESETS[name]["hidden_size"], 14), table[1:])
    assert not table[0].any()
    call = load(vision_tables.MAE, mae.PRESETS[name], tensors)
    for size in (SQUARE, (160, 288), (384, 320)):
        image = image_of(size)
        want = outputs_of(model, image, **mae_options(image))
        check_outputs(f"{name} {size}", call(image), want)


def test_the_encoder_of_a_mae_with_its_decoder(tmp_path):
    sizes, image = mae.PRESETS["base"], image_of(SQUARE)
    model = make_mae(sizes, "ViTMAEForPreTraining")
    tensors = saved(model, tmp_path)
    assert {name.split(".")[0] for name in tensors} == {"vit", "decoder"}
    call = load(
        vision_tables.MAE, sizes, vision_files.encoder_tensors("mae", tensors, num_heads=12)
    )
    check_outputs("base", call(image), outputs_of(model.vit, image, **mae_options(image)))


# Of the largest so many blocks; the others are whole.
BLOCKS = {"huge_plus": 4, "7b": 1, "giant_opt": 4}


def make_dinov3(sizes):
    gated, bias = sizes["use_gated_mlp"], sizes["qkv_bias"]
    arguments = {name: value for name, value in sizes.items() if name != "qkv_bias"}
    config = transformers.DINOv3ViTConfig(
        **arguments,
        num_register_tokens=4,
        query_bias=bias,
        value_bias=bias,
        hidden_act="silu" if gated else "gelu",
    )
    with torch.device("meta"):
        model = transformers.DINOv3ViTModel(config)
    model = model.to_empty(device="cpu")
    model.rope_embeddings = type(model.rope_embeddings)(config)  # its frequencies are no weights
    return randomise(model)


@pytest.mark.parametrize("name", dinov3.PRESETS)
def test_dinov3(name, tmp_path):
    sizes = dinov3.PRESETS[name]
    sizes = sizes | dict(num_hidden_layers=BLOCKS.get(name, sizes["num_hidden_layers"]))
    model = make_dinov3(sizes)
    images = [image_of(size) for size in ((256, 256), (224, 224), (160, 288))]
    want = [outputs_of(model, image) for image in images]
    tensors = saved(model, tmp_path)
    del model
    assert vision_files.kind_of_names(tensors) == "dinov3"
    call = load(vision_tables.DINOV3, sizes, tensors)
    for image, expected in zip(images, want, strict=True):
        check_outputs(f"{name} {image.shape[1:3]}", call(image), expected)


@pytest.mark.timeout(900)  # large: four minutes on two busy cores
@pytest.mark.parametrize("name", siglip.PRESETS)
def test_the_vision_tower_of_siglip(name, tmp_path):
    """Out of the file of a whole model; its text tower is a small one."""
    sizes = siglip.PRESETS[name]
    sizes = sizes | dict(num_hidden_layers=BLOCKS.get(name, sizes["num_hidden_layers"]))
    text = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    text |= dict(vocab_size=8, projection_size=sizes["hidden_size"])
    config = transformers.SiglipConfig(
        text_config=text, vision_config=sizes | dict(image_size=256, patch_size=16)
    )
    model = randomise(transformers.SiglipModel(config))
    images = [image_of(size) for size in ((256, 256), (512, 512), (160, 288))]
    options = dict(interpolate_pos_encoding=True)
    want = [outputs_of(model.vision_model, image, **options) for image in images]
    tensors = saved(model, tmp_path)
    del model
    heads = sizes["num_attention_heads"]
    tower = vision_files.encoder_tensors("siglip", tensors, num_heads=heads)
    call = load(vision_tables.SIGLIP, sizes, tower)
    for image, expected in zip(images, want, strict=True):
        check_outputs(f"{name} {image.shape[1:3]}", call(image), expected)


@pytest.mark.parametrize("name", ["dinov2", "mae"])
def test_norms_have_the_released_epsilon(name, tmp_path):
    """Tokens whose variance is about the epsilon show it; those of the other tests hide it."""
    image = image_of(SQUARE)
    if name == "dinov2":
        table, sizes, options = vision_tables.DINOV2, dinov2.PRESETS["small"], {}
        model, epsilon = make_dinov2(sizes), 1e-6
    else:
        table, sizes, options = vision_tables.MAE, mae.PRESETS["base"], mae_options(image)
        model, epsilon = make_mae(sizes), 1e-12
    with torch.no_grad():
        for key, x in model.named_parameters():  # all that writes to the tokens
            if re.match(r"embeddings\.|.*\.(o_proj|fc2)\.", key):
                x.mul_(0.3 * epsilon**0.5)
    want = outputs_of(model, image, **options)
    assert 0.1 < want["patch_tokens_no_affine"].std() < 0.95  # 1 if the epsilon were nothing
    check_outputs(name, load(table, sizes, saved(model, tmp_path))(image), want)


@pytest.fixture(scope="module")
def their_lpips():
    """(lpips with random convolutions and its released heads, torchvision's VGG16 inside it)."""
    package = pytest.importorskip("lpips", reason=REASON)
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = torchvision.models.vgg16(weights=None)
        model = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in trunk.features.named_parameters():
            if name.endswith("bias"):  # they start at zero
                x.normal_(std=0.1, generator=generator)
        for name, x in model.net.named_parameters():
            x.copy_(trunk.features.get_parameter(name.partition(".")[2]))
    # Half a gigabyte that nobody looks at.
    trunk.classifier = torch.nn.Sequential(torch.nn.Linear(8, 8))
    return model, trunk, Path(package.__file__).parent / "weights/v0.1/vgg.pth"


@pytest.mark.parametrize("route", ["state_dict", "files"])
def test_lpips(route, their_lpips, tmp_path):
    model, trunk, heads = their_lpips
    torch.save((model if route == "state_dict" else trunk).state_dict(), tmp_path / "x.pth")
    table, tensors = metric_tables.LPIPS, read_state_dict(tmp_path / "x.pth")
    if route == "files":
        table, tensors = metric_tables.LPIPS_FILES, tensors | read_state_dict(heads)
    network = Network(lpips.LPIPS)
    arrays = jax.tree.map(jnp.asarray, import_torch(table, tensors, network))
    run = jax.jit(lambda arrays, a, b: network(*arrays)(a, b))
    for size in ((64, 64), (224, 160)):
        rng = np.random.default_rng(0)
        a, b = rng.uniform(-1, 1, (2, 2, *size, 3)).astype(np.float32)
        b[1] = 0.9 * a[1] + 0.1 * b[1]  # alike
        with torch.no_grad():
            want = model(channels_first(a), channels_first(b)).numpy().ravel()
        got = np.asarray(run(arrays, a, b))
        assert want[1] < want[0] / 2
        for n, label in enumerate(("unlike", "alike")):
            check(f"{route} {size} {label}", got[n : n + 1], want[n : n + 1])
