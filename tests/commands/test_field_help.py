"""``COMMAND --help`` shows the fields that a command reads, with defaults and choices."""

import re

import pytest

from gae_jax.commands.cli import COMMANDS, OWN, main
from gae_jax.commands.field_help import READ, field_help
from gae_jax.commands.field_notes import notes
from gae_jax.config import default_config, flatten, precision
from gae_jax.config.choices import declared
from gae_jax.evaluation import presets, reconstruction

DEFAULT = default_config()
FIELDS = flatten(DEFAULT)


def test_choices_are_read_from_the_source_as_they_are_imported():
    for path, field in declared(DEFAULT).items():
        assert field.written_names() == field.names(), path
    assert set(presets.RECONSTRUCTION) == set(reconstruction.PRESETS)
    assert set(presets.GENERATION) == set(presets.PRESETS) - set(presets.RECONSTRUCTION)


def test_every_command_but_report_and_those_with_their_own_help_has_fields():
    assert {*READ} == {*COMMANDS} - {*OWN} - {"report"}
    for sections in READ.values():
        for section in sections:
            assert any(path.startswith(f"{section}.") for path in FIELDS), section


@pytest.mark.parametrize("command", READ)
def test_every_line_is_a_flag_with_default_and_choices(command):
    fields = FIELDS | precision.fields_of(DEFAULT)
    shown = re.findall(r"^  --config\.([\w.]+)=(\S*)(?: +(.+))?$", field_help(command), re.M)
    assert len(shown) == len({path for path, *_ in shown})
    for path, value, names in shown:
        default = fields[path]
        assert value == (repr(tuple(default)).replace(" ", "") if "(" in value else str(default))
        if path in declared(DEFAULT):
            assert names.split(" | ")[:2] == [
                name or "'' (empty)" for name in declared(DEFAULT)[path].names()[:2]
            ]
    paths = {path for path, *_ in shown}
    section = command.replace("-", "_").removeprefix("teacher_")
    assert {path for path in FIELDS if path.startswith(f"{section}.")} <= paths


def test_help_says_what_the_comments_in_the_source_say():
    said = {path: note for path, note in notes().items() if path in FIELDS}
    assert sum(map(bool, said.values())) > len(FIELDS) / 2
    for path, note in (
        ("tokenizer.gan.eps", "[code] of the adaptive weight; RAE's code has 1e-6"),
        ("data.cache", "of decoded, cut images: none | memory | disk, see docs/data.md"),
        ("diffusion.optim.clip_norm", "global gradient norm; 0 switches clipping off"),
        ("tokenizer.discriminator_optim.restart", "warm-up and cosine anew in each phase"),
        ("data.image_size", ""),
        ("sample.sde.start", "[code]"),
    ):
        assert said[path] == note
    assert "\n      of decoded, cut images: none | memory | disk" in field_help("latents")


def test_help_of_a_command_follows_the_general_help(capsys):
    for argv in (["tokenizer", "--help"], ["tokenizer", "--config=FILE", "-h"]):
        assert main(["gae_jax", *argv]) == 0
        text = capsys.readouterr().out
        assert "commands, in the order of the pipeline" in text
        assert re.search(r"--config.tokenizer.gan.loss=hinge +hinge \| vanilla", text)
        assert re.search(r"--config.precision.perceptual.precision=highest +highest \| high", text)
        assert "precision.encoder" not in text
    assert main(["gae_jax", "--help"]) == 0
    assert "--config.tokenizer.gan" not in capsys.readouterr().out
