"""import-torch and export-torch: whole runs there and back, released files, refusals."""

import shutil

import golden_files
import jax
import numpy as np
import pytest
from in_parts import write_parts
from safetensors.numpy import load_file, save_file

from gae_jax.commands.cli import run_command
from gae_jax.config.validate import validate
from gae_jax.data.latents import LatentSet
from gae_jax.evaluation.sample_files import load_set
from gae_jax.interop import metric_tables, rae_tables
from gae_jax.interop.convert import ConversionError, export_torch
from gae_jax.interop.files import digest
from gae_jax.nn.network import Network
from gae_jax.objectives.dino_discriminator import DinoFeatures
from gae_jax.porting.sources import read_sources
from gae_jax.pretrained.inception import FIDInception
from gae_jax.run.load import load, load_many
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json, write_json
from gae_jax.stages import evaluate
from gae_jax.tokenizers import latent_shape

STAGES = ("backbone", "teacher", "tokenizer", "diffusion")


def session(config, path, **more):
    return Session(config, Run(path), devices=tuple(jax.devices()[:1]), **more)


def golden(name):
    """(config, torch state dict) of a golden file."""
    config, groups = golden_files.golden(name)
    return config, groups["state"]


def hub_names(state):
    """DINOv2's own names of a Hugging Face state dict, query, key and value fused."""
    renames = (
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.", ""),
        ("encoder.layer", "blocks"),
        ("layernorm", "norm"),
        ("attention.output.dense", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
    )
    hub = {}
    for name, tensor in state.items():
        for old, new in renames:
            name = name.replace(old, new)
        if ".attention.attention." in name:
            if ".query." in name:
                parts = [state_part(state, name, part) for part in ("query", "key", "value")]
                hub[name.replace("attention.attention.query", "attn.qkv")] = np.concatenate(parts)
        else:
            hub[name] = tensor
    return hub


def state_part(state, name, part):
    return state[name.replace("blocks", "encoder.layer").replace("query", part)]


@pytest.fixture
def released(tmp_path, config):
    """Small files as the authors publish them, and a config of their sizes."""
    gae, gae_state = golden("gae_autoencoder")
    dit, dit_state = golden("lightningdit_qk1_noshift0")
    teacher, teacher_state = golden("semantic_teacher_w2")
    _, dino_state = golden("dinov2")
    inside = {f"base_model.model.{k}": v for k, v in hub_names(dino_state).items()}
    save_file(gae_state, tmp_path / "gae.safetensors")
    save_file({f"module.{k}": v for k, v in dit_state.items()}, tmp_path / "dit.safetensors")
    save_file(teacher_state | inside, tmp_path / "teacher.safetensors")
    stats = {
        "mean": np.linspace(-0.1, 0.1, 8, dtype=np.float32).reshape(1, 8, 1, 1),
        "std": np.linspace(0.5, 1.5, 8, dtype=np.float32).reshape(1, 8, 1, 1),
    }
    save_file(stats, tmp_path / "latents_stats.safetensors")
    config.data.image_size = 32
    config.tokenizer.model.update(**gae)
    config.teacher.model.update(
        latent_dim=8, decoder_layers=2, window_size=teacher["window_size"], heads=1
    )
    config.diffusion.model.update(
        hidden_size=64, depth=2, num_heads=4, num_classes=10, use_qknorm=dit["use_qknorm"]
    )
    config.backbone.name = "dinov2"
    config.backbone.dinov2.update(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=70, input_size=56
    )
    config.import_torch.tokenizer = str(tmp_path / "gae.safetensors")
    config.import_torch.diffusion = str(tmp_path / "dit.safetensors")
    config.import_torch.statistics = str(tmp_path / "latents_stats.safetensors")
    return config


def fingerprints(path):
    found = {stage: Run(path).stage(stage).done for stage in STAGES}
    return {stage: done["fingerprint"] for stage, done in found.items() if done}


def test_a_run_comes_back_bit_for_bit_and_samples_the_same(small_run, tmp_path, config, capsys):
    copy = shutil.copytree(small_run, tmp_path / "run")
    run_command("export-torch", session(config, copy))
    export = copy / "export"
    text = capsys.readouterr().out
    assert "decoder.blocks.{n}.attn.qkv.weight" in text
    assert "largest difference on a fixed batch" in text
    config.import_torch.update(
        tokenizer=str(export / "gae.safetensors"),
        diffusion=str(export / "dit.safetensors"),
        statistics=str(export / "latents_stats.safetensors"),
    )
    back = tmp_path / "back"
    run_command("import-torch", session(config, back))
    before = fingerprints(small_run)
    assert fingerprints(back) == {name: before[name] for name in ("tokenizer", "diffusion")}
    run_command("sample", session(config, back))
    for name in ("sde", "ode"):
        expected = load_set(Run(small_run).stage("sample").path, name)[0]
        np.testing.assert_array_equal(load_set(Run(back).stage("sample").path, name)[0], expected)


def test_the_exported_folder_describes_itself(small_run, tmp_path, config):
    config.export_torch.folder = str(tmp_path / "out")
    run_command("export-torch", session(config, small_run))
    out = tmp_path / "out"
    described = read_json(out / "config.json")
    manifest = LatentSet.open(small_run / "latents").manifest
    np.testing.assert_allclose(described["latents_mean"], manifest["mean"], rtol=1e-6)
    stats = load_file(out / "latents_stats.safetensors")
    assert stats["std"].shape == (1, 4, 1, 1)
    encoder = described["tokenizer"]["params"]["encoder_config"]["params"]
    assert (encoder["img_size"], encoder["patch_size"], encoder["embed_dim"]) == (16, 4, 32)
    assert described["diffusion"]["in_channels"] == 4
    card = (out / "README.md").read_text()
    for name in ("gae", "dit", "dit_raw", "teacher", "discriminator"):
        assert (out / f"{name}.safetensors").exists()
        assert f"`{name}.safetensors`" in card
    for stage in ("tokenizer", "diffusion", "teacher"):
        assert fingerprints(small_run)[stage] in card
    assert "instead of DINOv2" in card
    with pytest.raises(UserError, match="exists; pass --fresh"):
        run_command("export-torch", session(config, small_run))
    run_command("export-torch", session(config, small_run, fresh=True))
    assert not list(tmp_path.glob(".out.*"))


def test_released_files_make_a_run_that_every_later_stage_takes(released, tmp_path):
    released.evaluate.update(diagnostics=False, linear_probe="none", noise_levels=())
    validate(released)
    path = tmp_path / "run"
    run_command("import-torch", session(released, path))
    run_command("evaluate", session(released, path))
    figures = read_json(path / "evaluate" / "result.json")
    assert 0 < figures["tokenizer"]["psnr"] < 60
    assert "generation" not in figures
    done = Run(path).stage("tokenizer").done
    ((file, digest),) = done["imported"]["files"].items()
    assert file == released.import_torch.tokenizer
    assert len(digest) == 64
    run_command("latents", session(released, path))
    assert LatentSet.open(path / "latents").manifest["tokenizer"] == done["fingerprint"]
    run_command("sample", session(released, path))
    assert load_set(Run(path).stage("sample").path, "sde")[0].shape == (20, 32, 32, 3)
    with pytest.raises(UserError, match=r"evaluate \S+ --fresh"):  # there is more to evaluate now
        run_command("evaluate", session(released, path))
    run_command("evaluate", session(released, path, fresh=True))
    assert "accuracy" in read_json(path / "evaluate" / "result.json")["generation"]["sde"]


def test_every_network_may_come_in_parts(config, tmp_path):
    """The index of one field, the folder of the next; LPIPS of two such paths."""
    fields = ("dino", "vgg", "lpips_heads", "inception", "backbone", "teacher", "tokenizer")
    for i, field in enumerate((*fields, "diffusion")):
        tensors = {f"{field}.{x}": np.full(3, i, np.float32) for x in "ab"}
        index = write_parts(tmp_path / field, tensors)
        config.import_torch[field] = str(index if i % 2 else index.parent)
    sources = read_sources(session(config, tmp_path / "run"))
    found = {stage: list(source.tensors) for stage, source in sources.items()}
    assert found == {
        "lpips": ["vgg.a", "vgg.b", "lpips_heads.a", "lpips_heads.b"],
        **{x: [f"{x}.a", f"{x}.b"] for x in ("inception", "dino", *STAGES)},
    }


def test_files_in_parts_make_the_run_that_whole_files_make(released, tmp_path):
    """Through prefixes and statistics to the model card, which names all parts."""
    run_command("import-torch", session(released, tmp_path / "whole"))
    for name, field in (("gae", "tokenizer"), ("dit", "diffusion")):
        index = write_parts(tmp_path / name, load_file(tmp_path / f"{name}.safetensors"))
        released.import_torch[field] = str(index.parent)
    now = session(released, tmp_path / "parts")
    run_command("import-torch", now)
    assert fingerprints(tmp_path / "parts") == fingerprints(tmp_path / "whole")
    run_command("import-torch", now)  # the same again is no work
    run_command("export-torch", now)
    card = (tmp_path / "parts" / "export" / "README.md").read_text()
    for file in (*(tmp_path / "gae").iterdir(), *(tmp_path / "dit").iterdir()):
        assert f"`{file}` (SHA-256 `{digest(file)}`)" in card


def test_a_diffusion_model_on_statistics_of_elements(released, tmp_path):
    """RAE's file: variances [d, h, w], no mean."""
    shape = latent_shape(released)
    var = np.random.default_rng(0).uniform(0.5, 2, (shape[2], *shape[:2])).astype(np.float32)
    save_file({"var": var}, tmp_path / "stat.safetensors")
    released.import_torch.statistics = str(tmp_path / "stat.safetensors")
    now = session(released, tmp_path / "run")
    run_command("import-torch", now)
    network, arrays = load(now.run.stage("diffusion"), now.mesh)
    x = np.ones((1, *shape), np.float32)
    np.testing.assert_allclose(
        network(*arrays).normalize(x)[0], 1 / np.sqrt(np.moveaxis(var, 0, -1) + 1e-5), rtol=1e-5
    )


def test_a_teacher_brings_its_backbone(released, tmp_path):
    released.import_torch.update(
        tokenizer="", diffusion="", teacher=str(tmp_path / "teacher.safetensors")
    )
    released.backbone.dinov2.input_size = 112  # the golden teacher belongs to 8 x 8 tokens
    run_command("import-torch", session(released, tmp_path / "run"))
    assert set(fingerprints(tmp_path / "run")) == {"backbone", "teacher"}
    run_command("export-torch", session(released, tmp_path / "run"))
    expected = load_file(tmp_path / "teacher.safetensors")
    found = load_file(tmp_path / "run" / "export" / "teacher.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_a_teacher_beside_its_backbone(released, tmp_path):
    """Without the backbone inside, and refused where the two disagree."""
    _, state = golden("dinov2")
    save_file(state, tmp_path / "dinov2.safetensors")
    both = load_file(tmp_path / "teacher.safetensors")
    own = {name: x for name, x in both.items() if not name.startswith("base_model.")}
    save_file(own, tmp_path / "own.safetensors")
    released.import_torch.update(
        tokenizer="",
        diffusion="",
        teacher=str(tmp_path / "own.safetensors"),
        backbone=str(tmp_path / "dinov2.safetensors"),
    )
    released.backbone.dinov2.input_size = 112
    run_command("import-torch", session(released, tmp_path / "run"))
    beside = fingerprints(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone" / "backbone")
    run_command("export-torch", session(released, tmp_path / "alone"))
    assert load_file(tmp_path / "alone" / "export" / "teacher.safetensors").keys() == own.keys()
    assert "does not have" in (tmp_path / "alone" / "export" / "README.md").read_text()
    released.import_torch.update(teacher=str(tmp_path / "teacher.safetensors"))
    with pytest.raises(ConversionError, match="is not the one inside"):
        run_command("import-torch", session(released, tmp_path / "other"))
    released.import_torch.backbone = ""
    run_command("import-torch", session(released, tmp_path / "inside"))
    assert fingerprints(tmp_path / "inside") == beside


def test_sizes_that_differ_are_given_as_flags(released, tmp_path):
    released.tokenizer.model.update(num_layers=3, latent_dim=16)
    with pytest.raises(ConversionError) as error:
        run_command("import-torch", session(released, tmp_path / "run"))
    text = str(error.value)
    assert "--config.tokenizer.model.num_layers=2" in text
    assert "--config.tokenizer.model.latent_dim=8" in text
    released.tokenizer.model.update(num_layers=2, latent_dim=8)
    released.diffusion.model.update(use_qknorm=False, wo_shift=True, num_heads=2)
    with pytest.raises(ConversionError) as error:
        run_command("import-torch", session(released, tmp_path / "run"))
    for flag in ("use_qknorm=True", "wo_shift=False", "num_heads=4"):
        assert f"--config.diffusion.model.{flag}" in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing may be written before all files fit"


def test_tensors_that_do_not_fit_are_named_or_left_out_by_name(released, tmp_path, capsys):
    path = tmp_path / "gae.safetensors"
    state = load_file(path)
    released.import_torch.diffusion = ""
    extra = {"loss.logvar": np.zeros(1, np.float32), "extra.weight": np.zeros(3, np.float32)}
    save_file(state | extra, path)
    with pytest.raises(ConversionError, match=r"unexpected: extra.weight \[3\]") as error:
        run_command("import-torch", session(released, tmp_path / "run"))
    assert "logvar" not in str(error.value)
    released.import_torch.leave_out = ("extra.*",)
    run_command("import-torch", session(released, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "left out: extra.weight" in said
    assert "left out: loss.* (1 tensor)" in said
    done = Run(tmp_path / "run").stage("tokenizer").done
    assert done["imported"]["left_out"] == ["extra.weight"]


def test_what_the_run_has_is_not_replaced_unasked(released, tmp_path):
    path = tmp_path / "run"
    run_command("import-torch", session(released, path))
    before = fingerprints(path)
    run_command("import-torch", session(released, path))  # the same again is no work
    file = tmp_path / "gae.safetensors"
    state = load_file(file)
    save_file({name: tensor + 1 for name, tensor in state.items()}, file)
    with pytest.raises(UserError, match="already has a tokenizer"):
        run_command("import-torch", session(released, path))
    assert fingerprints(path) == before
    run_command("import-torch", session(released, path, fresh=True))
    assert fingerprints(path) != before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer": "", "diffusion": ""}, "nothing to import"),
        ({"statistics": ""}, "needs mean and std"),
        ({"tokenizer": ""}, "imported together with its tokenizer"),
        ({"tokenizer": "none.safetensors"}, "does not exist"),
        ({"backbone": "itself"}, "no backbone of the released kind"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(released, tmp_path, changes, says):
    if changes.get("backbone"):
        changes = {"backbone": released.import_torch.tokenizer}
    released.import_torch.update(changes)
    with pytest.raises(UserError, match=says):
        run_command("import-torch", session(released, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_released_backbone_is_not_trained(released, tmp_path):
    with pytest.raises(ConfigError, match=r"import-torch \S+ --config\.import_torch\.backbone"):
        run_command("backbone", session(released, tmp_path))


def test_torch_checkpoints_both_ways(released, tmp_path):
    """The released containers: state_dict, model and ema, model_state_dict, statistics."""
    torch = pytest.importorskip("torch", reason="torch is optional")

    def tensors(name):
        return {k: torch.from_numpy(v.copy()) for k, v in load_file(tmp_path / name).items()}

    torch.save({"state_dict": tensors("gae.safetensors")}, tmp_path / "gae.ckpt")
    ema = {k: v + 1 for k, v in tensors("dit.safetensors").items()}
    content = {"model": tensors("dit.safetensors"), "ema": ema, "opt": {}, "config": {"a": [1]}}
    torch.save(content, tmp_path / "dit.pt")
    torch.save(tensors("latents_stats.safetensors"), tmp_path / "latents_stats.pt")
    released.import_torch.update(
        tokenizer=str(tmp_path / "gae.ckpt"),
        diffusion=str(tmp_path / "dit.pt"),
        statistics=str(tmp_path / "latents_stats.pt"),
    )
    with pytest.raises(ConversionError, match="wrong values: feat_rope"):  # ema: tables moved too
        run_command("import-torch", session(released, tmp_path / "run"))
    released.import_torch.entry = "model"
    run_command("import-torch", session(released, tmp_path / "run"))
    assert Run(tmp_path / "run").stage("diffusion").done["weights"] == "params"
    run_command("export-torch", session(released, tmp_path / "run"))
    export = tmp_path / "run" / "export"
    found = torch.load(export / "gae.ckpt", weights_only=True)["state_dict"]
    for name, tensor in tensors("gae.safetensors").items():
        assert torch.equal(found[name], tensor), name
    assert set(torch.load(export / "dit.pt", weights_only=True)) == {"model"}
    stats = torch.load(export / "latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == (1, 8, 1, 1)


@pytest.mark.slow
def test_the_network_of_fid_becomes_a_stage_and_judges_samples(small_run, tmp_path, config):
    """A whole file with published names and random numbers, and then FID of a run's samples."""
    table = metric_tables.INCEPTION
    network = Network(lambda rngs: FIDInception(rngs=rngs))
    rng = np.random.default_rng(0)
    params, rest = (
        jax.tree.map(lambda x: 0.05 * rng.standard_normal(x.shape, np.float32), part)
        for part in network.abstract
    )
    tensors = export_torch(table, params, jax.tree.map(np.abs, rest))
    path = tmp_path / "inception.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    run = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(run / "evaluate")
    config.import_torch.inception = str(path)
    run_command("import-torch", session(config, run))
    assert Run(run).stage("inception").done["imported"]["files"] == {str(path): digest(path)}
    shutil.rmtree(run / "sample" / "ode")
    done = read_json(run / "sample" / "done.json")
    write_json(run / "sample" / "done.json", {**done, "sets": ["sde"]})
    config.data.holdout = 0.995  # a handful of training images: the network is a large one
    config.evaluate.update(
        features="inception", allow_few=True, metrics=("fid", "precision"), images=4,
        noise_levels=(), batch_size=8, diagnostics=False, linear_probe="none",
    )  # fmt: skip
    folder = evaluate.run(session(config, run))
    result = read_json(folder.path / "result.json")
    assert result["tokenizer"]["rfid_4"] > 0
    assert np.isfinite(result["generation"]["sde"]["fid_20"])
    facts = result["manifest"]["generation"]
    assert facts["extractor_weights"] == Run(run).stage("inception").done["fingerprint"]


@pytest.mark.slow
def test_dino_becomes_what_a_discriminator_looks_through(tmp_path, config):
    """A whole file with published names and random numbers; the bias of keys does not count."""
    network = Network(lambda rngs: DinoFeatures(rngs=rngs))
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: 0.05 * rng.standard_normal(x.shape, np.float32),
                          network.abstract)  # fmt: skip
    tensors = export_torch(rae_tables.DINO, *arrays)
    own = {name: np.ascontiguousarray(x) for name, x in tensors.items() if name[:3] != "x_s"}
    path = tmp_path / "dino.safetensors"
    save_file(own, path)
    config.import_torch.dino = str(path)
    imported = session(config, tmp_path / "run")
    run_command("import-torch", imported)
    _, (params, _) = load_many(imported, "dino")["dino"]
    np.testing.assert_array_equal(
        params["blocks"]["3"]["attn"]["proj"]["kernel"],
        arrays[0]["blocks"]["3"]["attn"]["proj"]["kernel"],
    )
    bias = np.asarray(params["blocks"]["3"]["attn"]["qkv"]["bias"])
    assert not np.any(bias[384:768])
    np.testing.assert_array_equal(bias[:384], arrays[0]["blocks"]["3"]["attn"]["qkv"]["bias"][:384])
