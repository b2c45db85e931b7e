"""The section ``precision``: presets, what networks override, what a run keeps."""

import pytest
import small

from gae_jax.commands.cli import main, parse
from gae_jax.config import default_config, flatten
from gae_jax.config.precision import FIELDS, settle, shown_alike
from gae_jax.config.validate import validate
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import write_json

PAPER = dict.fromkeys(FIELDS, "float32") | {"diffusion.compute.dtype": "bfloat16"}


def dtypes(config):
    return {path: value for path, value in flatten(config).items() if path in FIELDS}


def command_line(*flags):
    return parse(["gae_jax", "tokenizer", "--config=configs/gae_d32.py", *flags])[1]


def test_presets_set_all_networks():
    assert dtypes(default_config()) == PAPER
    for preset, dtype in (("exact", "float32"), ("fast", "bfloat16")):
        config = command_line(f"--config.precision={preset}")
        validate(config)
        assert set(dtypes(config).values()) == {dtype}


def test_a_field_of_a_network_overrides_part_and_preset_in_any_order():
    flags = (
        *("--config.sample.dtype=float32", "--config.precision.frozen.dtype=float32"),
        *("--config.precision=fast", "--config.precision.train.remat=nothing_saveable"),
    )
    for given in (flags, flags[::-1]):
        config = command_line(*given)
        assert config.precision.sample.dtype == "bfloat16"
        assert config.sample.dtype == config.latents.encode_dtype == "float32"
        assert config.tokenizer.align.dtype == "float32"
        assert config.tokenizer.compute.dtype == "bfloat16"
        assert config.diffusion.compute.remat == "nothing_saveable"


def test_auto_is_as_the_paper_on_a_cpu_and_fast_where_training_was_shown_alike():
    config = default_config()
    assert settle(config, "cpu", {}) is config
    fast = dtypes(settle(config, "gpu", {}))
    assert {path for path in FIELDS if fast[path] == "bfloat16"} == set(shown_alike(config))
    assert fast["sample.dtype"] == fast["latents.encode_dtype"] == "float32"
    assert dtypes(config) == PAPER
    config.teacher.kind, config.precision.preset = "prior", "fast"
    validate(settle(config, "gpu", {}))
    config = command_line("--config=configs/rae.py")
    assert settle(config, "tpu", {}).tokenizer.compute.dtype == "float32"


def test_a_stage_that_has_begun_keeps_its_numbers_on_another_device(tmp_path):
    config = small.get_config()
    recorded = {"tokenizer": {"compute": {"dtype": "float32"}, "align": {"dtype": "float32"}}}
    for name in ("tokenizer", "teacher"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "tokenizer/config.json", {"config": recorded, "inputs": {}})
    (tmp_path / "teacher/config.json").write_text("{damaged")
    session = Session.start(config, tmp_path, platform="gpu")
    assert session.config.tokenizer.compute.dtype == "float32"
    assert session.config.tokenizer.perceptual.dtype == "bfloat16"  # the run does not say
    assert session.config.teacher.compute.dtype == "bfloat16"
    again = Session.start(config, tmp_path, platform="gpu", fresh=True)
    assert again.config.tokenizer.compute.dtype == "bfloat16"
    config.precision.preset = "exact"
    assert Session.start(config, tmp_path, platform="gpu").config is config


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
        ("sample.products", "fp4", "precision.sample.products is 'fp4'; use one of same, fp8"),
    ],
)
def test_unknown_names_are_refused(path, value, says):
    config = default_config()
    config.update_from_flattened_dict({f"precision.{path}": value})
    with pytest.raises(ConfigError, match=says):
        validate(config)


def test_an_unknown_preset_ends_the_command_with_one_line(tmp_path, capsys):
    flags = ("--config=configs/demo.py", f"--workdir={tmp_path}", "--config.precision=fats")
    assert main(["gae_jax", "demo", *flags]) == 1
    assert "precision.preset is 'fats'" in capsys.readouterr().err


def test_a_preset_that_a_runs_record_would_override_is_refused_with_a_field(small_run, capsys):
    command = ["gae_jax", "tokenizer", str(small_run)]
    assert main([*command, "--config.precision=fast"]) == 1
    error = capsys.readouterr().err
    assert "--config.precision=fast does not change dtypes that" in error
    field = "tokenizer.compute.dtype"
    assert field in error
    assert main([*command, f"--config.{field}=bfloat16"]) == 1  # a change of a finished stage
    assert field in capsys.readouterr().err
    assert main([*command, "--config.precision=auto"]) == 0
