"""The section ``precision``: presets, what networks override, what a run keeps, old fields."""

import json
import shutil

import pytest
import small

from gae_jax.commands.cli import main, parse
from gae_jax.commands.compare import compare
from gae_jax.config import default_config, precision
from gae_jax.config.precision import NETWORKS, settings, settle, shown_alike
from gae_jax.config.renamed import RENAMED, modern
from gae_jax.config.tools import run_file, set_field
from gae_jax.config.validate import validate
from gae_jax.run.recorded_config import __file__ as recorded_config_file
from gae_jax.run.recorded_config import get_config
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import write_json

PAPER = dict.fromkeys(NETWORKS, "float32") | {"diffusion": "bfloat16"}


def dtypes(config):
    return {name: settings(config, name)["dtype"] for name in NETWORKS}


def command_line(*flags, file="configs/gae_d32.py"):
    return parse(["gae_jax", "tokenizer", f"--config={file}", *flags])[1]


def test_presets_set_all_networks():
    assert dtypes(default_config()) == PAPER
    for preset, dtype in (("exact", "float32"), ("fast", "bfloat16")):
        config = command_line(f"--config.precision={preset}")
        validate(config)
        assert set(dtypes(config).values()) == {dtype}


def test_a_network_overrides_its_group_and_the_preset_in_any_order():
    flags = (
        *("--config.precision.decoder.dtype=float32", "--config.precision.frozen.dtype=float32"),
        *("--config.precision=fast", "--config.precision.train.remat=nothing_saveable"),
        "--config.precision.override=encoder.matmuls=fp8,tokenizer.remat=none",
    )
    for given in (flags, flags[::-1]):
        config = command_line(*given)
        validate(config)
        assert settings(config, "sampler") == precision.INFERENCE | {"dtype": "bfloat16"}
        assert settings(config, "decoder") == precision.INFERENCE
        assert settings(config, "encoder") == precision.INFERENCE | {"matmuls": "fp8"}
        assert settings(config, "align") == {"dtype": "float32"}
        assert settings(config, "tokenizer")["dtype"] == "bfloat16"
        remat = {name: settings(config, name)["remat"] for name in ("tokenizer", "diffusion")}
        assert remat == {"tokenizer": "none", "diffusion": "nothing_saveable"}


def test_overrides_of_the_command_line_are_added_to_those_of_the_file():
    flags = ("--config.precision.diffusion.attention", "xla", "--config.precision=auto")
    config = command_line(*flags, file="configs/aligntok.py")
    assert config.precision.override == ("tokenizer.dtype=bfloat16", "diffusion.attention=xla")
    flag = "--config.precision.tokenizer.dtype="
    for value in ("float32", "auto"):
        config = command_line(f"{flag}bfloat16", flag + value, file="configs/aligntok.py")
        assert settings(config, "tokenizer")["dtype"] == "float32"
    config = command_line(f"{flag}auto", "--config.precision.train.dtype=bfloat16")
    assert settings(config, "tokenizer")["dtype"] == "bfloat16"


def test_auto_is_as_the_paper_on_a_cpu_and_fast_where_training_was_shown_alike():
    config = default_config()
    assert settle(config, "cpu", {}) is config
    fast = dtypes(settle(config, "gpu", {}))
    assert {name for name in NETWORKS if fast[name] == "bfloat16"} == set(shown_alike(config))
    assert fast["sampler"] == fast["decoder"] == fast["encoder"] == "float32"
    assert dtypes(config) == PAPER
    config = command_line(file="configs/rae.py")
    assert settings(settle(config, "tpu", {}), "tokenizer")["dtype"] == "float32"
    config.precision.preset = "exact"
    assert settle(config, "tpu", {}) is config


@pytest.mark.parametrize("old", [False, True], ids=["recorded now", "by an older version"])
def test_a_stage_that_has_begun_keeps_its_numbers_on_another_device(old, tmp_path):
    config = small.get_config()
    how = {"tokenizer": {"dtype": "float32"}, "align": {"dtype": "float32"}}
    before = {"tokenizer": {"compute": {"dtype": "float32"}, "align": {"dtype": "float32"}}}
    for name in ("tokenizer", "teacher"):
        (tmp_path / name).mkdir()
    recorded = before if old else {"precision": how}
    write_json(tmp_path / "tokenizer/config.json", {"config": recorded, "inputs": {}})
    (tmp_path / "teacher/config.json").write_text("{damaged")
    session = Session.start(config, tmp_path, platform="gpu")
    assert dtypes(session.config)["tokenizer"] == dtypes(session.config)["align"] == "float32"
    assert dtypes(session.config)["perceptual"] == "bfloat16"  # the run does not say
    assert dtypes(session.config)["teacher"] == "bfloat16"
    again = Session.start(config, tmp_path, platform="gpu", fresh=True)
    assert dtypes(again.config)["tokenizer"] == "bfloat16"
    config.precision.preset = "exact"
    assert Session.start(config, tmp_path, platform="gpu").config is config


def run_with(tmp_path, **networks):
    """The directory of a run whose stages recorded these settings, and its config's name."""
    for stage in {NETWORKS[name].stage for name in networks}:
        (tmp_path / stage).mkdir(exist_ok=True)
        how = {name: how for name, how in networks.items() if NETWORKS[name].stage == stage}
        content = {"config": {"precision": how}, "inputs": {}}
        write_json(tmp_path / stage / "config.json", content)
    return {"config_file": f"{recorded_config_file}:{tmp_path}"}


def test_the_config_of_a_run_computes_as_it_recorded_unless_another_precision_is_asked(tmp_path):
    how = dict(dtype="bfloat16", remat="nothing_saveable", attention="xla", kernels="auto")
    exact = dict(dtype="float32")
    more = run_with(tmp_path, tokenizer=how, align=exact, encoder=exact | dict(matmuls="fp8"))
    config = get_config(str(tmp_path))
    assert settings(config, "tokenizer") == how
    for platform in ("cpu", "gpu"):
        started = Session.start(config, tmp_path, platform=platform, **more).config
        assert settings(started, "tokenizer") == how
        assert settings(started, "encoder") == precision.INFERENCE | {"matmuls": "fp8"}
        fresh = Session.start(config, tmp_path, platform=platform, fresh=True, **more).config
        assert settings(fresh, "tokenizer") == how
    started = Session.start(config, tmp_path, platform="cpu", **more).config
    there = settle(started, "tpu", {})  # as `plan` settles for its target
    assert settings(there, "tokenizer") == how
    assert settings(there, "align") == exact
    assert settings(there, "perceptual")["dtype"] == "bfloat16"  # the run does not say
    config.precision.preset = "exact"
    started = Session.start(config, tmp_path, platform="gpu", **more).config
    assert settings(started, "tokenizer") == how | {"dtype": "float32"}
    config.precision.update(preset="auto")
    set_field(config, "precision.tokenizer.dtype", "float32")
    set_field(config, "precision.encoder.matmuls", "same")
    started = Session.start(config, tmp_path, platform="gpu", **more).config
    assert settings(started, "tokenizer") == how | {"dtype": "float32"}
    assert settings(started, "encoder") == precision.INFERENCE


def test_a_reference_without_its_images_is_refused_before_anything_is_thrown_away(tmp_path):
    config = small.get_config()
    config.data.update(name="folder", root=str(tmp_path / "moved"))
    with pytest.raises(UserError, match="moved"):
        Session.start(config, tmp_path, fresh=True).check(("reference",))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("preset", "fats", "precision.preset is 'fats'; use one of auto, exact, fast"),
        ("train.dtype", "fp16", "precision.train.dtype is 'fp16'; use one of auto, float32, bfl"),
        ("sample.matmuls", "fp4", "precision.sample.matmuls is 'fp4'; use one of same, fp8"),
        ("override", ("fast",), r"has 'fast'; give NETWORK\.FIELD=VALUE.*; align: dtype; encoder"),
        ("override", ("aling.dtype=float32",), r"no network 'aling' \(did you mean align\?\)"),
        ("override", ("align.remat=none",), "align has the fields dtype$"),
        ("override", ("encoder.matmuls=fp4",), "'encoder.matmuls=fp4'; use one of same, fp8"),
    ],
)
def test_unknown_names_are_refused(path, value, says):
    config = default_config()
    config.update_from_flattened_dict({f"precision.{path}": value})
    with pytest.raises(ConfigError, match=says):
        validate(config)
    settle(config, "gpu", {})  # before it is validated


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.precision=fats", "precision.preset is 'fats'"),
        ("--config.precision.tokeniser.dtype=float32", "did you mean tokenizer?"),
        ("--config.precision.align=float32", "one of its fields: --config.precision.align.dtype"),
        (
            "--config.diffusion.compute=x",
            "diffusion.compute.remat is now set by --config.precision",
        ),
        ("--config.tokenizer.compute.dtype=x", "--config.precision.tokenizer.dtype=VALUE"),
        ("--config.sample.dtype=x", "precision.sampler.dtype=VALUE and --config.precision.decoder"),
        ("--config.diffusion.compute.accumulate=2", "is now diffusion.train.accumulate"),
        ("--config.precision.frozen.products=fp8", "is now precision.frozen.matmuls"),
        ("--config.latents.encode_products=fp8", "--config.precision.encoder.matmuls=VALUE"),
    ],
)
def test_an_unknown_or_old_field_ends_the_command_with_one_line(flag, says, tmp_path, capsys):
    flags = ("--config=configs/demo.py", f"--workdir={tmp_path}", flag)
    assert main(["gae_jax", "demo", *flags]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('config.diffusion.compute.dtype = "bfloat16"', '"diffusion.dtype=VALUE",'),
        ('section = config.teacher; section.compute.dtype = "x"', '"teacher.dtype=VALUE",'),
        ("config.tokenizer.compute.accumulate = 4", "tokenizer.train.accumulate"),
        ('config.latents.update(\n        encode_dtype="x")', '"encoder.dtype=VALUE",'),
        ('config.sample.update(dtype="x")', '"sampler.dtype=VALUE", "decoder.dtype=VALUE",'),
        ('config.tokenizer.perceptual.update(dtype="x")', '"perceptual.dtype=VALUE",'),
    ],
)
def test_a_file_that_sets_an_old_field_is_told_the_new_one(line, says, tmp_path, capsys):
    start = "from gae_jax.config import default_config\n"
    file = tmp_path / "mine.py"
    body = f"    config = default_config()\n    {line}\n    return config\n"
    file.write_text(f"{start}def get_config():\n{body}")
    assert main(["gae_jax", "tokenizer", f"--config={file}", f"--workdir={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert "mine.py, line 4: " in error


@pytest.mark.parametrize(
    "line", ["config.latents.dtype = config.nothing", 'config.latents.update(dtype="x", shards=2)']
)
def test_other_errors_of_a_file_are_not_taken_for_an_old_field(line, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        f"from gae_jax.config import default_config\nconfig = default_config()\n{line}\n"
    )
    with pytest.raises(ConfigError, match=r"line 3: (?!.* is now)"):
        run_file(file, "mine")


def test_every_old_field_has_new_ones_that_can_be_set():
    for old, paths in RENAMED.items():
        for path in paths:
            config = default_config()
            values = {".train.accumulate": 4, ".dtype": "bfloat16", ".matmuls": "fp8"}
            value = next((v for end, v in values.items() if path.endswith(end)), None)
            if value is None:
                others = {"remat": "nothing_saveable", "precision": "default", "split": "train"}
                others |= {"images": 5, "dinov2": True, "backbone": 1.5}
                value = others.get(path.rpartition(".")[2], "xla")
            set_field(config, path, value)
            validate(config)
        with pytest.raises(ConfigError, match=f"{old} is (now|gone)"):
            set_field(default_config(), old, "float32")


def test_what_an_older_version_recorded_is_read():
    old = {
        "seed": 0,
        "teacher": {"kind": "learned", "backbone": {"dtype": "bfloat16", "attention": "xla"}},
        "sample": {"per_class": 2, "dtype": "bfloat16", "products": "fp8", "attention": "xla"},
        "tokenizer": {"compute": {"remat": "none", "accumulate": 2}, "train": {"steps": 3}},
    }
    before = json.dumps(old)
    assert modern(old) == {
        "seed": 0,
        "teacher": {"kind": "learned"},
        "sample": {"per_class": 2},
        "tokenizer": {"train": {"steps": 3, "accumulate": 2}},
        "precision": {
            "backbone": {"dtype": "bfloat16", "attention": "xla"},
            "sampler": {"dtype": "bfloat16", "matmuls": "fp8", "attention": "xla"},
            "decoder": {"dtype": "bfloat16"},
            "tokenizer": {"remat": "none"},
        },
    }
    assert json.dumps(old) == before
    assert modern(modern(old)) == modern(old)


def test_a_precision_that_a_stage_did_not_have_is_refused_with_its_fields(small_run, capsys):
    command = ["gae_jax", "tokenizer", str(small_run)]
    assert main([*command, "--config.precision=fast"]) == 1
    error = capsys.readouterr().err
    assert "precision.tokenizer.dtype: 'float32' there, 'bfloat16' asked for" in error
    keep = [f"--config.precision.{name}.dtype=float32" for name in ("tokenizer", "perceptual")]
    assert main([*command, "--config.precision=fast", *keep]) == 1
    error = capsys.readouterr().err
    assert "precision.align.dtype" in error
    assert "precision.tokenizer.dtype" not in error
    keep.append("--config.precision.align.dtype=float32")
    assert main([*command, "--config.precision=fast", *keep]) == 0
    assert main([*command, "--config.precision=auto"]) == 0


def test_a_run_of_an_older_version_is_found_finished(small_run, tmp_path, capsys):
    """Its config.json as it was written before there was one section for all networks."""
    run = shutil.copytree(small_run, tmp_path / "run")
    for name in ("teacher", "tokenizer", "latents", "diffusion", "sample"):
        file = run / name / "config.json"
        content = json.loads(file.read_text())
        content["config"] = as_older(content["config"])
        file.write_text(json.dumps(content))
    for command in ("teacher", "tokenizer", "latents", "diffusion", "sample"):
        flags = [f"--config={small.__file__}", f"--workdir={run}"]
        assert main(["gae_jax", command, *flags]) == 0, capsys.readouterr().err
    assert settings(get_config(str(run)), "diffusion")["dtype"] == "float32"
    flags.append("--config.precision.diffusion.dtype=bfloat16")
    assert main(["gae_jax", "diffusion", *flags]) == 1
    said = capsys.readouterr().err
    assert "precision.diffusion.dtype: 'float32' there, 'bfloat16' asked for" in said
    assert Run(run).stage("sample").config.precision.sampler.dtype == "float32"


def as_older(sections):
    """Sections of a config as an older version recorded them."""
    sections = json.loads(json.dumps(sections))
    networks = sections.pop("precision", {})
    for old, (path, *_) in ((old, paths) for old, paths in RENAMED.items() if paths):
        value = networks if path.startswith("precision.") else sections
        *parents, leaf = path.removeprefix("precision.").split(".")
        for name in parents:
            value = value.get(name, {})
        if leaf not in value or old.startswith(("precision.", "bench.")):
            continue
        *above, last = old.split(".")
        section = sections
        for name in above:
            section = section.setdefault(name, {})
        section[last] = value.pop(leaf) if ".train." in path else value[leaf]
    return sections


def test_run_file_names_the_file_of_an_old_field(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from gae_jax.config import default_config\nconfig = default_config()\n"
        "config.bench.dtype = 'float32'\n"
    )
    with pytest.raises(ConfigError, match=r"line 3: bench\.dtype is now set by --config\.prec"):
        run_file(file, "mine")


def test_a_result_of_an_older_version_is_compared_by_the_names_of_now(tmp_path):
    def written(name, **facts):
        write_json(tmp_path / name, {"generation": {"ode": {"fid": 3.0, "sampling": facts}}})
        return tmp_path / name

    old = written("old.json", dtype="bfloat16", products="fp8", decode_products="same")
    now = dict(dtype="bfloat16", matmuls="fp8", decoder_dtype="bfloat16", decoder_matmuls="same")
    assert compare(old, written("now.json", **now))[1]
    text, same = compare(old, written("other.json", **now | {"decoder_dtype": "float32"}))
    assert not same
    assert "generation.ode.sampling.decoder_dtype" in text
