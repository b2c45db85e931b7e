"""The benchmark: exact counts of operations, and every work at a tiny size."""

import io
import json
import logging
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from gae_jax.benchmark import data, flops, rows, timing, workloads
from gae_jax.benchmark.bare import cut
from gae_jax.commands import bench, cli
from gae_jax.config.precision import NETWORKS, settings
from gae_jax.config.validate import validate
from gae_jax.data.pipeline import ImageData
from gae_jax.generators import dit
from gae_jax.generators.dit import LightningDiT
from gae_jax.nn import attention, layers
from gae_jax.nn.network import Keys, Network
from gae_jax.pretrained import lpips
from gae_jax.run import load
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.mesh import put_batch
from gae_jax.tokenizers.gae import GAE
from gae_jax.train.fit import init_state, jit_step


class OneGPU:
    compute_capability = "9.0"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention.jax, "local_devices", lambda: [OneGPU()])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "why"),
    [
        ("bfloat16", 72, None),
        ("float16", 128, None),
        ("float32", 64, "activations are float32"),
        ("bfloat16", 136, "heads have 136 channels"),
        ("bfloat16", 36, "heads have 36 channels"),
    ],
)
def test_where_auto_takes_cudnn(dtype, head_dim, why, on_gpu):
    choose = attention.attention_implementation
    assert choose("xla", dtype, head_dim) == "xla"
    assert choose("auto", dtype, head_dim) == ("xla" if why else "cudnn")
    if why is None:
        assert choose("cudnn", dtype, head_dim) == "cudnn"
    else:
        with pytest.raises(ValueError, match=f"attention is 'cudnn', but {why}"):
            choose("cudnn", dtype, head_dim)


def test_an_old_gpu_has_no_cudnn_attention(on_gpu, monkeypatch):
    for capability in ("7.5", "gfx90a"):
        monkeypatch.setattr(OneGPU, "compute_capability", capability)
        assert attention.attention_implementation("auto", "bfloat16", 64) == "xla"


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(attention, "_logged", [])
    caplog.set_level(logging.INFO)
    for dtype in ("bfloat16", "float32"):
        assert attention.attention_implementation("auto", dtype, 64) == "xla"
    assert caplog.messages == ["attention: xla (the device is a cpu, not a gpu)"]


@pytest.mark.parametrize("model", [GAE, LightningDiT])
def test_attention_names(model):
    sizes = dict(rngs=Keys(0))
    if model is GAE:
        sizes |= dict(image_size=8, patch_size=4, embed_dim=32, num_layers=1, num_heads=4)
    else:
        sizes |= dict(input_size=2, in_channels=4, hidden_size=32, depth=1, num_heads=4)
    with pytest.raises(ValueError, match=r"attention is 'flash'; use one of auto, xla, cudnn"):
        model(**sizes, attention="flash")
    built = {
        name: nnx.jit(lambda name=name: model(**sizes, attention=name))()
        for name in attention.ATTENTIONS
    }

    @nnx.jit
    def call(model):
        if isinstance(model, GAE):
            return model.decode(model.encode(jnp.ones((1, 8, 8, 3))))
        return model(jnp.ones((1, 2, 2, 4)), jnp.ones(1), jnp.zeros(1, jnp.int32))

    with pytest.raises(ValueError, match="but activations are float32"):
        call(built["cudnn"])
    for name in ("auto", "xla"):
        assert np.all(np.isfinite(call(built[name])))


def test_an_unknown_attention_is_refused_in_the_config(config):
    config.precision.override += ("diffusion.attention=flash",)
    with pytest.raises(ConfigError, match=r"diffusion\.attention=flash'; use one of auto, xla"):
        validate(config)


def test_attention_by_name_is_what_it_was():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
    named = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    np.testing.assert_array_equal(named, jax.nn.dot_product_attention(q, k, v))


def of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(x, kernel, strides=(1, 1), padding="SAME", **more):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=names, **more
    )


def total(function):
    return lambda *arguments: jnp.sum(function(*arguments))


DENSE = 2 * 5 * 7 * 11


@pytest.mark.parametrize(
    ("function", "arguments", "operations"),
    [
        (jnp.matmul, (of(5, 7), of(7, 11)), DENSE),
        (jax.jit(jnp.matmul), (of(3, 5, 7), of(3, 7, 11)), 3 * DENSE),
        (jnp.add, (of(5, 7), of(5, 7)), 0),
        # two products in the backward pass, of the size of the one forward
        (jax.grad(total(jnp.matmul), (0, 1)), (of(5, 7), of(7, 11)), 2 * DENSE),
        (jax.value_and_grad(lambda x: jnp.sum((x @ x) ** 2)), (of(4, 4),), 3 * 2 * 4**3),
        (conv, (of(2, 8, 8, 3), of(3, 3, 3, 6)), 2 * (2 * 8 * 8 * 6) * (3 * 3 * 3)),
        (
            partial(conv, feature_group_count=4),
            (of(2, 8, 8, 4), of(3, 3, 1, 8)),
            2 * (2 * 8 * 8 * 8) * (3 * 3),
        ),
        # of a strided convolution: forward, by the kernel, by the image
        (
            jax.value_and_grad(
                lambda x, k: jnp.sum(conv(x, k, (2, 2), "VALID") ** 2), argnums=(0, 1)
            ),
            (of(1, 8, 8, 3), of(2, 2, 3, 6)),
            3 * 2 * (4 * 4 * 6) * (2 * 2 * 3),
        ),
    ],
)
def test_operations_of_products_and_convolutions(function, arguments, operations):
    assert flops.count(function, *arguments) == operations


def test_operations_of_loops_and_branches():
    x = of(4, 4)
    one = 2 * 4**3

    def square(x):
        return x @ x

    def scanned(x):
        return jax.lax.scan(lambda c, _: (square(c), None), x, None, length=7)[0]

    assert flops.count(scanned, x) == 7 * one
    assert flops.count(lambda x: jax.lax.fori_loop(0, 3, lambda _, c: square(c), x), x) == 3 * one
    loop = partial(jax.lax.while_loop, lambda c: c[0, 0] < 0, square)
    assert flops.count(loop, x) == one
    branches = [square, lambda x: x, lambda x: square(square(x))]
    assert flops.count(lambda i, x: jax.lax.switch(i, branches, x), of(dtype=int), x) == 2 * one


def test_operations_inside_custom_rules_checkpoints_and_shards():
    x = of(8, 4)
    one = 2 * 8 * 4 * 4

    @jax.custom_jvp
    def with_jvp(x):
        return x @ jnp.ones((4, 4))

    with_jvp.defjvp(lambda x, t: (with_jvp(*x), t[0] @ jnp.ones((4, 4))))

    @jax.custom_vjp
    def with_vjp(x):
        return x @ jnp.ones((4, 4))

    with_vjp.defvjp(lambda x: (with_vjp(x), None), lambda _, g: (g @ jnp.ones((4, 4)),))
    for function in (with_jvp, with_vjp):
        assert flops.count(function, x) == one
        assert flops.count(jax.value_and_grad(total(function)), x) == 2 * one

    def twice(x):
        return jnp.sum(jnp.sin(jnp.sin(x @ jnp.ones((4, 4))) @ jnp.ones((4, 4))))

    kept = flops.count(jax.value_and_grad(twice), x)
    assert kept == 4 * one
    # the first product is made again, which the sine after the second needs not
    again = jax.checkpoint(twice, policy=jax.checkpoint_policies.nothing_saveable)
    assert flops.count(jax.value_and_grad(again), x) > kept

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        lambda x: x @ jnp.ones((4, 4)), mesh=mesh, in_specs=rows, out_specs=rows
    )
    assert flops.count(sharded, x) == one


def test_operations_of_attention():
    batch, tokens, dim = 3, 10, 16
    layer = attention.Attention(dim, 4, rngs=nnx.Rngs(0))
    linear = 2 * batch * tokens * dim * (3 * dim + dim)
    pairs = 2 * 2 * batch * tokens**2 * dim
    assert flops.count(layer, of(batch, tokens, dim)) == linear + pairs


def test_operations_of_the_papers_generator():
    """XL/1 on 256 tokens: 12 D^2 weights a block and token (SwiGLU 8), pairs, modulation."""
    network = Network(lambda rngs: LightningDiT(**dit.SIZES["XL/1"], rngs=rngs))

    def forward(params, rest, *inputs):
        return network(params, rest)(*inputs)

    inputs = of(2, 16, 16, 32), of(2), of(2, dtype=jnp.int32)
    found = flops.count(forward, *network.abstract, *inputs) / 2
    width, tokens, depth = 1152, 256, 28
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width + 2 * 6 * width**2
    ends = 2 * tokens * 2 * 32 * width + 2 * (2 * width**2) + 2 * (256 * width + width**2)
    assert found == depth * block + ends
    np.testing.assert_allclose(found / 1e12, 0.237, rtol=5e-3)


class Some(nnx.Module):
    """Matrices, biases and a norm's weight; layers in half and full precision, and in any."""

    def __init__(self, *, rngs):
        self.layers = nnx.List(
            nnx.Linear(4, 4, dtype=dtype, rngs=rngs) for dtype in (jnp.bfloat16, jnp.float32, None)
        )
        self.norm, self.table = layers.RMSNorm(4, rngs=rngs), nnx.Embed(3, 4, rngs=rngs)
        self.table.dtype = "bfloat16"

    def __call__(self, labels):
        half, whole, other = self.layers
        return other(whole(self.norm(half(self.table(labels)))))


def test_matrices_of_frozen_networks_wait_in_the_dtype_of_their_layers():
    network = Network(Some)
    params, rest = network.init(jax.random.key(0))
    found = load.as_computed(network, jax.device_get(params))
    assert found["layers"]["0"]["kernel"].dtype == found["table"]["embedding"].dtype == jnp.bfloat16
    for wide in (
        found["layers"]["1"]["kernel"],
        found["layers"]["2"]["kernel"],
        found["layers"]["0"]["bias"],
        found["norm"]["weight"],
    ):
        assert wide.dtype == jnp.float32
    labels = jnp.arange(3)
    expected = network(params, rest)(labels)
    np.testing.assert_array_equal(network(found, rest)(labels), expected)


@pytest.fixture
def tiny(config, monkeypatch):
    """Every work in a fraction of a second a step; LPIPS with narrow layers."""
    narrow = {
        name: tuple((number, 4) for number, _ in convs) for name, convs in lpips.SLICES.items()
    }
    monkeypatch.setattr(lpips, "SLICES", narrow)
    config.tokenizer.losses.update(l1=1.0, perceptual=1.0, gan=0.5, align=1.0)
    config.bench.update(warmup=1, batches=2, matmul=64)
    config.precision.preset = "exact"
    for name in workloads.TIMED:
        config.bench[name.replace("-", "_")].update(batch_size=2, steps=1)
    config.bench.features.batch_size = 1
    config.bench.precision_recall.update(reference=40, generated=50, channels=8)
    config.bench.data.update(images=6, batch_size=4)
    config.bench.feeding.update(sizes=(16,), workers=(1,), images=6, batch_size=4, steps=1)
    config.bench.feeding.update(seconds=0.05)
    return config


def bench_of(config, folder):
    return Session(config, Run(folder), devices=tuple(jax.devices()[:1]))


POSITIVE = (
    *("ms_per_step", "ms_per_step_min", "ms_per_step_max", "images_per_second", "dispatch_ms"),
    *("tflop_per_step", "tflop_per_second", "fraction_of_matmul", "warmup_seconds"),
)


OF_DATA = (
    *("ms_per_step", "ms_per_step_min", "ms_per_step_max", "images_per_second"),
    *("bare_images_per_second", "of_bare", "cpu_ms_per_image", "cpu_of_bare", "cores", "workers"),
)


@pytest.mark.slow
def test_every_work_has_a_row(tiny, tmp_path, capsys):
    validate(tiny)
    result = bench.run(bench_of(tiny, tmp_path))
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    by_name = {row["work"]: row for row in result["rows"]}
    assert list(by_name) == [
        *workloads.TIMED,
        *("precision-recall/f32", "precision-recall/f16_adm"),
        *("data/center", "data/random", "data/latents"),
        *("data/16px-jpeg-1", "data/16px-cache-1", "train-from-disk/tokenizer"),
    ]
    fed = by_name.pop("train-from-disk/tokenizer")
    assert fed["error"] is None
    for name in ("of_repeated", "of_resident", "images_per_second"):
        assert fed[name] > 0
    assert 0 <= fed["data_wait"] <= 1
    cached = by_name.pop("data/16px-cache-1")
    assert cached["error"] is None
    assert cached["images_per_second"] > 0
    for name, row in by_name.items():
        assert row["error"] is None
        of_host = name.startswith("data/")
        figures = [row[key] for key in (OF_DATA if of_host else POSITIVE)]
        assert np.all(np.isfinite(figures))
        assert min(figures) > 0
        assert row["ms_per_step_min"] <= row["ms_per_step"] <= row["ms_per_step_max"]
        assert row["repeats"] == (1 if name == "data/16px-jpeg-1" else 5)
        np.testing.assert_allclose(
            row["images_per_second"] * row["ms_per_step"], 1e3 * row["images_per_step"]
        )
        assert row["peak_memory_bytes"] is None  # the CPU does not count
        assert (row["compile_seconds"] is None) == (of_host or name.startswith("precision-recall"))
    # a backward pass costs twice the forward one
    train, forward = (by_name[name]["tflop_per_step"] for name in ("dit-train", "dit-forward"))
    assert 2.5 < train / forward <= 3
    # 3 points make 2 steps, and the last one follows
    np.testing.assert_allclose(
        by_name["sample-sde"]["tflop_per_step"], 3 * forward + by_name["decode"]["tflop_per_step"]
    )
    given, own = (
        by_name[name]["tflop_per_step"] for name in ("tokenizer-train", "tokenizer-train-teacher")
    )
    assert own > given > by_name["encode"]["tflop_per_step"] + by_name["decode"]["tflop_per_step"]
    assert result["platform"] == "cpu"
    assert result["jax"] == jax.__version__
    table = capsys.readouterr().out
    for word in (*by_name, "images/s", "TFLOP/s", "dispatch ms", "of bare"):
        assert word in table
    assert "ratio" not in table


@pytest.mark.slow  # the programs of the next test, timed
def test_steps_in_one_program_have_a_row(tiny, tmp_path, capsys):
    tiny.bench.update(works=("dit-train", "dit-forward"), chained=3)
    validate(tiny)
    trained, forward = bench.run(bench_of(tiny, tmp_path))["rows"]
    assert trained["chained_ms_per_step"] > 0
    np.testing.assert_allclose(
        trained["host_ms"], trained["ms_per_step"] - trained["chained_ms_per_step"]
    )
    assert "host_ms" not in forward  # it has no state that a next step would go on from
    assert "host ms" in capsys.readouterr().out


def test_steps_in_one_program_are_those_of_the_host(tiny, tmp_path):
    session = bench_of(tiny, tmp_path)
    work = workloads.timed_workload(tiny, "dit-train")
    step, shardings = jit_step(work, session.mesh)
    batch = put_batch(work.batch(np.random.default_rng(0)), session.mesh)
    key = jax.random.key(0)
    one, other = (init_state(work, shardings, 0) for _ in range(2))
    for _ in range(3):
        one, _ = step(one, batch, key, {}, work.phase)
    other = timing.chain(work, session.mesh, shardings, 3)(other, batch, key, {})
    assert int(other.step) == 3
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_failure_leaves_the_other_works_and_a_ratio_is_shown(tiny, tmp_path, capsys, monkeypatch):
    tiny.bench.works = ("dit-forward", "encode")
    (tmp_path / "old.json").write_text(
        json.dumps({"rows": [{"work": "encode", "error": None, "images_per_second": 1e-3}]})
    )
    tiny.bench.compare, tiny.bench.out = str(tmp_path / "old.json"), str(tmp_path / "new.json")

    def fail(config, size):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    # of the jaxpr and of the run alike
    monkeypatch.setitem(workloads.WORKLOADS, "dit-forward", fail)
    with pytest.raises(UserError, match="1 of 2 workloads failed: dit-forward"):
        bench.run(bench_of(tiny, tmp_path))
    failed, row = json.loads((tmp_path / "new.json").read_text())["rows"]
    assert failed["error"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert row["ratio"] == row["images_per_second"] / 1e-3
    table = capsys.readouterr().out
    assert "RESOURCE_EXHAUSTED" in table
    assert "ratio" in table


def test_a_callable_of_pytorch_is_timed_beside(tiny, tmp_path, monkeypatch):
    tiny.bench.works = ()
    file = tmp_path / "mine.py"
    file.write_text("def work():\n    return (lambda: sum(range(1000))), 8\n")
    tiny.bench.torch = f"{file}:work"
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(UserError, match="1 of 1 workload failed: torch"):
        bench.run(bench_of(tiny, tmp_path))
    torch = types.ModuleType("torch")
    torch.__spec__ = types.SimpleNamespace()
    torch.cuda = types.SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    (row,) = bench.run(bench_of(tiny, tmp_path))["rows"]
    assert row["images_per_step"] == 8
    assert row["images_per_second"] > 0
    assert row["tflop_per_second"] is None
    tiny.bench.torch = f"{file}:other"
    assert (
        "has no function other"
        in rows.attempt("bench", "torch", partial(bench.time_torch, bench_of(tiny, tmp_path)))[
            "error"
        ]
    )


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("works", ("dit",), r"bench\.works has \['dit'\]; known are dit-train"),
        ("repeats", 4, r"bench\.repeats is 4; it must be at least 5"),
        ("compare", "none.json", "bench.compare: there is no file none.json"),
    ],
)
def test_a_bad_section_is_refused(field, value, says, tiny):
    tiny.bench[field] = value
    check = partial(bench.read_other, value) if field == "compare" else partial(validate, tiny)
    with pytest.raises(ConfigError, match=says):
        check()


def test_inference_is_timed_in_bfloat16_unless_the_config_says_otherwise(config):
    def dtypes():
        made = workloads.with_timed_precision(config)
        return [settings(made, name)["dtype"] for name in ("encoder", "sampler", "decoder")]

    assert dtypes() == ["bfloat16"] * 3
    config.precision.override += ("decoder.dtype=float32",)
    assert dtypes() == ["bfloat16", "bfloat16", "float32"]
    config.precision.sample.dtype = "float32"
    assert dtypes() == ["bfloat16", "float32", "float32"]
    config.precision.preset = "exact"
    assert dtypes() == ["float32"] * 3
    encoder = workloads.timed_workload(config, "encode").frozen["network"]
    kernels = [leaf.dtype for leaf in jax.tree.leaves(encoder.abstract)]
    assert set(kernels) == {jnp.dtype("float32")}


def test_what_is_counted_has_neither_kernels_nor_recomputation(config):
    config.precision.train.update(remat="nothing_saveable", attention="cudnn", kernels="triton")
    config.precision.sample.matmuls = "fp8"
    for name in NETWORKS:
        how = settings(workloads.plain(config), name)
        plain = dict(remat="none", attention="xla", kernels="xla", matmuls="same")
        assert {k: v for k, v in how.items() if k in plain} == {
            k: v for k, v in plain.items() if k in how
        }, name


def test_the_command_ends_with_status_one_if_a_work_fails(tmp_path, capsys, monkeypatch):
    def fail(session, workload, operations, *, steps):
        raise RuntimeError("no memory")

    monkeypatch.setattr(timing, "time_workload", fail)
    arguments = [
        *("gae_jax", "bench", "--config=tests/small.py", f"--workdir={tmp_path}"),
        *("--config.bench.works=('encode',)", "--config.bench.matmul=32"),
    ]
    assert cli.main(arguments) == 1
    assert "encode" in capsys.readouterr().err


def test_the_photographs_are_as_large_as_imagenets_and_all_different():
    files = data.photographs(6, seed=0)
    assert len(set(files)) == 6
    assert files == data.photographs(6, seed=0)
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            assert (image.format, image.size) == ("JPEG", (500, 375))
        assert 20_000 < len(file) < 200_000


def test_both_loops_of_data_make_the_same_images(tmp_path):
    files = data.photographs(4, seed=0)
    data.write_images(tmp_path, files)
    images = ImageData("array_record", str(tmp_path), 0.0, 16, "center", False, "error", 0)
    (batch,) = images.ordered(images.source("train"), 4)
    bare = np.stack([cut(file, "center", 16, seed=0) for file in files])
    np.testing.assert_array_equal(batch["image"], bare)
    mirrored = {cut(files[0], "random", 16, seed=seed).tobytes() for seed in range(4)}
    assert len(mirrored) == 4


def test_the_best_of_each_loop_counts_and_cores_follow_from_their_time(tmp_path, monkeypatch):
    """20 ms of a core per image: 120 images/s take 2.4 cores."""
    pipeline = iter([(0.02, 0.03), (0.01, 0.02), (0.03, 0.025)])
    monkeypatch.setattr(data, "time_pipeline", lambda *_, warmup: data.Cost(*next(pipeline)))
    monkeypatch.setattr(
        data, "time_bare", lambda *_, workers, count, warmup: data.Cost(0.008, 0.018)
    )
    said = []
    row = data.time_data(
        *(tmp_path, "center"),
        **dict(image_size=16, images=8, batch_size=4, workers=2, rates=(120.0,)),
        **dict(repeats=3, seed=0, say=said.append),
    )
    wanted = dict(images_per_second=100, bare_images_per_second=125, of_bare=0.8, cpu_of_bare=0.9)
    wanted |= dict(ms_per_step=40, ms_per_step_max=120)
    np.testing.assert_allclose([row[key] for key in wanted], [*wanted.values()])
    np.testing.assert_allclose(row["cores_per_accelerator"]["120"], 2.4)
    assert said == ["center crop: 120 images/s for one accelerator need 2.4 cores like these"]
