"""Released latents become a run's latents and back: bit for bit, statistics, refusals, resume."""

import logging
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_zip import write_torch

from gae_jax.commands.cli import run_command
from gae_jax.data.latents import LatentSet
from gae_jax.interop.convert import ConversionError
from gae_jax.interop.signatures import WeightFileError
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import DataError, UserError
from gae_jax.runtime.files import read_json

COUNTS = {(0, 0): 6, (0, 1): 3, (1, 0): 5}  # (rank, shard) -> images


def session(config, path, **more):
    return Session(config, Run(path), devices=tuple(jax.devices()[:1]), **more)


def name_of(rank, shard):
    return f"latents_rank{rank:02}_shard{shard:03}.safetensors"


def tensors_of(count, seed):
    """One file as the released code writes it, for the small tokenizer's 4 x 4 x 4."""
    rng = np.random.default_rng(seed)
    latents, flipped = rng.normal(0.5, 2.0, (2, count, 4, 4, 4)).astype(np.float32)
    return {"latents": latents, "latents_flip": flipped, "labels": rng.integers(0, 10, count)}


@pytest.fixture
def released(tmp_path):
    """A folder of two ranks, written out of order."""
    folder = tmp_path / "released"
    folder.mkdir()
    for at, (rank, shard) in reversed(list(enumerate(COUNTS))):
        save_file(tensors_of(COUNTS[rank, shard], at), folder / name_of(rank, shard))
    return folder


@pytest.fixture
def run(small_run, tmp_path):
    """A run that has a tokenizer alone."""
    shutil.copytree(small_run / "tokenizer", tmp_path / "run" / "tokenizer")
    return tmp_path / "run"


def take(config, folder, run, **more):
    """Imports the folder and returns the set."""
    config.import_torch.latents = str(folder)
    run_command("import-torch", session(config, run, **more))
    return LatentSet.open(run / "latents")


def change(folder, rank=0, shard=1, **tensors):
    """Writes a file again with other tensors; None takes one out."""
    path = folder / name_of(rank, shard)
    content = load_file(path) | tensors
    save_file({name: x for name, x in content.items() if x is not None}, path)


def save_statistics(folder, mean, std):
    stats = {"mean": mean, "std": std}
    stats = {name: np.float32(x).reshape(1, -1, 1, 1) for name, x in stats.items()}
    save_file(stats, folder / "latents_stats.safetensors")


def exact(folder):
    """(mean, std) in float64 over all images, views and positions."""
    files = [load_file(path) for path in folder.glob("latents_rank*")]
    views = [file[name] for file in files for name in ("latents", "latents_flip")]
    values = np.concatenate(views).astype(np.float64)
    return values.mean(axis=(0, 2, 3)), values.std(axis=(0, 2, 3))


def test_files_of_two_ranks_become_shards_in_their_order(released, run, config):
    found = take(config, released, run)
    files = [load_file(released / name_of(*key)) for key in COUNTS]
    views = found.views()[:]
    for at, name in enumerate(("latents", "latents_flip")):
        expected = np.concatenate([file[name] for file in files]).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(views[:, at], expected)
    np.testing.assert_array_equal(found.labels, np.concatenate([f["labels"] for f in files]))
    mean, std = exact(released)
    np.testing.assert_allclose(found.manifest["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(found.manifest["std"], std, rtol=1e-12)
    tokenizer = Run(run).stage("tokenizer").done["fingerprint"]
    assert found.manifest["tokenizer"] == tokenizer
    assert found.manifest["views"] == ["image", "mirror"]
    assert found.manifest["source"]["files"] == [name_of(*key) for key in COUNTS]
    assert (found.manifest["imported"], found.manifest["statistics"]) == (True, "exact")
    assert [shard["count"] for shard in found.manifest["shards"]] == list(COUNTS.values())
    done = Run(run).stage("latents").done
    assert (done["count"], done["skipped"], done["imported"]) == (14, 0, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_bit_for_bit(released, run, tmp_path, config, dtype):
    config.latents.dtype = dtype
    first = take(config, released, run)
    config.export_torch.networks = ("latents",)
    run_command("export-torch", session(config, run))
    export = run / "export" / "latents"
    names = [f"latents_rank00_shard{i:03}.safetensors" for i in range(3)]
    # the released dataset class takes every .safetensors for latents
    assert sorted(path.name for path in export.glob("*.safetensors")) == names
    for name, key in zip(names, COUNTS, strict=True):
        after, before = load_file(export / name), load_file(released / name_of(*key))
        assert after["labels"].dtype == np.int64
        for tensor, value in before.items():
            if tensor != "labels":
                value = value.astype(first.views().dtype)
            np.testing.assert_array_equal(after[tensor], value)
            assert after[tensor].dtype == value.dtype
    stats = load_file(run / "export" / "latents_stats.safetensors")
    np.testing.assert_array_equal(stats["mean"].ravel(), first.mean)
    assert "(14 images): made by" in (run / "export" / "README.md").read_text()
    for path in export.glob("*.pt"):  # where torch is installed
        path.unlink()
    shutil.copytree(run / "tokenizer", tmp_path / "back" / "tokenizer")
    again = take(config, export, tmp_path / "back")
    for key in ("shards", "mean", "std", "views", "dtype"):  # shards have digests of the content
        assert again.manifest[key] == first.manifest[key]


def test_extracted_latents_without_mirror_images(small_run, tmp_path, config, caplog):
    config.export_torch.update(networks=("latents",), folder=str(tmp_path / "out"))
    with caplog.at_level(logging.WARNING):
        run_command("export-torch", session(config, small_run))
    assert "no latents_flip, which the released ImgLatentDataset reads" in caplog.text
    file = load_file(tmp_path / "out" / "latents" / "latents_rank00_shard000.safetensors")
    assert set(file) == {"latents", "labels"}
    for path in (tmp_path / "out" / "latents").glob("*.pt"):
        path.unlink()
    shutil.copytree(small_run / "tokenizer", tmp_path / "run" / "tokenizer")
    found = take(config, tmp_path / "out" / "latents", tmp_path / "run")
    expected = LatentSet.open(small_run / "latents")
    np.testing.assert_array_equal(found.views()[:], expected.views()[:])
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.manifest["mean"] == expected.manifest["mean"]


def test_latents_are_exported_when_asked_for(small_run, tmp_path, config):
    config.export_torch.folder = str(tmp_path / "out")
    config.export_torch.networks = ("diffusion",)
    run_command("export-torch", session(config, small_run))
    assert not (tmp_path / "out" / "latents").exists()
    config.export_torch.networks = ("weights",)
    with pytest.raises(UserError, match=r"\['weights'\] unknown; use .*'latents'"):
        run_command("export-torch", session(config, small_run))


def test_imported_statistics_stand_before_the_exact_ones(released, run, config, caplog):
    mean, std = exact(released)
    save_statistics(released, mean + 0.25 * std, std)
    with caplog.at_level(logging.WARNING):
        found = take(config, released, run)
    assert "differ from the exact ones of these latents by up to 0.25 std" in caplog.text
    assert found.manifest["statistics"] == "imported"
    np.testing.assert_array_equal(found.mean, np.float32(mean + 0.25 * std))
    np.testing.assert_array_equal(found.std, np.float32(std))
    np.testing.assert_allclose(found.manifest["exact_mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(found.manifest["exact_std"], std, rtol=1e-12)


def test_statistics_that_agree_are_not_warned_of(released, run, config, caplog):
    mean, std = exact(released)
    save_statistics(released, mean, 1.009 * std)
    with caplog.at_level(logging.WARNING):
        found = take(config, released, run)
    assert not caplog.records
    assert found.manifest["statistics"] == "imported"


def test_torch_statistics_come_without_torch(released, run, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (released / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(WeightFileError, match=r"latents_stats.pt is empty"):
        take(config, released, run)
    stats = {"mean": np.full((1, 4, 1, 1), 0.25), "std": np.full((1, 4, 1, 1), 2.0)}
    write_torch(released / "latents_stats.pt", stats)
    assert take(config, released, run).std.tolist() == [2.0] * 4


def test_torch_statistics_both_ways(released, run, config):
    torch = pytest.importorskip("torch", reason="torch is optional")
    stats = {"mean": torch.full((1, 4, 1, 1), 0.25), "std": torch.full((1, 4, 1, 1), 2.0)}
    torch.save(stats, released / "latents_stats.pt")
    assert take(config, released, run).std.tolist() == [2.0] * 4
    config.export_torch.networks = ("latents",)
    run_command("export-torch", session(config, run))
    written = torch.load(run / "export" / "latents" / "latents_stats.pt", weights_only=True)
    assert all(torch.equal(written[name], value) for name, value in stats.items())


def test_half_precision_files(released, run, config):
    """What a released encoder in half precision writes is kept exactly in float32."""
    latents = load_file(released / name_of(0, 1))
    change(released, latents=latents["latents"].astype(ml_dtypes.bfloat16))
    change(released, latents_flip=latents["latents_flip"].astype(np.float16))
    views = take(config, released, run).views()[6:9]
    half = latents["latents"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(views[:, 0], half.transpose(0, 2, 3, 1))
    half = latents["latents_flip"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(views[:, 1], half.transpose(0, 2, 3, 1))


ZEROS = np.zeros((3, 4, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latents": np.zeros((3, 5, 4, 4), np.float32)}, r"latents is \[3, 5, 4, 4\], the run's"),
        ({"latents_flip": ZEROS[:, :, :2]}, r"latents_flip is \[3, 4, 2, 4\]"),
        ({"latents": ZEROS[:, 0]}, r"latents is \[3, 4, 4\]"),
        ({"latents": None}, "has no tensor 'latents', it has"),
        ({"labels": None}, "has no tensor 'labels', it has"),
        ({"labels": np.zeros(4, np.int64)}, "labels is of 4 images, latents of 3"),
        ({"latents_flip": ZEROS[:2]}, "latents_flip is of 2 images, latents of 3"),
        ({"latents": ZEROS.astype(np.int32)}, "latents has dtype I32; save it as float32"),
        ({"labels": np.zeros(3, np.float32)}, "of dtype F32; they must be integers"),
        ({"labels": np.zeros((3, 1), np.int64)}, r"labels are \[3, 1\]"),
        ({"labels": np.array([0, -1, 2])}, "labels go from -1 to 2; number the classes"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_written(
    released, run, config, changes, says
):
    change(released, **changes)
    with pytest.raises(DataError, match=rf"rank00_shard001\.safetensors.*{says}"):
        take(config, released, run)
    assert not (run / "latents").exists()


def test_a_mirror_view_in_some_files_only_is_refused_by_name(released, run, config):
    change(released, 1, 0, latents_flip=None)
    with pytest.raises(DataError, match=r"1 of 3 files have no latents_flip: latents_rank01_sha"):
        take(config, released, run)
    for key in ((0, 0), (0, 1)):
        change(released, *key, latents_flip=None)
    assert take(config, released, run).manifest["views"] == ["image"]


def test_folders_that_are_none_of_released_latents(released, run, config, caplog):
    with pytest.raises(DataError, match=r"holds no latents_rankRR_shardSSS\.safetensors"):
        take(config, released / "none", run)
    shutil.copy(released / name_of(0, 0), released / "other.safetensors")
    with pytest.raises(
        DataError, match=r"other\.safetensors is not called latents_rankRR_shardSSS"
    ):
        take(config, released, run)
    (released / "other.safetensors").unlink()
    path = released / name_of(0, 1)
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(
        DataError, match=r"shard001\.safetensors is not a complete safetensors file"
    ):
        take(config, released, run)
    path.unlink()
    (released / name_of(0, 0)).rename(released / name_of(0, 2))
    with caplog.at_level(logging.WARNING):
        assert len(take(config, released, run)) == 11
    assert "lacks 2 files by its numbering: rank 0, shard 0; rank 0" in caplog.text


def test_a_folder_without_images(released, run, config):
    for key in COUNTS:
        change(released, *key, **tensors_of(0, 0))
    with pytest.raises(DataError, match="its 3 files hold no image"):
        take(config, released, run)
    change(released, 0, 1, **tensors_of(3, 0))  # an empty file beside others is none to refuse
    found = take(config, released, run)
    assert [shard["count"] for shard in found.manifest["shards"]] == [0, 3, 0]
    np.testing.assert_array_equal(found[1]["label"], tensors_of(3, 0)["labels"][1])


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        (np.zeros(5), np.ones(5), "must hold mean and std of 4 channels"),
        (np.zeros(4), np.zeros(4), "a std is not above 0"),
        (np.full(4, np.nan), np.ones(4), "mean or std is not finite"),
    ],
)
def test_statistics_that_cannot_be_used(released, run, config, mean, std, says):
    save_statistics(released, mean, std)
    with pytest.raises(ConversionError, match=says):
        take(config, released, run)
    assert not (run / "latents").exists()


def test_the_tokenizer_comes_first(released, tmp_path, config):
    with pytest.raises(UserError, match="does not say who made it, is imported together with its"):
        take(config, released, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_latents_that_are_not_finite_keep_the_shards_before_them(released, run, config):
    good = load_file(released / name_of(0, 1))["latents"]
    bad = good.copy()
    bad[2, 1, 0, 3] = np.nan
    change(released, latents=bad)
    with pytest.raises(DataError, match=r"shard001\.safetensors: latents\[2\] is not finite"):
        take(config, released, run)
    assert not Run(run).stage("latents").done
    first = run / "latents" / "latents-00000.npy"
    before = first.stat().st_mtime_ns
    change(released, latents=good)  # the same names and sizes: it goes on
    assert len(take(config, released, run)) == 14
    assert first.stat().st_mtime_ns == before


def test_an_interrupted_import_goes_on_with_what_is_missing(released, run, config):
    expected = take(config, released, run).manifest
    folder = run / "latents"
    for name in ("done.json", "manifest.json", "shard-00001.json"):
        (folder / name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert take(config, released, run).manifest == expected
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    written = {name for name in after if after[name] != before.get(name)}
    again = {"shard-00001.json", "latents-00001.npy", "labels-00001.npy"}
    assert written == again | {"done.json", "manifest.json"}
    (folder / "done.json").unlink()
    config.latents.dtype = "bfloat16"
    with pytest.raises(UserError, match=r"latents\.dtype: 'float32' there, 'bfloat16' asked for"):
        take(config, released, run)
    with pytest.raises(UserError, match="made by another config"):  # nor are the two mixed
        run_command("latents", session(config, run))


def test_latents_that_are_there_are_not_replaced_unasked(released, run, config):
    before = take(config, released, run).manifest
    assert take(config, released, run).manifest == before
    change(released, 1, 0, **tensors_of(7, 9))
    with pytest.raises(
        UserError, match=r"already holds other latents \(differing: source\).*--fresh"
    ):
        take(config, released, run)
    assert LatentSet.open(run / "latents").manifest == before
    assert len(take(config, released, run, fresh=True)) == 16


def test_a_diffusion_model_trains_on_imported_latents(released, run, config):
    mean, std = exact(released)
    save_statistics(released, mean, 1.005 * std)
    found = take(config, released, run)
    run_command("latents", session(config, run))  # is finished
    assert LatentSet.open(run / "latents").manifest == found.manifest
    config.diffusion.train.update(steps=2, batch_size=8)
    run_command("diffusion", session(config, run))
    done = Run(run).stage("diffusion").done
    assert done["tokenizer"] == found.manifest["tokenizer"]
    inputs = read_json(run / "diffusion" / "config.json")["inputs"]
    assert inputs == {"latents": Run(run).stage("latents").done["fingerprint"]}
    config.export_torch.networks = ("diffusion",)
    run_command("export-torch", session(config, run))
    stats = load_file(run / "export" / "latents_stats.safetensors")
    np.testing.assert_array_equal(stats["std"].ravel(), np.float32(1.005 * std))
