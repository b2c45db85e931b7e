"""The command line: help that suffices, errors that say what to type."""

import shlex
import shutil
import sys

import pytest
import small
from conftest import ROOT

from gae_jax.commands import cli, draw, evaluate_samples, prepare_data, table
from gae_jax.config import flatten
from gae_jax.run import recorded_config as run_config
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json, write_json

DEMO = f"--config={ROOT}/configs/demo.py"


def parse(*arguments):
    return cli.parse(["gae_jax", *arguments])


def test_help_names_every_command_and_option(capsys):
    assert cli.main(["gae_jax", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (*table.COMMANDS, "demo", "--config", "--workdir", "--fresh"):
        assert word in text
    assert cli.main(["gae_jax"]) == 0


def test_overrides_reach_the_config():
    command, config, workdir, more = parse(
        "tokenizer", DEMO, "--config.tokenizer.losses.align=0.25", "--workdir=here", "--fresh"
    )
    assert (command, workdir, more["fresh"]) == ("tokenizer", "here", True)
    assert config.tokenizer.losses.align == 0.25
    assert parse("demo", DEMO)[2] == "runs/demo"
    assert sys.argv[0] != "gae_jax"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tokeniser", DEMO), "give one command, got tokeniser; commands: .*tokenizer"),
        (("demo",), "give a config"),
        (("demo", "--config=configs/none.py"), r"none\.py"),
        (("demo", DEMO, "--config.tokenizer.losses.algn=1"), "algn"),
        (("demo", DEMO, "--config.seed=many"), "seed"),
        (("demo", DEMO, "--wrkdir=x"), "wrkdir"),
    ],
)
def test_what_cannot_be_understood_is_named(arguments, says):
    with pytest.raises(UserError, match=says):
        parse(*arguments)


def test_plan_takes_a_topology():
    assert parse("plan", DEMO, "--topology=v5p-64")[1].plan.topology == "v5p-64"
    with pytest.raises(UserError, match="--topology is for plan, not for tokenizer"):
        parse("tokenizer", DEMO, "--topology=v5p-64")


def test_errors_end_with_status_one_and_no_traceback(capsys, tmp_path):
    status = cli.main(["gae_jax", "teacher", DEMO, f"--workdir={tmp_path}"])
    captured = capsys.readouterr().err
    assert status == 1
    assert "error: " in captured
    assert f"run first: python -m gae_jax backbone {DEMO} --workdir={tmp_path}\n" in captured
    assert "Traceback" not in captured


def test_remedies_are_called_as_the_command_was(capsys, tmp_path):
    """With the same config, overrides and run, without what was asked of this stage alone."""
    workdir, change = f"--workdir={tmp_path}/my run", "--config.tokenizer.losses.align=0"
    asked = (DEMO, workdir, change)
    assert cli.main(["gae_jax", "latents", *asked, "--fresh"]) == 1
    text = capsys.readouterr().err
    command = text.split("run first: python -m gae_jax ")[1].splitlines()[0]
    assert shlex.split(command) == ["tokenizer", *asked]
    assert cli.parse(["gae_jax", *shlex.split(command)])[:3] == (
        "tokenizer", parse("tokenizer", *asked)[1], f"{tmp_path}/my run",
    )  # fmt: skip
    resumed = cli.parse(["gae_jax", "teacher", *asked, "--amend", "--from-step", "3"])
    assert resumed[3]["arguments"] == f"{DEMO} '{workdir}' {change}"


def test_names_of_earlier_versions_are_taken_and_the_new_ones_said(capsys, tmp_path):
    for old, new in table.ALIASES.items():
        assert cli.main(["gae_jax", old, DEMO, f"--workdir={tmp_path}", "--config.seed=-1"]) == 1
        text = capsys.readouterr().err
        assert text.startswith(f"{old} is now called {new}\nerror: ")
        assert "seed" in text


def test_a_run_alone_names_its_config_for_every_command(tmp_path):
    recorded = {"diffusion": small.get_config().diffusion.to_dict()}
    write_json(tmp_path / "diffusion" / "config.json", {"config": recorded, "inputs": {}})
    for command in ("demo", "backbone", "reference"):
        parsed, config, workdir, _ = parse(command, str(tmp_path))
        assert (parsed, workdir) == (command, str(tmp_path))
        assert config.diffusion == small.get_config().diffusion
    assert cli.own_command(["gae_jax", "sample", str(tmp_path), "--nofresh"]) is None
    assert cli.own_command(["gae_jax", "sample", str(tmp_path)])


def test_a_bad_config_costs_nothing(capsys, tmp_path):
    status = cli.main(
        ["gae_jax", "demo", DEMO, f"--workdir={tmp_path}", "--config.data.image_size=64"]
    )
    assert status == 1
    assert "tokenizer.model.image_size is 32 but data.image_size is 64" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_workdir_tells_the_arguments_of_a_config_apart():
    for file, workdir in (
        ("gae_d32.py", "runs/gae_d32"),
        ("gae_d32.py:B", "runs/gae_d32-B"),
        ("data/imagenet_tfds.py:gae_d32:B", "runs/imagenet_tfds-gae_d32-B"),
    ):
        _, _, found, _ = cli.parse(["gae_jax", "tokenizer", f"--config={ROOT}/configs/{file}"])
        assert found == workdir


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(ROOT / "configs" / "demo.py", tmp_path / "mine.py")
    fields = [
        *("data.root", "data.cache_dir", "tokenizer.init_from", "diffusion.init_from"),
        *("import_torch.backbone", "import_torch.latents", "export_torch.folder", "bench.out"),
        *("evaluate.reference", "evaluate.segments", "sample.weaker", "sample.labels_file"),
    ]
    flags = [f"--config.{field}=~/x/y" for field in fields]
    _, config, workdir, _ = parse("tokenizer", "--config=~/mine.py", "--workdir=~/run", *flags)
    assert {flatten(config)[field] for field in fields} == {f"{tmp_path}/x/y"}
    assert workdir == f"{tmp_path}/run"
    write_json(tmp_path / "run/backbone/config.json", {"config": {"seed": 7}, "inputs": {}})
    _, config, workdir, _ = parse("evaluate", "~/run")
    assert (config.seed, workdir) == (7, f"{tmp_path}/run")
    options = draw.parse(["~/run", "--out=~/drawn"])
    assert (options.run, options.out) == (tmp_path / "run", tmp_path / "drawn")
    options = prepare_data.parse(["--source=~/images", "--out=~/shards"])
    assert (options.source, options.out) == (tmp_path / "images", tmp_path / "shards")
    options = evaluate_samples.parse(["--samples=~/a", "--ref=~/b", "--inception=~/c"])
    assert (options.samples, options.inception) == (tmp_path / "a", f"{tmp_path}/c")


def test_a_run_says_which_stages_it_does_not_record(tmp_path, capsys, caplog):
    config = small.get_config()
    folder = Run(tmp_path).stage("backbone")
    recorded = {"data": config.data.to_dict(), "backbone": config.backbone.to_dict()}
    write_json(folder.path / "config.json", {"config": recorded, "inputs": {}})
    assert cli.main(["gae_jax", "backbone", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "tokenizer.model.image_size is 256 but data.image_size is 16" in told
    assert "records teacher, tokenizer, diffusion, which have the defaults here" in told
    assert f"python -m gae_jax backbone --config=FILE --workdir={tmp_path}" in told
    # the defaults happen to fit: said before the stage that has them
    file = f"{run_config.__file__}:{tmp_path}"
    run_config.validate_config("export-torch", config, file)
    run_config.validate_config("teacher", config, "small.py")
    assert not caplog.text
    run_config.validate_config("teacher", config, file)
    assert "records teacher, tokenizer, diffusion, which have the defaults" in caplog.text


@pytest.mark.parametrize(
    ("command", "silent"),
    [
        ("latents", "latents"),
        ("sample", "sample"),
        ("evaluate", "evaluate"),
        ("likelihood", "likelihood"),
        ("reference", "reference, evaluate"),
    ],
)
def test_sections_that_a_command_reads_and_no_stage_records_are_named_in_one_line(
    command, silent, tmp_path, caplog
):
    config = small.get_config()
    sections = {"data": config.data.to_dict()}
    sections |= {name: config[name].to_dict() for name in run_config.TRAINED}
    for name in run_config.TRAINED:
        write_json(tmp_path / name / "config.json", {"config": sections, "inputs": {}})
    file = f"{run_config.__file__}:{tmp_path}"
    run_config.validate_config(command, config, "small.py")
    assert not caplog.text
    run_config.validate_config(command, config, file)
    assert len(caplog.records) == 1
    assert f"records {silent}, which have the defaults here" in caplog.text
    for name in silent.split(", "):  # recorded: nothing is said
        sections[name] = config[name].to_dict()
    write_json(tmp_path / "sample" / "config.json", {"config": sections, "inputs": {}})
    caplog.clear()
    run_config.validate_config(command, config, file)
    assert not caplog.text


def test_a_run_of_a_tokenizer_alone_is_not_asked_for_a_number_of_classes(small_run, tmp_path):
    for name in ("backbone", "teacher", "tokenizer", "latents"):
        shutil.copytree(small_run / name, tmp_path / name)
    asked = [f"--config.{path}" for path in ("evaluate.lpips=False", "evaluate.batch_size=64")]
    asked += [f"--config.evaluate.{path}" for path in ("features=judge", "linear_probe=logistic")]
    assert cli.main(["gae_jax", "evaluate", str(tmp_path), *asked]) == 0
    figures = read_json(tmp_path / "evaluate/result.json")["tokenizer"]
    assert figures["linear_probe"] > 0.1
    # who says a number is held to it, and so is who trains a diffusion model
    config = run_config.get_config(str(tmp_path))
    file = f"{run_config.__file__}:{tmp_path}"
    session = Session.start(config, tmp_path, config_file=file)
    session.check(("latents",))
    with pytest.raises(ConfigError, match=r"model\.num_classes=10"):
        session.check(("tokenizer", "diffusion"))
    session.config.diffusion.model.num_classes = 7
    with pytest.raises(ConfigError, match=r"model\.num_classes=10"):
        session.check(("latents",))
