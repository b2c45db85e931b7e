"""prepare-data goes on after the remedies that its errors name, and after a kill."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import imagenet
import pytest

from gae_jax.commands import cli, prepare_data
from gae_jax.data import shards
from gae_jax.runtime.errors import DataError, UserError


def prepare(*arguments):
    return prepare_data.main(["--workers=1", *map(str, arguments)])


@pytest.fixture
def tree(tmp_path):
    return imagenet.write_tree(tmp_path / "tree")


def manifest_in(folder):
    return json.loads((folder / "manifest.json").read_text())


def contents(folder):
    """Name -> bytes of all shards, and what the manifest says of the splits."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.array_record")}
    return files, manifest_in(folder)["splits"], manifest_in(folder)["class_names"]


def mark(folder):
    """The names of the finished shards, whose files get an old time."""
    names = [
        shard["name"]
        for split in manifest_in(folder)["splits"].values()
        for shard in split["shards"]
    ]
    for name in names:
        os.utime(folder / name, (1, 1))
    return set(names)


def untouched(folder):
    return {path.name for path in folder.glob("*.array_record") if path.stat().st_mtime == 1}


@pytest.mark.parametrize(
    ("remedy", "workers"), [("skip", 1), ("removed", 1), ("mended", 1), ("removed", 3)]
)
def test_a_corrupt_image_costs_no_finished_shard(tree, tmp_path, remedy, workers):
    bad = tree / "train/n01443537/n01443537_7.JPEG"  # in the third shard of five
    whole = bad.read_bytes()
    bad.write_bytes(whole[:700])
    out, arguments = tmp_path / "out", [f"--source={tree}", "--shard-images=2"]
    arguments.append(f"--workers={workers}")
    with pytest.raises(DataError, match=r"n01443537_7.JPEG cannot be read as an image"):
        prepare(*arguments, f"--out={out}")
    finished = mark(out)
    assert len(finished) >= 2
    if remedy == "skip":
        arguments.append("--on-corrupt=skip")
    elif remedy == "removed":
        bad.unlink()
    else:
        bad.write_bytes(whole)
    prepare(*arguments, f"--out={out}")
    prepare(*arguments, f"--out={tmp_path}/at-once")
    assert contents(out) == contents(tmp_path / "at-once")
    assert manifest_in(out)["made_of"] == manifest_in(tmp_path / "at-once")["made_of"]
    before = {f"train-0000{i}-of-00005.array_record" for i in range(2)}
    if remedy == "removed":  # one shard fewer: those before it have other names, and are the same
        before = {name.replace("of-00005", "of-00004") for name in before}
        assert before <= untouched(out)
    else:
        assert untouched(out) == finished
    prepare(f"--verify={out}")
    assert not list(out.glob(".*"))


def test_a_class_whose_images_are_removed_shifts_the_others(tree, tmp_path):
    """Labels are in the records: shards of classes behind it cannot stay."""
    out, arguments = tmp_path / "out", (f"--source={tree}", "--shard-images=3")
    bad = tree / "val/n01484850" / "ILSVRC2012_val_00000001.JPEG"
    bad.write_bytes(b"no")
    with pytest.raises(DataError):
        prepare(*arguments, f"--out={out}")
    assert len(mark(out)) == 4
    shutil.rmtree(tree / "train/n01443537")
    shutil.rmtree(tree / "val/n01443537")
    bad.unlink()
    prepare(*arguments, f"--out={out}")
    prepare(*arguments, f"--out={tmp_path}/at-once")
    assert contents(out) == contents(tmp_path / "at-once")
    assert untouched(out) == {"train-00000-of-00002.array_record"}


def test_shards_may_change_places(tree, tmp_path):
    """A shard moves to a name that another one has: it is made again, and nothing is mixed up."""
    out, arguments = tmp_path / "out", (f"--source={tree}", "--shard-images=1")
    last = tree / "train/n01484850/n01484850_7.JPEG"
    whole = last.read_bytes()
    last.write_bytes(b"no")
    with pytest.raises(DataError):
        prepare(*arguments, f"--out={out}")
    (tree / "train/n01440764/n01440764_10026.JPEG").unlink()
    last.write_bytes(whole)
    (tree / "train/n01440764/n01440764_8.JPEG").write_bytes(imagenet.jpegs(3, 1)[0])
    prepare(*arguments, f"--out={out}")
    prepare(*arguments, f"--out={tmp_path}/at-once")
    assert contents(out) == contents(tmp_path / "at-once")
    prepare(f"--verify={out}")


def test_a_finished_set_is_not_replaced_without_fresh(tree, tmp_path):
    out, arguments = tmp_path / "out", (f"--source={tree}", "--shard-images=4")
    bad = tree / "train/n01440764/n01440764_7.JPEG"
    bad.write_bytes(b"no")
    prepare(*arguments, f"--out={out}", "--on-corrupt=skip")
    before = contents(out)
    for other in (arguments, (*arguments, "--on-corrupt=skip", "--shard-images=2")):
        with pytest.raises(UserError, match=r"(?s)with other options:.* there, .*--fresh"):
            prepare(*other, f"--out={out}")
    bad.unlink()
    with pytest.raises(UserError, match="other images"):
        prepare(*arguments, f"--out={out}")
    assert contents(out) == before


def test_options_that_change_no_shard_are_taken(tree, tmp_path):
    out, arguments = tmp_path / "out", (f"--source={tree}", f"--out={tmp_path}/out")
    prepare(*arguments)
    finished = mark(out)
    for option in ("--on-corrupt=skip", "--no-check"):
        prepare(*arguments, option)
        assert untouched(out) == finished
    assert manifest_in(out)["complete"]


def test_a_damaged_manifest_is_named_with_its_remedy(tree, tmp_path):
    out, arguments = tmp_path / "out", (f"--source={tree}", f"--out={tmp_path}/out")
    prepare(*arguments)
    good = contents(out)
    manifest = out / "manifest.json"
    for content in (b"", b"{", b"\xff\xfe", b'{"format": "gae_jax images", "version": 1}'):
        manifest.write_bytes(content)
        with pytest.raises(UserError, match=r"manifest\.json .*"):
            prepare(f"--verify={out}")
        with pytest.raises(UserError, match=r"manifest\.json .*--fresh"):
            prepare(*arguments)
    prepare(*arguments, "--fresh")
    assert contents(out) == good


def test_two_at_once_do_not_write_into_one_folder(tree, tmp_path):
    from gae_jax.data.shard_folder import claimed

    with (
        claimed(tmp_path / "out"),
        pytest.raises(UserError, match=r"another prepare-data is writing into .*/out; wait"),
    ):
        prepare(f"--source={tree}", f"--out={tmp_path}/out")
    prepare(f"--source={tree}", f"--out={tmp_path}/out")


KILLED = """
import os, signal, sys
from gae_jax.data import shards, shard_folder
from gae_jax.commands import prepare_data
left = int(sys.argv[1])
def dying(call):
    def counted(*arguments, **more):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **more)
    return counted
os.replace, os.fsync = dying(os.replace), dying(os.fsync)
shards.pack, shards.sha256 = dying(shards.pack), dying(shards.sha256)
prepare_data.main(sys.argv[2:])
"""


def test_killed_anywhere_it_goes_on_to_the_same_set(tree, tmp_path):
    """Killed again and again, each session a little later than the one before."""
    arguments = [f"--source={tree}", "--shard-images=4", "--workers=1"]
    out = tmp_path / "out"
    for after in (1, 4, 9, 15):
        command = [sys.executable, "-c", KILLED, str(after), *arguments, f"--out={out}"]
        status = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}).returncode
        assert status == -signal.SIGKILL
        if (out / "manifest.json").exists():
            for split in manifest_in(out)["splits"].values():
                for shard in split["shards"]:
                    assert shards.sha256(out / shard["name"]) == shard["sha256"]
    prepare(*arguments, f"--out={out}")
    prepare(*arguments, f"--out={tmp_path}/at-once")
    assert contents(out) == contents(tmp_path / "at-once")
    assert not list(out.glob(".*"))


def test_room_on_the_disk_is_compared_first(tree, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=300_000))
    arguments = (f"--source={tree}", f"--out={tmp_path}/out", "--shard-images=4")
    with pytest.raises(DataError, match=r"the shards need 0\.7 MB, but .*/out has 0\.3 MB free"):
        prepare(*arguments)
    assert not list((tmp_path / "out").glob("*.array_record"))
    monkeypatch.undo()
    prepare(*arguments)
    used = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert used < 0.7e6
    assert "writes 0.7 MB, " in caplog.text


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--out=gs://b/imagenet", "gcloud storage cp -r DIR/* gs://b/imagenet/ ;"),
        ("--out=gs://b/imagenet", "--config.data.root=gs://b/imagenet (pip install gcsfs)"),
        ("--out=s3://b/x", "writes to local folders only"),
        ("--source=gs://b/x", "gcloud storage cp -r gs://b/x DIR"),
        ("--source=hf://b/x", "download it, or mount it"),
        ("--train-tar=https://x/y.tar", "download it, or mount it"),
        ("--verify=gs://b/x", "reads local files only"),
        ("--out=", "--out is empty; give a path"),
    ],
)
def test_remote_places_are_refused(tree, tmp_path, monkeypatch, capsys, option, says):
    monkeypatch.chdir(tmp_path)
    given = {"--source": str(tree), "--out": "out"} | dict([option.split("=", 1)])
    if "--train-tar" in given:
        del given["--source"]
    command = ["gae_jax", "prepare-data", *(f"{key}={value}" for key, value in given.items())]
    assert cli.main(command) == 1
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
