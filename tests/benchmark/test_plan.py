"""Plans: traffic of programs in closed form, and every stage's step on fake devices."""

import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_schedule
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from small import get_config

from gae_jax.benchmark import ahead, rows, targets, workloads
from gae_jax.benchmark.chips import CHIPS, KINDS, Chip, chip_of
from gae_jax.benchmark.collectives import Program
from gae_jax.benchmark.workloads import Input, Workload, arguments_of, make_workload
from gae_jax.commands import cli, plan
from gae_jax.config import default_config
from gae_jax.config.precision import settings
from gae_jax.config.tools import set_field
from gae_jax.config.validate import validate
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime import machines, sharding
from gae_jax.runtime import mesh as parallel
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.train.state import TrainState

CHIP = Chip(flops=1e12, memory=2**30, memory_rate=1e9, link_rate=1e8, source="made up")
no_libtpu = importlib.util.find_spec("libtpu") is None


def mesh_of(data=1, fsdp=8):
    return parallel.make_mesh(data, fsdp, 1, devices=jax.devices()[: data * fsdp])


def traffic_of(function, mesh, *arguments, out=None):
    """{(kind, axes): (count, bytes)} of a function of arrays (shape, spec)."""
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    out = NamedSharding(mesh, out) if out is not None else None
    compiled = jax.jit(function, out_shardings=out).lower(*given).compile()
    rows = ahead.traffic(compiled, mesh)["collectives"]
    return {(row["kind"], tuple(row["axes"])): (row["count"], row["sent"]) for row in rows}


def test_a_product_over_a_sharded_axis_is_one_all_reduce():
    found = traffic_of(
        jnp.matmul, mesh_of(), ((8, 64), P(None, "fsdp")), ((64, 32), P("fsdp", None)), out=P()
    )
    assert found == {("all-reduce", ("fsdp",)): (1, 2 * (8 * 32 * 4) * 7 / 8)}


def test_a_sharded_weight_is_gathered():
    mesh = mesh_of(data=2, fsdp=4)

    def layer(x, w):
        return x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))

    rows = P(("data", "fsdp"), None)
    found = traffic_of(layer, mesh, ((8, 64), rows), ((64, 32), P("fsdp", None)), out=rows)
    assert found == {("all-gather", ("fsdp",)): (1, 64 * 32 * 4 * 3 / 4)}


def test_a_loop_counts_as_often_as_it_turns():
    mesh = mesh_of(data=2, fsdp=4)

    def repeated(x):
        one = jax.shard_map(
            lambda x: jax.lax.psum(jnp.sin(x), "data"), mesh=mesh, in_specs=P(), out_specs=P()
        )
        return jax.lax.scan(lambda c, _: (one(c), None), x, None, length=5)[0]

    found = traffic_of(repeated, mesh, ((16,), P()), out=P())
    assert found == {("all-reduce", ("data",)): (5, 5 * 2 * 64 / 2)}


@pytest.mark.parametrize(
    ("name", "call", "out", "sent"),
    [
        (
            "reduce-scatter",
            partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True),
            P("fsdp"),
            64 * 4 * 7 / 8,
        ),
        (
            "all-to-all",
            partial(jax.lax.all_to_all, axis_name="fsdp", split_axis=0, concat_axis=0, tiled=True),
            P("fsdp"),
            64 * 4 * 7 / 8,
        ),
        # three of eight devices send
        (
            "collective-permute",
            partial(jax.lax.ppermute, axis_name="fsdp", perm=[(0, 1), (1, 2), (5, 0)]),
            P("fsdp"),
            64 * 4 * 3 / 8,
        ),
    ],
)
def test_other_kinds(name, call, out, sent):
    mesh = mesh_of()
    function = jax.shard_map(call, mesh=mesh, in_specs=P("fsdp"), out_specs=out)
    found = traffic_of(function, mesh, ((8 * 64,), P("fsdp")), out=out)
    assert found == {(name, ("fsdp",)): (1, pytest.approx(sent))}


# As libtpu prints: groups by axes, a loop of windows that counts by twos, a collective that is
# spread over two fusions, and an all-reduce of which a part is kept.
TPU = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0:T(256)} parameter(0)
  %all-reduce.9 = f32[64]{0:T(256)} all-reduce(%p), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %cut = f32[16]{0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={16}
}

%async_collective_fusion.1 (p.1: bf16[4,8]) -> bf16[32,8] {
  ROOT %all-gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=2, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (p.2: bf16[4,8]) -> bf16[32,8] {
  ROOT %all-gather.2 = bf16[32,8]{1,0} all-gather(%p.2), channel_id=2, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%body (t: (f32[16], u32[])) -> (f32[16], u32[]) {
  %t = (f32[16]{0}, u32[]{:T(128)}) parameter(0)
  %x = f32[16]{0:T(128)S(1)} get-tuple-element(%t), index=0
  %i = u32[]{:T(128)} get-tuple-element(%t), index=1
  %two = u32[]{:T(128)} constant(2)
  %f = bf16[32,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %start = (f32[16]{0:T(128)S(1)}, f32[16]{0:T(128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=5, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %done = f32[16]{0:T(128)S(1)} collective-permute-done(%start)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (f32[16]{0}, u32[]{:T(128)}) tuple(%done, %next)
}

%cond (t.1: (f32[16], u32[])) -> pred[] {
  %t.1 = (f32[16]{0}, u32[]{:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%t.1), index=1
  %end = u32[]{:T(128)} constant(START)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (w: bf16[4,8], y: f32[64]) -> f32[16] {
  %w = bf16[4,8]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %f.1 = bf16[32,8]{1,0} fusion(%w), kind=kCustom, calls=%async_collective_fusion.1
  %part = f32[16]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %one = f32[16]{0} all-reduce(%part), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %two = f32[16]{0} all-reduce(%one), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %zero = u32[]{:T(128)} constant(1)
  %in = (f32[16]{0}, u32[]{:T(128)}) tuple(%part, %zero)
  %loop = (f32[16]{0}, u32[]{:T(128)}) while(%in), condition=%cond, body=%body
  %alone = f32[64]{0} all-reduce(%y), channel_id=1, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %r = f32[16]{0} get-tuple-element(%loop), index=0
}
"""  # noqa: E501


def test_the_text_of_a_tpu_program():
    program = Program(TPU.replace("START", "8"))
    rows = program.collectives({"data": 2, "fsdp": 4, "tensor": 1})
    found = {row.kind: (row.axes, row.count, row.sent) for row in rows}
    assert found == {
        "all-gather": (("data", "fsdp"), 1, 32 * 8 * 2 * 7 / 8),  # of three texts one
        "reduce-scatter": (("fsdp",), 1, 64 * 4 * 3 / 4),
        "all-reduce": (("data",), 2, 2 * 2 * 16 * 4 / 2),  # two of one channel
        "collective-permute": (("fsdp",), 4, 4 * 16 * 4),  # 1, 3, 5, 7
    }
    assert not program.unknown_loops
    endless = Program(TPU.replace("constant(START)", "parameter(0)"))
    counts = {row.kind: row.count for row in endless.collectives({"data": 2, "fsdp": 4})}
    assert counts["collective-permute"] == 1
    assert len(endless.unknown_loops) == 1


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{}", ("data", "fsdp")),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[2,4]<=[8]", ("fsdp",)),
        ("mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("mesh['a'=2,'b'=2,'c'=2] {'b','c'}", ("fsdp",)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ("fsdp",)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", ("data",)),
        ("mesh['a'=8] {'a':(1)2}", ("data",)),
        ("mesh['a'=8] {'a':(2)4}", ("fsdp",)),
        ("mesh['a'=8] {'a':(1)2, 'a':(2)4}", ("data", "fsdp")),
        ("of another kind", ()),
    ],
)
def test_axes_of_groups(groups, axes):
    text = (
        "ENTRY %main (x: f32[8]) -> f32[8] {\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, "
        "use_global_device_ids=true\n}\n"
    )
    rows = Program(text).collectives({"data": 2, "fsdp": 4})
    assert [row.axes for row in rows] == [axes]


def test_the_estimate_is_the_longest_of_three_times():
    given = dict(flops=4e12, xla_flops=2e12, accessed=1e9, sent=3e8, images=10, chip=CHIP)
    found = ahead.estimate(**given)
    assert found["seconds"] == {"compute": 4.0, "memory": 2.0, "links": pytest.approx(3.0)}
    assert (found["bound"], found["loop_factor"]) == ("compute", 2.0)
    assert found["images_per_second"] == 2.5
    assert ahead.estimate(**(given | {"sent": 1e9}))["bound"] == "links"
    # what XLA counts more than the trace does not make its bytes fewer
    assert ahead.estimate(**(given | {"xla_flops": 8e12}))["seconds"]["memory"] == 1.0


def test_what_does_not_fit_is_read_from_the_compilers_words():
    said = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert ahead.too_large(RuntimeError(said)) == (int(20.5 * 2**30), int(15.75 * 2**30))
    other = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.18G) exceeds available HBM (15.75G)."
    )
    assert ahead.too_large(RuntimeError(other))[0] == int(16.18 * 2**30)
    assert ahead.too_large(RuntimeError("something else")) is None
    fits = {"capacity": 2**30, "fits": True, "spare": 2**29}
    assert ahead.against(2**29, CHIP) == fits
    assert ahead.against(2**31, CHIP)["fits"] is False
    assert ahead.against(2**31, None)["fits"] is None


def test_bytes_of_a_layout():
    mesh = mesh_of(data=2, fsdp=4)

    def of(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    found = ahead.layout({"a": of((8, 9), P("fsdp", None)), "b": of((18,), P())})
    assert found == {"bytes": 90 * 4, "bytes_per_device": 36 * 4, "unsharded_share": 18 / 90}
    assert ahead.layout({})["unsharded_share"] == 0


def linear(donate=True):
    """A work whose state is a matrix and a step; ``donate=False`` gives back no state."""

    def init(key):
        params = {"net": {"qkv": jnp.zeros((256, 256))}}
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, rest={}, opt={}, ema={})

    def step(state, batch, key, frozen, phase):
        kernel = state.params["net"]["qkv"]
        loss, grad = jax.value_and_grad(lambda k: jnp.sum((batch["x"] @ k) ** 2))(kernel)
        params = {"net": {"qkv": kernel - grad}}
        return TrainState(state.step + 1, params, {}, {}, {}), loss

    x = Input((16, 256), np.float32, lambda random, shape: np.zeros(shape))
    return Workload(16, init, step, {"x": x})


def test_the_state_is_donated(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", ((r"qkv$", P("fsdp", None)), (r"step$", P())))
    monkeypatch.setattr(sharding.spec_of, "__defaults__", (sharding.RULES,))
    monkeypatch.setattr(sharding.shard, "__defaults__", (sharding.RULES,))
    mesh, work = mesh_of(), linear()
    state = ahead.placed(work, mesh)[0]
    held = ahead.layout(state)["bytes_per_device"]
    assert held == 256 * 256 * 4 / 8 + 4
    found = ahead.compile_step(work, mesh)
    assert plan.donated(found.compiled, held) is True
    assert plan.donated(found.compiled, 0) is None
    assert ahead.memory(found.compiled, CHIP)["aliased"] == held
    kept = jax.jit(work.step, static_argnums=4)
    compiled = kept.lower(*ahead.placed(work, mesh), None).compile()
    assert plan.donated(compiled, held) is False
    total = ahead.memory(compiled, None)["total"] - ahead.memory(found.compiled, None)["total"]
    assert total > 0.9 * held  # the new state lies beside the old one


WORKS = ("backbone", "teacher", "tokenizer", "latents", "diffusion")


@pytest.fixture
def sharded(config, monkeypatch):
    """A config whose small leaves are sharded as large ones are, on eight devices."""
    monkeypatch.setattr(sharding, "SMALL", 64)
    config.plan.update(topology="cpu:8", works=("latents", "diffusion"), batch_size=32, images=100)
    config.mesh.update(data=2, fsdp=4)
    return config


def test_a_plan_of_stages(sharded, tmp_path, capsys, monkeypatch):
    sharded.plan.throughput.diffusion = 2.0
    sharded.data.mirror = True
    monkeypatch.setattr(
        Session, "mesh", property(lambda self: pytest.fail("the devices were asked for"))
    )
    monkeypatch.setitem(targets.CHIPS, "cpu", CHIP)
    monkeypatch.setattr(targets, "_read", lambda topology: ("cpu", "8", 8))
    cli.run_command("plan", Session(sharded, Run(tmp_path)))
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert (result["devices"], result["compiler"]) == (8, "cpu")
    latents, diffusion = result["rows"]
    assert latents["error"] is diffusion["error"] is None

    # images x views x h x w x d x fp32
    assert latents["disk_bytes"] == 100 * 2 * 4 * 4 * 4 * 4
    assert (latents["images"], latents["steps"]) == (100, 4)
    assert latents["donated"] is None
    assert latents["parameters"] == {}

    work = make_workload(sharded, "diffusion", 32)
    state = arguments_of(work)[0]
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in state.params.items()
    }
    assert diffusion["parameters"] == sizes
    held, size = diffusion["state"], 4 * sizes["diffusion"]
    assert held["bytes"] >= 4 * size  # parameters, two moments, average
    assert held["unsharded_share"] < 0.2
    np.testing.assert_allclose(
        held["bytes_per_device"],
        held["bytes"] * (held["unsharded_share"] + (1 - held["unsharded_share"]) / 4),
    )
    assert diffusion["donated"] is True
    assert diffusion["memory"]["aliased"] >= 0.99 * held["bytes_per_device"]
    assert diffusion["memory"]["fits"] is True
    assert diffusion["images"] == 6 * 32
    assert diffusion["hours_at_throughput"] == 6 * 32 / 2 / 3600
    assert diffusion["disk_bytes"] == 2 * held["bytes"]
    axes = {axis for row in diffusion["collectives"] for axis in row["axes"]}
    assert axes == {"data", "fsdp"}
    # gradients meet over all devices: no less than a ring sends of the sharded ones
    assert diffusion["sent_bytes_per_device"] > size / 4
    assert diffusion["model_tflop_per_step"] > 0
    found = diffusion["estimate"]
    assert found["images_per_second"] == pytest.approx(32 * found["steps_per_second"])
    assert found["hours"] == pytest.approx(6 * 32 / found["images_per_second"] / 3600)
    shown = capsys.readouterr().out
    for word in ("latents", "diffusion", "ESTIMATE", "instead of the chips", "all-reduce"):
        assert word in shown
    assert "--config.mesh.data=2 --config.mesh.fsdp=4" in shown


def test_every_stage_has_a_step(config):
    assert workloads.stages_of(config) == workloads.STAGES
    for name in WORKS:
        work = make_workload(config, name, 16)
        new, _ = jax.eval_shape(
            lambda *arrays, work=work: work.step(*arrays, work.phase), *arguments_of(work)
        )
        assert jax.tree.structure(new) == jax.tree.structure(arguments_of(work)[0])
    assert workloads.batch_size_of(config, "latents") == 64
    assert workloads.batch_size_of(config, "sample-ode") == 8
    assert plan.images_of(config, "sample-ode", 8, 0) == 2 * 10
    config.sample.classes = (1, 2, 3)
    assert plan.images_of(config, "sample-sde", 8, 0) == 2 * 3
    config.sample.sets, config.teacher.kind = ("ode",), "svd"
    assert "sample-sde" not in workloads.stages_of(config)
    assert "teacher" not in workloads.stages_of(config)
    assert workloads.stages_of(default_config())[0] == "teacher"


def test_a_failure_leaves_the_other_works(sharded, tmp_path, capsys, monkeypatch):
    def fail(config, size):
        raise RuntimeError("no such thing\nmore")

    def too_large(work, mesh):
        raise RuntimeError("Used 20.50G of 15.75G hbm")

    monkeypatch.setitem(workloads.WORKLOADS, "latents", fail)
    monkeypatch.setattr(ahead, "compile_step", too_large)
    with pytest.raises(UserError, match="1 of 2 workloads failed: latents"):
        plan.run(Session(sharded, Run(tmp_path)))
    failed, row = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert failed["error"] == "RuntimeError: no such thing"
    assert row["memory"]["fits"] is False
    assert row["memory"]["spare"] == int(15.75 * 2**30) - int(20.5 * 2**30)
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("topology", "v5e-17", r"'v5e-17'; use a machine \(v4-8, .* or CHIP:SHAPE with one of v4,"),
        ("topology", "v9:2x2", "'v9:2x2'; use a machine"),
        ("topology", "cpu:0", "which has no devices"),
        ("topology", "cpu:16", "started with 8 CPU devices"),
        ("topology", "cpu:4", "does not fit 4 devices"),
        ("works", ("dit",), r"\['dit'\]; this config has backbone, teacher, tokenizer"),
        ("batch_size", -1, r"plan\.batch_size is -1"),
    ],
)
def test_a_bad_section_is_refused(field, value, says, sharded, tmp_path):
    sharded.plan[field] = value
    with pytest.raises(ConfigError, match=says):
        cli.run_command("plan", Session(sharded, Run(tmp_path)))
    assert not (tmp_path / "plan.json").exists()


def test_a_batch_that_does_not_divide_is_the_works_error(sharded):
    target = targets.target_of("cpu:8", sharded.mesh)
    sharded.plan.batch_size = 12
    error = rows.attempt("plan", "latents", lambda: plan.plan_stage(sharded, "latents", target))
    assert "12 does not divide over 8 devices" in error["error"]
    sharded.plan.batch_size, sharded.diffusion.train.accumulate = 16, 4
    error = rows.attempt("plan", "diffusion", lambda: plan.plan_stage(sharded, "diffusion", target))
    assert "accumulate 4 = 4" in error["error"]


def test_without_libtpu_the_remedy_is_told(config, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'v5e:4x4 needs libtpu.*pip install "jax\[tpu\]=='):
        targets.target_of("v5e-16", config.mesh)


def test_presets_by_name():
    assert machines.mesh_of("v5p-64") == {"data": 2, "fsdp": 16, "tensor": 1}
    with pytest.raises(ConfigError, match=r"'v5p-63' \(did you mean v5p-64\?\); known are v4-8, "):
        machines.mesh_of("v5p-63")


def test_a_preset_gives_way_to_a_mesh_and_sets_its_fields(config, monkeypatch):
    fields = {"precision.diffusion.remat": "nothing_saveable", "diffusion.train.accumulate": 2}
    machine = machines.Machine("cpu:8", 2, 4, compute=fields)
    monkeypatch.setitem(machines.MACHINES, "mine", machine)
    target = targets.target_of("mine", config.mesh)
    assert dict(target.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    made, recommended = plan.config_for(config, target)
    assert (made.diffusion.train.accumulate, config.diffusion.train.accumulate) == (2, 1)
    how = settings(made, "diffusion")
    assert [how["attention"], how["kernels"], how["remat"]] == ["xla", "xla", "nothing_saveable"]
    flags = plan.flags_of(target, recommended)
    assert flags.endswith(" ".join(f"--config.{path}={value}" for path, value in fields.items()))
    asked = cli.parse(["gae_jax", "plan", "--config=configs/gae_d32.py", *flags.split()])[1]
    assert settings(asked, "diffusion")["remat"] == "nothing_saveable"
    assert asked.diffusion.train.accumulate == 2
    config.mesh.fsdp = 8
    assert targets.target_of("mine", config.mesh).mesh.shape["fsdp"] == 8
    here = targets.target_of("", config.mesh)
    assert (here.mesh.size, here.chip, here.here) == (8, None, True)
    assert settings(plan.config_for(config, here)[0], "diffusion")["attention"] == "auto"
    config.precision.override += ("tokenizer.attention=cudnn",)
    tpu = targets.Target("v5e:2x2", target.mesh, "tpu", CHIPS["v5e"])
    with pytest.raises(ConfigError, match=r"precision\.tokenizer\.attention is 'cudnn'"):
        plan.config_for(config, tpu)


def test_chips_by_kind():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("cpu") is None
    assert set(KINDS.values()) == set(CHIPS)


@pytest.fixture(scope="module")
def states():
    """States of the stages that train, at the paper's widths, with few layers to trace soon."""
    config = default_config()
    config.backbone.dinov2.num_hidden_layers = config.tokenizer.model.num_layers = 3
    config.diffusion.model.depth = 3
    return {
        name: arguments_of(make_workload(config, name, 16))[0]
        for name in ("teacher", "tokenizer", "diffusion")
    }


@pytest.mark.parametrize("name", machines.MACHINES)
def test_a_presets_mesh_fits_its_devices_and_leaves_little_whole(name, states):
    found = machines.MACHINES[name]
    _, _, count = targets._read(found.topology)
    sizes = machines.mesh_of(name)
    assert count * found.slices == sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    assert 1024 % (sizes["data"] * sizes["fsdp"]) == 0
    config = default_config()
    for path, value in found.compute.items():
        set_field(config, path, value)
    validate(config)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    for stage in ("tokenizer", "diffusion"):
        parallel.check_batch(1024 // config[stage].train.accumulate, mesh, name)
    if sizes["fsdp"] > 1:
        for stage, state in states.items():
            placed = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                state,
                sharding.shard(state, mesh),
            )
            assert ahead.layout(placed)["unsharded_share"] < 0.02, stage


@pytest.mark.skipif(no_libtpu, reason='compiling for TPUs needs libtpu: pip install "jax[tpu]"')
def test_a_plan_for_a_tpu(monkeypatch, tmp_path):
    monkeypatch.setattr(sharding, "SMALL", 64)
    config = get_config()
    config.plan.update(topology="v5e:2x2", works=("diffusion",), batch_size=16)
    config.mesh.fsdp = 4
    with pytest.raises(ConfigError, match="which libtpu refuses"):
        targets.target_of("v5e:3x5", config.mesh)
    result = plan.run(Session(config, Run(tmp_path)))
    assert (result["compiler"], result["device"]) == ("tpu", "TPU v5 lite")
    (row,) = result["rows"]
    assert row["error"] is None
    assert row["donated"] is True
    assert row["memory"]["fits"] is True
    assert row["memory"]["capacity"] == 16 * 2**30
    assert {tuple(found["axes"]) for found in row["collectives"]} == {("fsdp",)}
    assert row["unknown_loops"] == 0
    workload = make_workload(config, "diffusion", 16)
    target = targets.target_of("v5e:2x2", config.mesh)
    text = ahead.compile_step(workload, target.mesh).compiled.as_text()
    assert tpu_schedule.read(text, 4).cycles["products"] > 0
    assert row["estimate"]["bound"] in ("compute", "memory", "links")
