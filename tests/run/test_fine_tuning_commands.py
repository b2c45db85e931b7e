"""`init_from` in the commands: exports, imported runs, refusals, going on without the source."""

import dataclasses
import logging
import re
import shutil
from types import SimpleNamespace

import jax
import pytest
from small import get_config
from starting import (
    changed,
    of_kind,
    opened,
    random_state,
    require_same,
    started,
    trained,
)
from test_conv_tokenizer import TINY as CONV

from gae_jax.commands import compare
from gae_jax.commands.cli import main, run_command
from gae_jax.run import fine_tuning
from gae_jax.run.load import load
from gae_jax.run.run import Run
from gae_jax.run.weight_source import open_source
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.train.checkpoint import kept_steps
from gae_jax.train.warm_start import lend


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory):
    """(export folder of `small_run`, run that imported its tokenizer)."""
    config, path = get_config(), tmp_path_factory.mktemp("exported")
    config.export_torch.folder = str(path / "export")
    run_command("export-torch", opened(config, small_run))
    config.import_torch.tokenizer = str(path / "export" / "gae.safetensors")
    run_command("import-torch", opened(config, path / "imported"))
    return SimpleNamespace(folder=path / "export", run=path / "imported")


def test_an_export_and_an_imported_run_hold_the_same_weights(exported, small_run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = get_config()
    config.tokenizer.losses.perceptual = 0.0
    config.tokenizer.align.target = "snapshot"
    first = Run(small_run).stage("tokenizer")
    weights = jax.device_get(load(first, opened(config, small_run).mesh)[1])
    for number, named in enumerate((exported.folder, exported.run, small_run / "tokenizer")):
        config.tokenizer.init_from = str(named)
        path = tmp_path / str(number)
        found, record = started("tokenizer", config, path)
        require_same(found.params["tokenizer"], weights[0])
        assert record["fingerprint"] == first.done["fingerprint"]
        assert record["discriminator"] == (
            fine_tuning.TAKEN
            if number == 2
            else f"new, {open_source(str(named), 'tokenizer')} has none"
        )
    assert f"discriminator: new, {exported.folder / 'gae.safetensors'} has none" in caplog.text
    config.diffusion.init_from = str(exported.folder)
    found, _ = started("diffusion", config, tmp_path / "dit")
    params, _ = load(Run(small_run).stage("diffusion"), opened(config, small_run).mesh)[1]
    require_same(found.params["diffusion"], jax.device_get(params))


REFUSALS = {
    "tokenizer.model.embed_dim=64": "tokenizer.model.embed_dim: 64 here, 32 in the source",
    "tokenizer.model.num_layers=2": "tokenizer.model.num_layers: 2 here, 1 in the source",
    "tokenizer.model.latent_dim=8": "tokenizer.model.latent_dim: 8 here, 4 in the source",
    "tokenizer.model.num_heads=4": "tokenizer.model.num_heads: 4 here, 2 in the source",
    "tokenizer.model.mlp_ratio=2.0": "tokenizer.model.mlp_ratio: 2.0 here, 4.0 in the source",
    "diffusion.model.hidden_size=64": "x_embedder/proj/kernel: [1, 1, 4, 64] here, [1, 1, 4, 32]",
    "diffusion.model.depth=2": "diffusion.model.depth: 2 here, 1 in the source",
    "diffusion.model.num_heads=1": "diffusion.model.num_heads: 1 here, 2 in the source",
    "diffusion.model.use_rope=False": "diffusion.model.use_rope: False here, True in the source",
    "diffusion.model.use_abs_pos=False": "use_abs_pos: False here, True in the source",
}


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize("flag", REFUSALS)
def test_other_networks_are_refused_by_name_and_the_flags_mend_it(
    flag, kind, exported, small_run, tmp_path
):
    stage = flag.split(".")[0]
    named = small_run if kind == "run" else exported.folder
    config = changed(get_config(), [f"{stage}.init_from={named}", flag])
    config.teacher.model.latent_dim = config.tokenizer.model.latent_dim
    with pytest.raises(ConfigError) as error:
        fine_tuning.check(opened(config, tmp_path), stage)
    text = str(error.value)
    assert REFUSALS[flag] in text
    flags = re.findall(r"--config\.\S+", text)
    assert flags
    fine_tuning.check(opened(changed(config, flags), tmp_path), stage)
    assert not (tmp_path / stage).exists()  # nothing was begun


def test_latents_of_other_channels_are_refused(small_run, tmp_path):
    config = changed(get_config(), [f"diffusion.init_from={small_run}"])
    config.tokenizer.model.latent_dim = config.teacher.model.latent_dim = 8
    with pytest.raises(ConfigError, match="on latents of as many channels as this tokenizer's"):
        fine_tuning.check(opened(config, tmp_path), "diffusion")


def test_sources_that_cannot_be_used_are_refused_with_what_can(exported, small_run, tmp_path):
    def refused(named, text, stage="tokenizer", config=None):
        with pytest.raises(UserError) as error:
            open_source(str(named), stage)
        assert text in str(error.value)
        given = re.findall(r"init_from=(\S+)", str(error.value))
        for path in given:  # what is advised can be opened
            if path != "RUN":
                open_source(path, stage)
        return given

    refused(tmp_path / "nowhere", "does not exist")
    assert refused(exported.folder / "gae.safetensors", "names the file")
    (tmp_path / "other.safetensors").write_bytes(b"")
    refused(tmp_path / "other.safetensors", "import-torch --workdir=RUN")
    assert refused(f"{exported.folder}@3", "which has no checkpoints")
    assert refused(f"{small_run}@5", "kept checkpoints: 4, 6")
    assert refused(f"{exported.run}@5", "imported and has no steps")
    refused(exported.run, "which has no diffusion: it has tokenizer", "diffusion")
    refused(tmp_path, "it is no run directory")
    config = get_config()
    trained(tmp_path / "half", "diffusion", config, done=False)
    assert refused(tmp_path / "half", "is not finished", "diffusion")
    config.tokenizer.name, config.tokenizer.init_from = "conv", str(small_run)
    config.tokenizer.conv.update(CONV)
    with pytest.raises(
        ConfigError, match=r"the kind 'gae', but tokenizer\.name is 'conv'"
    ) as error:
        fine_tuning.check(opened(config, tmp_path / "new"), "tokenizer")
    fine_tuning.check(
        opened(changed(config, re.findall(r"--config\.\S+", str(error.value))), tmp_path / "new"),
        "tokenizer",
    )
    config.tokenizer.init_from, config.tokenizer.init_optimizer = str(exported.folder), True
    with pytest.raises(ConfigError, match="holds no optimizer"):
        fine_tuning.check(opened(config, tmp_path / "new"), "tokenizer")
    config.tokenizer.init_from, config.tokenizer.init_optimizer = str(small_run), False
    with pytest.raises(ConfigError, match="this run's own tokenizer; train in another --workdir"):
        fine_tuning.check(opened(config, small_run, fresh=True), "tokenizer")
    assert (small_run / "tokenizer" / "done.json").exists()


def interrupted(path, stage, step):
    """Takes away what a stage did after a checkpoint, as if it had been killed there."""
    folder = path / stage
    (folder / "done.json").unlink()
    for later in kept_steps(folder):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / str(later))


@pytest.fixture(scope="module")
def fine_tuned(small_run, tmp_path_factory):
    """(config, source, run) of a tokenizer that was fine-tuned without a teacher."""
    path = tmp_path_factory.mktemp("fine_tuned")
    shutil.copytree(small_run / "tokenizer", path / "source" / "tokenizer")
    config = get_config()
    config.tokenizer.losses.update(gan=0.0, perceptual=0.0, align=0.0)
    config.tokenizer.health.update(pictures=0, probe=0)
    config.tokenizer.init_from = str(path / "source")
    run_command("tokenizer", opened(config, path / "run"))
    return SimpleNamespace(config=config, source=path / "source", run=path / "run")


def test_folders_inside_of_a_run_name_its_weights(small_run):
    whole = str(open_source(str(small_run), "tokenizer"))
    for inner in ("tokenizer", "tokenizer/checkpoints", "tokenizer/checkpoints/6"):
        assert str(open_source(str(small_run / inner), "tokenizer")) == whole
    kept = small_run / "tokenizer" / "checkpoints" / "4"
    assert open_source(str(kept), "tokenizer").step == 4
    with pytest.raises(ConfigError, match="has no diffusion"):
        open_source(str(kept), "diffusion")


def test_a_fine_tuned_stage_goes_on_without_its_source(fine_tuned, small_run, tmp_path):
    run, config = tmp_path / "run", get_config()
    shutil.copytree(fine_tuned.run, run)
    config.update(fine_tuned.config.to_dict())
    done = read_json(run / "tokenizer" / "done.json")
    recorded = read_json(run / "tokenizer" / "config.json")
    there = Run(small_run).stage("tokenizer").done["fingerprint"]
    assert recorded["inputs"] == {"init_from": there}
    assert done["started_from"]["fingerprint"] == there != done["fingerprint"]
    assert done["started_from"]["step"] == 6
    interrupted(run, "tokenizer", 3)

    moved = fine_tuned.source.rename(tmp_path / "moved")
    try:
        run_command("tokenizer", opened(config, run))
        assert read_json(run / "tokenizer" / "done.json")["fingerprint"] == done["fingerprint"]
        config.tokenizer.init_from = str(moved)  # the same weights by another path
        interrupted(run, "tokenizer", 3)
        run_command("tokenizer", opened(config, run))
        assert read_json(run / "tokenizer" / "done.json") == {
            **done, "seconds": pytest.approx(done["seconds"], abs=600)
        }  # fmt: skip
        config.tokenizer.init_from = str(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match="does not need it any more") as error:
            run_command("tokenizer", opened(config, run))
        flags = re.findall(r"--config\.\S+", str(error.value))
        run_command("tokenizer", opened(changed(config, flags), run))
        # before the first checkpoint there is no other place that has the weights
        interrupted(run, "tokenizer", 0)
        with pytest.raises(ConfigError, match="does not exist"):
            run_command("tokenizer", opened(config, run))
    finally:
        moved.rename(fine_tuned.source)


def test_other_weights_than_a_stage_started_from_are_refused(fine_tuned, small_run, tmp_path):
    run, config = tmp_path / "run", get_config()
    shutil.copytree(fine_tuned.run, run)
    config.update(fine_tuned.config.to_dict())
    config.tokenizer.init_from = f"{small_run}@4"
    with pytest.raises(ConfigError, match=r"started from .* fingerprint") as error:
        run_command("tokenizer", opened(config, run))
    flag = re.search(r"--config\.[^,\s]+", str(error.value))[0]
    run_command("tokenizer", opened(changed(config, [flag]), run))
    config.tokenizer.init_from = ""
    with pytest.raises(UserError, match=r"tokenizer\.init_from: '.*source' there, '' asked for"):
        run_command("tokenizer", opened(config, run))


def test_what_is_built_on_it_follows_and_the_report_names_the_source(
    fine_tuned, small_run, tmp_path, caplog
):
    run, config = tmp_path / "run", get_config()
    shutil.copytree(small_run, run)
    shutil.rmtree(run / "tokenizer")
    shutil.copytree(fine_tuned.run / "tokenizer", run / "tokenizer")
    config.update(fine_tuned.config.to_dict())
    with pytest.raises(UserError, match=r"latents \S+ --fresh"):
        run_command("latents", opened(config, run))
    run_command("latents", opened(config, run, fresh=True))
    config.diffusion.init_from = str(small_run)
    config.diffusion.train.update(steps=2, save_every=2)
    caplog.clear()
    run_command("diffusion", opened(config, run, fresh=True))
    mine = Run(run).stage("tokenizer").done["fingerprint"]
    theirs = Run(small_run).stage("tokenizer").done["fingerprint"]
    assert f"was trained on latents of tokenizer {theirs}, this run's latents are of {mine}, " in (
        caplog.text
    )
    assert "which was fine-tuned from it" in caplog.text
    diffusion_done = Run(run).stage("diffusion").done
    assert diffusion_done["started_from"]["path"] == str(small_run)
    with pytest.raises(UserError, match=r"sample \S+ --fresh"):  # those there are of other weights
        run_command("report", opened(config, run))
    for stage in ("sample", "evaluate"):
        shutil.rmtree(run / stage)
    config.evaluate.update(linear_probe="none", diagnostics=False, noise_levels=())
    run_command("evaluate", opened(config, run))
    run_command("report", opened(config, run))
    result = read_json(run / "result.json")
    assert result["tokenizer.started_from"] == (
        f"started from {fine_tuned.source}, step 6 (fingerprint {theirs})"
    )
    _, same = compare.compare(run, small_run)
    assert not same
    manifest = read_json(run / "evaluate" / "result.json")["manifest"]
    assert set(manifest["started_from"]) == {"tokenizer", "diffusion"}
    page = (run / "report.html").read_text()
    assert f"started from {fine_tuned.source}" in page
    assert "Trained from scratch" not in page
    assert "Trained from scratch" in (small_run / "report.html").read_text()


def test_a_request_to_train_what_was_imported_is_refused_and_its_use_goes_on(
    exported, small_run, tmp_path, capsys
):
    run = tmp_path / "imported"
    shutil.copytree(small_run / "backbone", run / "backbone")
    shutil.copytree(small_run / "teacher", run / "teacher")
    shutil.copytree(exported.run / "tokenizer", run / "tokenizer")
    assert main(["gae_jax", "tokenizer", str(run)]) == 1
    text = capsys.readouterr().err
    assert f"the weights in {run / 'tokenizer'} were imported and are finished" in text
    advice = re.search(r"python -m gae_jax (.+)", text)[1].replace("NEW", str(tmp_path / "new"))
    for name in ("backbone", "teacher"):
        shutil.copytree(run / name, tmp_path / "new" / name)
    quick = ["--config.tokenizer.health.pictures=0", "--config.tokenizer.health.probe=0"]
    quick += ["--config.tokenizer.train.steps=8", "--config.tokenizer.losses.gan=0"]
    quick.append("--config.diffusion.model.num_classes=10")  # there is no diffusion model to tell
    quick += ["--config.tokenizer.losses.perceptual=0", "--config.tokenizer.train.batch_size=16"]
    assert main(["gae_jax", *advice.split(), *quick]) == 0
    done = read_json(tmp_path / "new" / "tokenizer" / "done.json")
    assert (
        done["started_from"]["fingerprint"] == Run(small_run).stage("tokenizer").done["fingerprint"]
    )

    # to use it is no request to train
    config, session = get_config(), opened(get_config(), run)
    for command in ("tokenizer", "latents"):
        run_command(command, session)
    assert "imported" in read_json(run / "tokenizer" / "done.json")
    config.tokenizer.init_from = str(small_run)
    with pytest.raises(ConfigError, match="was imported and is finished; train in another"):
        run_command("tokenizer", opened(config, run))


def test_a_run_of_imported_weights_alone_is_refused_with_a_remedy_that_needs_a_config(
    exported, capsys
):
    assert main(["gae_jax", "tokenizer", str(exported.run)]) == 1
    text = capsys.readouterr().err
    assert "were imported and are finished" in text, "not that sections it does not record clash"
    remedy = f"tokenizer --config=FILE --workdir=NEW --config.tokenizer.init_from={exported.run}"
    assert remedy in text


def test_a_frozen_encoder_that_is_not_the_runs_backbone_is_warned_of(small_run, caplog):
    session = opened(of_kind("fae"), small_run)
    state = random_state("tokenizer", session.config, 1)
    fine_tuning.warn_of_encoder(session, state)
    assert "its frozen encoder is the source's, not this run's backbone" in caplog.text
    caplog.clear()
    lent = load(session.run.stage("backbone"), session.mesh)[1]
    fine_tuning.warn_of_encoder(session, lend(state, *lent))
    assert not caplog.text


@pytest.mark.parametrize("stage", ["backbone", "teacher"])
def test_what_cannot_start_from_weights_has_another_remedy(stage, small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run / stage, run / stage)
    done = read_json(run / stage / "done.json")
    write_json(run / stage / "done.json", done | {"imported": {"files": {}}})
    config = get_config()
    if stage == "backbone":
        config.backbone.name = "dinov2"
    session = opened(config, run, config_file="tests/small.py")
    with pytest.raises(ConfigError, match="imported and are finished") as error:
        session.require_trainable(stage)
    wanted = "--config=tests/small.py --workdir=NEW"
    assert wanted in str(error.value)
    assert ("--config.backbone.name=vit" in str(error.value)) == (stage == "backbone")
    if stage == "backbone":  # and --fresh does not throw released weights away
        with pytest.raises(ConfigError, match="released and not trained here"):
            run_command("backbone", dataclasses.replace(session, fresh=True))
        assert (run / stage / "done.json").exists()
    else:
        dataclasses.replace(session, fresh=True).require_trainable(stage)
