"""Run directories: what they refuse, and that files are whole or absent."""

import json

import pytest
from remedies import commands_in
from small import get_config

from gae_jax.config import default_config
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.files import write_bytes, write_json


def open_stage(path, *, seed=0, steps=5, workers=1, tokenizer="3f2a", fresh=False):
    folder = Run(path).stage("latents")
    sections = {"seed": seed, "train": {"steps": steps}, "data": {"workers": workers}}
    return folder, folder.open(sections, {"tokenizer": tokenizer}, fresh=fresh)


def with_a_shard(folder):
    """The folder, in which something was computed."""
    write_json(folder.path / "shard-00000.json", {})
    return folder


def test_open_says_whether_there_is_work(tmp_path):
    folder, work = open_stage(tmp_path)
    assert work
    folder.finish(fingerprint="aa")
    assert not open_stage(tmp_path)[1]
    assert folder.require_done() == {"fingerprint": "aa"}
    assert folder.config.train.steps == 5


def test_another_config_is_refused_field_by_field(tmp_path):
    with_a_shard(open_stage(tmp_path)[0])
    with pytest.raises(UserError) as error:
        open_stage(tmp_path, seed=1, steps=7)
    assert "seed: 0 there, 1 asked for" in str(error.value)
    assert "train.steps: 5 there, 7 asked for" in str(error.value)
    assert "--fresh" in str(error.value)


def test_a_field_of_a_later_version_has_its_default_in_an_older_run(tmp_path):
    folder = Run(tmp_path).stage("latents")
    sections = {"latents": {"batch_size": 256, "shard_size": 8192}}
    folder.open(sections, {}, fresh=False)
    latents = default_config().latents.to_dict()
    with_a_shard(folder)
    assert folder.open({"latents": latents}, {}, fresh=False)
    with pytest.raises(UserError, match=r"latents.dtype: 'float32' there, 'bfloat16' asked for"):
        folder.open({"latents": latents | {"dtype": "bfloat16"}}, {}, fresh=False)


def test_how_a_run_is_watched_may_change(tmp_path):
    with_a_shard(open_stage(tmp_path)[0])
    assert open_stage(tmp_path, workers=100)[1]


def test_what_has_computed_nothing_may_be_made_of_something_else(tmp_path):
    open_stage(tmp_path)
    folder, work = open_stage(tmp_path, seed=1, tokenizer="91bc")
    assert work
    assert folder.config.seed == 1
    assert folder.marker["inputs"] == {"tokenizer": "91bc"}


def test_another_tokenizer_is_refused_with_the_remedy(tmp_path):
    with_a_shard(open_stage(tmp_path)[0])
    with pytest.raises(UserError, match=r"made by tokenizer 3f2a, this run uses 91bc") as error:
        open_stage(tmp_path, tokenizer="91bc")
    assert commands_in(str(error.value)) == [["latents", str(tmp_path), "--fresh"]]


def test_fresh_starts_over_but_spares_foreign_folders(tmp_path):
    folder, _ = open_stage(tmp_path)
    folder.finish()
    assert open_stage(tmp_path, seed=1, fresh=True)[1]
    (folder.path / "config.json").unlink()
    (folder.path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not made by gae_jax"):
        open_stage(tmp_path, fresh=True)
    assert (folder.path / "thesis.txt").exists()


def test_unfinished_stage_names_the_command(tmp_path):
    with pytest.raises(UserError, match=f"gae_jax backbone {tmp_path}$"):
        Run(tmp_path).stage("backbone").require_done()
    with pytest.raises(UserError, match=r"backbone --config=a.py --workdir='b c'$"):
        Run(tmp_path, "--config=a.py --workdir='b c'").stage("backbone").require_done()


def test_bfloat16_on_a_cpu_is_warned_of(tmp_path, caplog):
    config = get_config()
    Session(config, Run(tmp_path)).warn_of_emulation("diffusion")
    assert not caplog.text
    config.precision.update(preset="fast", override=())
    session = Session(config, Run(tmp_path))
    for name in ("backbone", "diffusion"):  # the first has no precision
        session.warn_of_emulation(name)
    assert caplog.text.count("trains in bfloat16") == 1
    flag = caplog.text.split("pass --config.")[1].split("\n")[0]
    assert flag == "precision=exact"


def test_commands_that_make_a_stage(tmp_path):
    run, spaced = Run(tmp_path), Run(tmp_path / "a b")
    assert spaced.command("latents", "--fresh").endswith(f"latents '{tmp_path}/a b' --fresh")
    # without the flag, `sample RUN` draws a few images
    assert run.command("sample").endswith(f"sample {tmp_path} --nofresh")
    assert run.command("sample", "--fresh").endswith(f"sample {tmp_path} --fresh")
    assert Run(tmp_path, "--config=x.py").command("sample").endswith("sample --config=x.py")
    flags = "--config.import_torch.vgg=FILE --config.import_torch.lpips_heads=FILE"
    assert run.command("lpips").endswith(f"import-torch {tmp_path} {flags}")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_bytes(path, "text")
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
