"""prepare-data: trees and the official tars to the same shards, whole or not at all."""

import json
import logging
import os
import resource
import shutil
import signal
import tarfile

import imagenet
import numpy as np
import pytest

from gae_jax.commands import cli, prepare_data
from gae_jax.data import imagenet as known
from gae_jax.data import shards
from gae_jax.data.sources import SPLITS
from gae_jax.data.sources.array_record import ArrayRecords
from gae_jax.data.sources.folder import Folder
from gae_jax.runtime.errors import DataError, UserError


def prepare(*arguments):
    """Of the command's own function, so that errors reach the test."""
    return prepare_data.main(["--workers=1", *map(str, arguments)])


@pytest.fixture
def tree(tmp_path):
    return imagenet.write_tree(tmp_path / "tree")


@pytest.fixture
def tars(tmp_path):
    return imagenet.write_tars(tmp_path / "tars")


def manifest_in(folder):
    return json.loads((folder / "manifest.json").read_text())


def shards_in(folder):
    """Name -> checksum, as the manifest has them."""
    splits = manifest_in(folder)["splits"].values()
    return {shard["name"]: shard["sha256"] for split in splits for shard in split["shards"]}


def records_of(folder, split):
    source = ArrayRecords(str(folder), split)
    return [source._record(index) for index in range(len(source))]


def test_help_and_the_list_of_commands(capsys):
    assert cli.main(["gae_jax", "prepare-data", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--source", "--train-tar", "--val-labels", "--devkit", "--verify", "--on-corrupt"):
        assert word in text
    cli.main(["gae_jax"])
    assert "prepare-data" in capsys.readouterr().out


def test_a_tree_becomes_shards_that_hold_the_very_files(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(f"--source={tree}", f"--out={out}", "--shard-images=4") == 0
    assert capsys.readouterr().out.strip() == str(out / "manifest.json")
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        *(f"train-0000{i}-of-00003.array_record" for i in range(3)),
        *(f"val-0000{i}-of-00002.array_record" for i in range(2)),
    ]
    for split, rows in imagenet.images().items():
        wanted = sorted(([*imagenet.CLASSES].index(wnid), *rest) for wnid, *rest in rows)
        found = records_of(out, {"train": "train", "val": "holdout"}[split])
        assert [tuple(record) for record in found] == wanted
    manifest = manifest_in(out)
    assert manifest["class_names"] == [*imagenet.CLASSES]
    assert manifest["complete"]
    assert manifest["splits"]["train"]["class_counts"] == [3, 3, 3]
    assert [shard["count"] for shard in manifest["splits"]["train"]["shards"]] == [4, 4, 1]
    for shard in manifest["splits"]["val"]["shards"]:
        assert (out / shard["name"]).stat().st_size == shard["bytes"]
        assert shards.sha256(out / shard["name"]) == shard["sha256"]


def test_the_official_tars_give_the_shards_of_the_tree(tree, tars, tmp_path):
    prepare(f"--source={tree}", f"--out={tmp_path}/a", "--shard-images=4")
    prepare(
        *(f"--train-tar={tars['train']}", f"--val-tar={tars['val']}", f"--devkit={tars['devkit']}"),
        *(f"--out={tmp_path}/b", "--shard-images=4"),
    )
    assert shards_in(tmp_path / "a") == shards_in(tmp_path / "b")


def test_processes_give_the_same_shards(tree, tmp_path):
    arguments = (f"--source={tree}", "--shard-images=2")
    prepare(*arguments, f"--out={tmp_path}/a")
    prepare(*arguments, f"--out={tmp_path}/b", "--workers=2")
    assert shards_in(tmp_path / "a") == shards_in(tmp_path / "b")
    assert len(shards_in(tmp_path / "a")) == 8


def test_an_error_in_a_process_leaves_what_was_done(tree, tmp_path):
    (tree / "train/n01440764/n01440764_1003.JPEG").write_bytes(b"no")
    arguments = (f"--source={tree}", "--shard-images=2", f"--out={tmp_path}/a", "--workers=2")
    with pytest.raises(DataError, match=r"n01440764_1003.JPEG cannot be read as an image"):
        prepare(*arguments)
    done = shards_in(tmp_path / "a")
    assert not manifest_in(tmp_path / "a")["complete"]
    assert "train-00000-of-00005.array_record" not in done
    assert not list((tmp_path / "a").glob(".*"))
    for name in done:
        os.utime(tmp_path / "a" / name, (1, 1))
    good = imagenet.jpegs(5, 1)[0]
    (tree / "train/n01440764/n01440764_1003.JPEG").write_bytes(good)
    prepare(*arguments)
    assert manifest_in(tmp_path / "a")["complete"]
    for name in done:
        assert (tmp_path / "a" / name).stat().st_mtime == 1


@pytest.mark.parametrize("there", ["all", "of these classes", "too few"])
@pytest.mark.parametrize("given", ["list", "file"])
def test_flat_validation_images_of_some_classes(tmp_path, there, given, monkeypatch, caplog):
    """Of ImageNet's classes the training images have two; labels are known for all images."""
    root, rows = imagenet.write_tree(tmp_path / "tree"), imagenet.images()["val"]
    left = next(iter(imagenet.CLASSES))
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "train" / left)
    (root / "val").mkdir()
    kept = [row for row in rows if there == "all" or row[0] != left]
    kept = kept[1:] if there == "too few" else kept
    for _, name, content in kept:
        (root / "val" / name).write_bytes(content)
    flags = []
    if given == "file":
        flags = [f"--val-labels={tmp_path / 'labels.txt'}"]
        (tmp_path / "labels.txt").write_text("".join(f"{name} {c}\n" for c, name, _ in rows))
    else:
        ordered, listed = tuple(wnid for wnid, _, _ in rows), known.listed
        monkeypatch.setattr(
            known, "listed", lambda file: ordered if file.startswith("val") else listed(file)
        )
    command = [f"--source={root}", f"--out={tmp_path / 'out'}", *flags]
    if (there, given) == ("too few", "list"):
        with pytest.raises(DataError, match=rf"{rows[0][1]} is missing; fetch"):
            prepare_data.main([*command, "--workers=1"])
        return
    prepare(*command)
    found = ArrayRecords(str(tmp_path / "out"), "holdout")
    assert found.class_names == [*imagenet.CLASSES][1:]
    wanted = sorted(found.class_names.index(c) for c, _, _ in kept if c != left)
    assert sorted(found.labels) == wanted
    assert ("of classes without training images, such as" in caplog.text) == (there == "all")


@pytest.mark.parametrize(
    "labels",
    ["names", "names with commas", "ids with the devkit", "devkit"],
)
@pytest.mark.parametrize("kind", ["tar", "flat folder"])
def test_labels_of_flat_validation_images(tree, tars, tmp_path, labels, kind):
    rows, file = imagenet.images()["val"], tmp_path / "labels.txt"
    arguments = [f"--val-labels={file}", f"--devkit={tars['devkit']}"]
    if labels.startswith("names"):
        del arguments[1]
        text = [f"{name} {wnid}" for wnid, name, _ in rows]
        if "commas" in labels:  # as LOC_val_solution.csv
            text = ["ImageId,PredictionString"]
            text += [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4" for wnid, name, _ in rows]
        file.write_text("\n".join(text) + "\n\n")
    elif labels == "devkit":
        del arguments[0]
    else:
        file.write_text("\n".join(str(imagenet.CLASSES[wnid]) for wnid, _, _ in rows))
    if kind == "tar":
        given = [f"--train-tar={tars['train']}", f"--val-tar={tars['val']}"]
    else:
        flat = tmp_path / "flat"
        (flat / "val").mkdir(parents=True)
        (tree / "train").rename(flat / "train")
        for _, name, content in rows:
            (flat / "val" / name).write_bytes(content)
        given = [f"--source={flat}"]
    prepare(*given, *arguments, f"--out={tmp_path}/out")
    found = {record.name: record.label for record in records_of(tmp_path / "out", "holdout")}
    assert found == {name: [*imagenet.CLASSES].index(wnid) for wnid, name, _ in rows}


def test_the_list_of_labels_that_is_installed_is_imagenets():
    labels = known.read_val_labels(None, None).classes
    assert len(labels) == 50_000
    classes, counts = np.unique(labels, return_counts=True)
    assert len(classes) == 1000
    assert set(counts) == {50}
    # the first three of the ground truth, as published
    assert list(labels[:3]) == ["n01751748", "n09193705", "n02105855"]


def test_labels_of_other_images_are_refused(tars, tmp_path):
    file = tmp_path / "labels.txt"
    given = (f"--val-tar={tars['val']}", f"--out={tmp_path}/out")
    with pytest.raises(DataError, match="has 50000 labels, there are 6 validation images"):
        prepare(*given)
    for text, says in (
        (
            "ILSVRC2012_val_00000001.JPEG n01440764",
            "no class of 5 validation images in .*val.tar, such as",
        ),
        ("1\n2\n3", "the line '1' is not NAME CLASS; a file of ILSVRC2012 ids needs --devkit"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=says):
            prepare(*given, f"--val-labels={file}")
    for text, says in (("1\n2\n3", "has 3 labels"), ("1\n1001", "'1001' is no id of an ILSVRC")):
        file.write_text(text)
        with pytest.raises(DataError, match=says):
            prepare(*given, f"--val-labels={file}", f"--devkit={tars['devkit']}")
    rows = imagenet.images()["val"]
    file.write_text("\n".join(f"{name} n09999999" for _, name, _ in rows))
    with pytest.raises(DataError, match=r"classes that the training images of .* lack: n09999999"):
        prepare(*given, f"--train-tar={tars['train']}", f"--val-labels={file}")
    with pytest.raises(DataError, match=r"--devkit: .* cannot be read .* as published"):
        prepare(*given, f"--devkit={tars['val']}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["end", "middle", "header", "text"])
def test_a_damaged_tar_is_refused_before_anything_is_written(tars, tmp_path, what):
    content = bytearray(tars["train"].read_bytes())
    if what == "end":
        with tarfile.open(tars["train"]) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
        content = content[:end]
    elif what == "middle":
        content = content[: len(content) // 2]
    elif what == "header":
        with tarfile.open(tars["train"]) as tar:
            at = tar.getmembers()[1].offset
        content[at : at + 512] = b"x" * 512
    else:
        content = b"no tar"
    tars["train"].write_bytes(content)
    with pytest.raises(
        DataError, match=r"train.tar cannot be read as a tar \(.*\); fetch it again"
    ):
        prepare(f"--train-tar={tars['train']}", f"--out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_only_what_is_missing_is_made_again(tree, tmp_path, caplog):
    out = tmp_path / "out"
    arguments = (f"--source={tree}", f"--out={out}", "--shard-images=4")
    prepare(*arguments)
    before = shards_in(out)
    for name in before:
        os.utime(out / name, (1, 1))
    (out / "train-00001-of-00003.array_record").unlink()
    (out / ".val-00000-of-00002.array_record.partial").write_bytes(b"half a shard")
    with pytest.raises(DataError, match=r"train-00001-of-00003.* is missing.*prepare-data"):
        ArrayRecords(str(out), "train")
    caplog.set_level(logging.INFO)
    prepare(*arguments)
    assert "15 images of 3 classes, 1 of 5 shards to write" in caplog.text
    assert shards_in(out) == before
    assert {name for name in before if (out / name).stat().st_mtime != 1} == {
        "train-00001-of-00003.array_record"
    }
    assert not list(out.glob(".*"))


def test_a_shard_of_another_size_is_made_again(tree, tmp_path):
    out = tmp_path / "out"
    prepare(f"--source={tree}", f"--out={out}")
    (out / "train-00000-of-00001.array_record").write_bytes(b"short")
    prepare(f"--source={tree}", f"--out={out}")
    prepare(f"--verify={out}")


def test_a_killed_session_counts_what_it_listed(tree, tmp_path, monkeypatch):
    out, own = tmp_path / "out", shards.write_shard
    written = []

    def dies(path, examples, **how):
        if written:
            path.with_name(f".{path.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return own(path, examples, **how)

    monkeypatch.setattr(shards, "write_shard", dies)
    arguments = (f"--source={tree}", f"--out={out}", "--shard-images=4")
    with pytest.raises(KeyboardInterrupt):
        prepare(*arguments)
    assert [*shards_in(out)] == written
    with pytest.raises(DataError, match="unfinished: run the same prepare-data command again"):
        ArrayRecords(str(out), "train")
    with pytest.raises(DataError, match="unfinished"):
        prepare(f"--verify={out}")
    monkeypatch.setattr(shards, "write_shard", own)
    prepare(*arguments)
    for split in SPLITS:
        wanted, found = Folder(str(tree), split), ArrayRecords(str(out), split)
        for index in range(len(wanted)):
            np.testing.assert_array_equal(wanted[index]["image"], found[index]["image"])


def test_other_images_or_options_are_refused(tree, tmp_path):
    out = tmp_path / "out"
    prepare(f"--source={tree}", f"--out={out}")
    with pytest.raises(UserError, match=r"(?s)shard_images: 2048 there, 4 asked for.*--fresh"):
        prepare(f"--source={tree}", f"--out={out}", "--shard-images=4")
    (tree / "train/n01440764/n01440764_7.JPEG").unlink()
    with pytest.raises(UserError, match="other images"):
        prepare(f"--source={tree}", f"--out={out}")
    prepare(f"--source={tree}", f"--out={out}", "--shard-images=4", "--fresh")
    assert len(ArrayRecords(str(out), "train")) == 8
    assert sorted(shards_in(out)) == sorted(path.name for path in out.glob("*.array_record"))
    (out / "manifest.json").unlink()
    for more in ((), ("--fresh",)):
        with pytest.raises(UserError, match=r"has shards, .* but no manifest.json"):
            prepare(f"--source={tree}", f"--out={out}", *more)


def test_a_corrupt_image_stops_or_is_skipped_and_named(tree, tmp_path, caplog):
    bad = tree / "train/n01443537/n01443537_1003.JPEG"
    bad.write_bytes(bad.read_bytes()[:900])
    with pytest.raises(DataError, match=r"n01443537_1003.JPEG cannot be read.*--on-corrupt=skip"):
        prepare(f"--source={tree}", f"--out={tmp_path}/error")
    assert shards_in(tmp_path / "error") == {}
    prepare(f"--source={tree}", f"--out={tmp_path}/skip", "--on-corrupt=skip")
    manifest = manifest_in(tmp_path / "skip")
    assert manifest["splits"]["train"]["class_counts"] == [3, 2, 3]
    assert str(bad) in manifest["splits"]["train"]["shards"][0]["skipped"][0]
    assert f"skipped {bad}" in caplog.text
    assert len(ArrayRecords(str(tmp_path / "skip"), "train")) == 8
    prepare(f"--source={tree}", f"--out={tmp_path}/unchecked", "--no-check")
    assert len(ArrayRecords(str(tmp_path / "unchecked"), "train")) == 9


def test_an_unreadable_input_is_no_corrupt_image(tree, tmp_path):
    """What the disk does not give is never skipped."""
    lost = tree / "train/n01443537/n01443537_7.JPEG"
    lost.unlink()
    lost.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"n01443537_7.JPEG cannot be read \(.*No such file"):
        prepare(f"--source={tree}", f"--out={tmp_path}/out", "--on-corrupt=skip")


def test_a_full_disk_is_told_and_costs_nothing_done(tree, tmp_path):
    """A limit on the size of files stands for it: both fail in write()."""
    out = tmp_path / "out"
    big = tree / "train/n01484850/n01484850_7.JPEG"
    big.write_bytes(imagenet.jpegs(0, 1, size=(400, 300))[0] + bytes(400_000))
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = (f"--source={tree}", f"--out={out}", "--shard-images=3")
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(
            DataError,
            match=r"train-00002-of-00003.*cannot be written \(.*File too large.*make room",
        ):
            prepare(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert len(shards_in(out)) == 2
    assert not list(out.glob(".*"))
    prepare(*arguments)
    prepare(f"--verify={out}")


def test_verify_names_what_differs(tree, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(f"--source={tree}", f"--out={out}", "--shard-images=4")
    prepare(f"--verify={out}")
    assert "5 shards as in the manifest" in capsys.readouterr().out
    damaged, short, gone = (out / f"train-0000{i}-of-00003.array_record" for i in range(3))
    content = bytearray(damaged.read_bytes())
    content[2000] ^= 1
    damaged.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-1])
    gone.unlink()
    with pytest.raises(DataError) as error:
        prepare(f"--verify={out}")
    for says in (
        "3 of 5 shards",
        f"{damaged.name} has another checksum",
        f"{short.name} has {len(content) - 1} bytes, not {len(content)}",
        f"{gone.name} is missing",
    ):
        assert says in str(error.value)
    with pytest.raises(DataError, match="has no manifest"):
        prepare(f"--verify={tree}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give --out=DIR, and either"),
        (("--source=x",), "give --out=DIR"),
        (("--source=x", "--train-tar=y", "--out=z"), "either --source"),
        (("--source=x", "--out=z", "--workers=0"), "--workers is 0"),
        (("--source=x", "--out=z", "--shard-images=0"), "--shard-images is 0"),
        (("--source=/nowhere", "--out=z"), "--source: /nowhere is no directory"),
        (("--train-tar=/nowhere", "--out=z"), "/nowhere cannot be read as a tar"),
        (("--source=x", "--out=z", "--on-corrupt=ignore"), "invalid choice: 'ignore'"),
    ],
)
def test_arguments_that_do_not_do(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["gae_jax", "prepare-data", *arguments]) == 1
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
