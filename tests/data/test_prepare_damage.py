"""prepare-data told of damaged and odd inputs: tars, devkit, labels, folders; and their counts."""

import gzip
import io
import json
import logging
import re
import tarfile

import imagenet
import numpy as np
import pytest
from PIL import Image

from gae_jax.commands import cli, prepare_data
from gae_jax.data import imagenet as known
from gae_jax.data import originals
from gae_jax.data.sources.array_record import ArrayRecords
from gae_jax.runtime.errors import DataError


def prepare(*arguments):
    return prepare_data.main(["--workers=1", *map(str, arguments)])


@pytest.fixture
def tree(tmp_path):
    return imagenet.write_tree(tmp_path / "tree")


@pytest.fixture
def tars(tmp_path):
    return imagenet.write_tars(tmp_path / "tars")


def members_of(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def changed(path, change):
    """The tar again, its members (name -> content) having gone through ``change``."""
    members = members_of(path.read_bytes())
    path.write_bytes(imagenet.tar_of(change(members) or members))


def refused(says, *arguments, out):
    with pytest.raises(DataError, match=says):
        prepare(*arguments, f"--out={out}")
    assert not out.exists()


STARTS = {
    "empty": (b"", r"\(empty\); fetch it again"),
    "page": (b"<!DOCTYPE html><title>404</title>", r"\(a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"a Git LFS pointer"),
    "zip": (b"PK\3\4" + bytes(100), "a zip file: unpack it"),
    "zeros": (bytes(20_000), r"zeros at its beginning"),
    "other": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, r"\(.+\); fetch it again"),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("which", ["train", "val", "inner"])
def test_other_files_than_tars_are_told_apart(tars, tmp_path, start, which):
    content, says = STARTS[start]
    if which == "inner":
        changed(tars["train"], lambda x: x | {"n01443537.tar": content})
        says = rf"n01443537\.tar in .*train\.tar cannot be read as a tar.*{says}"
        which = "train"
    else:
        tars[which].write_bytes(content)
        says = rf"{which}\.tar cannot be read as a tar.*{says}"
    refused(says, f"--{which}-tar={tars[which]}", out=tmp_path / "out")


def test_a_compressed_tar_is_named_and_its_remedy_works(tars, tmp_path, monkeypatch):
    import shlex
    import subprocess

    train = tars["train"].with_suffix(".tar.gz")
    train.write_bytes(gzip.compress(tars["train"].read_bytes()))
    with pytest.raises(DataError, match=r"train.tar.gz is compressed \(gzip\)") as error:
        prepare(f"--train-tar={train}", f"--out={tmp_path}/out")
    command = str(error.value).split("decompress it: ")[1].split(", and give")[0]
    plain = tmp_path / str(error.value).split(", and give ")[1]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert shlex.split(command)[-1] == plain.name
    prepare(f"--train-tar={plain}", f"--out={tmp_path}/out")
    assert len(ArrayRecords(str(tmp_path / "out"), "train")) == 9


@pytest.mark.parametrize(("kind", "mode"), [("gzip", "w:gz"), ("bzip2", "w:bz2"), ("xz", "w:xz")])
def test_compressed_tars_of_classes_are_named(tars, tmp_path, kind, mode):
    def change(members):
        name, content = "n01443537.tar", members.pop("n01443537.tar")
        return members | {f"{name}.{mode[2:]}": imagenet.tar_of(members_of(content), mode)}

    changed(tars["train"], change)
    says = rf"n01443537\.tar\.{mode[2:]} in .*train\.tar is compressed \({kind}\).*--source=DIR"
    refused(says, f"--train-tar={tars['train']}", out=tmp_path / "out")
    tars["val"].write_bytes(imagenet.tar_of(members_of(tars["val"].read_bytes()), mode))
    refused(rf"val\.tar is compressed \({kind}\)", f"--val-tar={tars['val']}", out=tmp_path / "out")


def test_a_tar_of_class_folders_is_named(tree, tmp_path):
    tar = tmp_path / "all.tar"
    with tarfile.open(tar, "w") as file:
        file.add(tree / "train", "train")
    refused(
        "holds no files with one of .*, but train; if it is a tar of class folders, unpack it",
        f"--train-tar={tar}",
        out=tmp_path / "out",
    )


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_hole_in_a_tar_is_found(tars, tmp_path, which):
    """Zeros instead of a header end a tar, for tarfile; the rest would be lost silently."""
    content = bytearray(tars[which].read_bytes())
    with tarfile.open(tars[which]) as tar:
        at = tar.getmembers()[1].offset
    content[at : at + 1024] = bytes(1024)
    tars[which].write_bytes(content)
    says = rf"its members end at byte {at} of {len(content)}, and more follows"
    refused(says, f"--{which}-tar={tars[which]}", out=tmp_path / "out")
    tars[which].write_bytes(content[:at] + bytes(2_000_000))  # as downloads lay out the disk
    refused("or not fetched completely", f"--{which}-tar={tars[which]}", out=tmp_path / "out")


def test_members_that_are_cut_missing_or_twice(tars, tmp_path):
    out, val = tmp_path / "out", tars["val"]
    arguments = (f"--val-tar={val}", f"--devkit={tars['devkit']}")
    whole = val.read_bytes()
    with tarfile.open(val) as tar:
        third = tar.getmembers()[2]
    val.write_bytes(whole[: third.offset_data + 100])
    refused(rf"inside its member {third.name}", *arguments, out=out)
    val.write_bytes(whole)
    changed(val, lambda x: {name: content for name, content in x.items() if "004" not in name})
    says = (
        r"6 labels, there are 5 validation images in .*: ILSVRC2012_val_00000004\.JPEG is missing; "
    )
    refused(says, *arguments, out=out)
    prepare(*arguments, f"--out={out}", "--on-corrupt=skip")
    source = ArrayRecords(str(out), "holdout")
    labels = {record.name: record.label for record in map(source._record, range(len(source)))}
    rows = [row for row in imagenet.images()["val"] if "004" not in row[1]]
    assert labels == {name: [*imagenet.CLASSES].index(wnid) for wnid, name, _ in rows}


@pytest.mark.parametrize("which", ["val", "class", "image"])
def test_a_name_that_is_twice_in_a_tar(tars, tmp_path, caplog, which):
    def twice(content, name):
        members = [*members_of(content).items()]
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for key, value in [(name, b"an older one"), *members]:
                info = tarfile.TarInfo(key)
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
        return stream.getvalue()

    if which == "image":
        name = "n01443537_7.JPEG"
        changed(tars["train"], lambda x: x | {"n01443537.tar": twice(x["n01443537.tar"], name)})
    else:
        name = {"val": "ILSVRC2012_val_00000002.JPEG", "class": "n01484850.tar"}[which]
        tar = tars["val" if which == "val" else "train"]
        tar.write_bytes(twice(tar.read_bytes(), name))
    option = "val" if which == "val" else "train"
    arguments = (f"--{option}-tar={tars[option]}", f"--devkit={tars['devkit']}")
    refused(rf"holds {name} more than once; .*--on-corrupt=skip", *arguments, out=tmp_path / "out")
    prepare(*arguments, f"--out={tmp_path}/out", "--on-corrupt=skip")
    assert f"holds {name} more than once; took the last" in caplog.text
    prepare(
        *(f"--{option}-tar={imagenet.write_tars(tmp_path / 'good')[option]}", arguments[1]),
        f"--out={tmp_path}/wanted",
    )
    for split in {"val": ("holdout",), "train": ("train",)}[option]:
        wanted, got = (ArrayRecords(str(tmp_path / name), split) for name in ("wanted", "out"))
        assert len(wanted) == len(got)
        assert all(wanted._record(i) == got._record(i) for i in range(len(wanted)))


def test_names_lead_nowhere_and_may_be_odd(tars, tmp_path):
    odd = ["../../escaped.JPEG", "/abs.JPEG", "caf\udce9.JPEG", "a b\n'\".JPEG", "日本.JPEG"]
    images = imagenet.jpegs(4, len(odd))
    (tmp_path / "deep/er").mkdir(parents=True)
    changed(
        tars["train"],
        lambda x: x | {"../n01443537.tar": imagenet.tar_of(dict(zip(odd, images, strict=True)))},
    )
    changed(tars["train"], lambda x: {k: v for k, v in x.items() if k != "n01443537.tar"})
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "deep/er/out"
    prepare(f"--train-tar={tars['train']}", f"--out={out}")
    assert set(tmp_path.rglob("*")) - before == {out, *out.iterdir()}
    source = ArrayRecords(str(out), "train")
    records = [source._record(i) for i in range(len(source))]
    found = {record.name: record.content for record in records if record.label == 1}
    assert found == dict(zip([name.split("/")[-1] for name in odd], images, strict=True))
    np.testing.assert_array_equal(
        np.asarray(source[3]["image"]), np.asarray(Image.open(io.BytesIO(records[3].content)))
    )


def test_links_in_tars_are_named_and_hidden_files_are_no_images(tars, tmp_path, caplog):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members_of(tars["val"].read_bytes()).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("linked.JPEG")
        link.type, link.linkname = tarfile.LNKTYPE, "ILSVRC2012_val_00000001.JPEG"
        tar.addfile(link)
        info = tarfile.TarInfo("._ILSVRC2012_val_00000001.JPEG")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"\0\5\x16\7"))
    tars["val"].write_bytes(stream.getvalue())
    prepare(f"--val-tar={tars['val']}", f"--devkit={tars['devkit']}", f"--out={tmp_path}/out")
    assert "1 members of" in caplog.text
    assert "such as linked.JPEG" in caplog.text
    assert len(ArrayRecords(str(tmp_path / "out"), "holdout")) == 6


def test_damaged_and_other_devkits(tars, tmp_path):
    good = tars["devkit"].read_bytes()
    members = members_of(gzip.decompress(good))
    meta, truth = members
    others = {
        "cut": good[: len(good) // 2],
        "empty": b"",
        "page": b"<html>404</html>",
        "zeros": good[:300] + bytes(len(good) - 300),
        "no meta": imagenet.tar_of({truth: members[truth]}, "w:gz"),
        "no truth": imagenet.tar_of({meta: members[meta]}, "w:gz"),
        "no mat": imagenet.tar_of(members | {meta: b"no mat"}, "w:gz"),
        "cut mat": imagenet.tar_of(members | {meta: members[meta][:700]}, "w:gz"),
        "binary truth": imagenet.tar_of(members | {truth: b"\xff\xfe\0"}, "w:gz"),
        "another tar": tars["train"].read_bytes(),
    }
    for content in others.values():
        tars["devkit"].write_bytes(content)
        refused(
            r"--devkit: .*devkit\.tar\.gz cannot be read \(.+\); give ILSVRC2012_devkit_t12",
            *(f"--val-tar={tars['val']}", f"--devkit={tars['devkit']}"),
            out=tmp_path / "out",
        )
    moved = {f"./{name}": content for name, content in members.items()}
    tars["devkit"].write_bytes(imagenet.tar_of(moved, "w:xz"))
    prepare(f"--val-tar={tars['val']}", f"--devkit={tars['devkit']}", f"--out={tmp_path}/out")


def test_damaged_labels(tars, tmp_path):
    file = tmp_path / "labels.txt"
    given = (f"--val-tar={tars['val']}", f"--val-labels={file}")
    for content, says in (
        (b"", r"labels\.txt is empty"),
        (b"\xff\xfe\0\1", r"labels\.txt cannot be read"),
        (b"a.JPEG n01440764\na.JPEG n01443537\n", r"labels\.txt gives a\.JPEG more than one class"),
    ):
        file.write_bytes(content)
        refused(says, *given, out=tmp_path / "out")
    rows = imagenet.images()["val"]
    file.write_text("\n".join(f"{name} {wnid}" for wnid, name, _ in rows), encoding="utf-8-sig")
    prepare(*given, f"--out={tmp_path}/out")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
@pytest.mark.parametrize("flat", [False, True])
def test_validation_images_are_read_by_any_usual_name(tree, tars, tmp_path, name, flat, caplog):
    folder = (tree / "val").rename(tree / name)
    if flat:
        for path in folder.glob("*/*"):
            path.rename(folder / path.name)
        for path in [*folder.iterdir()]:
            if path.is_dir():
                path.rmdir()
    (tree / "test").mkdir()
    prepare(f"--source={tree}", f"--devkit={tars['devkit']}", f"--out={tmp_path}/out")
    assert len(ArrayRecords(str(tmp_path / "out"), "holdout")) == 6
    assert f"beside train and {name} in {tree} there is test, which is left aside" in caplog.text


def test_folders_that_are_not_clear_are_refused(tree, tmp_path):
    (tree / "valid").mkdir()
    refused(r"has val/ and valid/; rename all but one", f"--source={tree}", out=tmp_path / "out")
    (tree / "valid").rmdir()
    image = next((tree / "val").glob("*/*"))
    (tree / "val/x.jpg").write_bytes(image.read_bytes())
    refused("x.jpg, beside class folders, such as", f"--source={tree}", out=tmp_path / "out")
    (tree / "val/x.jpg").unlink()
    (tree / "train").rename(tmp_path / "elsewhere")
    refused(r"has val/ but no train/; put", f"--source={tree}", out=tmp_path / "out")


def test_shards_do_not_lie_among_the_images(tree, tmp_path):
    for source in (tree, tree / "train"):
        given = f"--source={source}"
        with pytest.raises(DataError, match=r"is inside the images of .*train; give") as error:
            prepare(given, f"--out={tree / 'train/shards'}")
        assert not (tree / "train/shards").exists()
        outside = re.search(r"such as (--out=\S+)", str(error.value))[1]
        prepare(given, outside)
    prepare(f"--source={tree}", f"--out={tree / 'shards'}")  # beside the splits
    # finished shards that lie there already are moved
    (tree / "shards").rename(tree / "train/shards")
    with pytest.raises(DataError, match=r"\(move finished shards there\)"):
        prepare(f"--source={tree}", f"--out={tree / 'train/shards'}")


def test_flat_images_of_other_classes_need_labels(tree, tmp_path):
    for wnid, name in zip(imagenet.CLASSES, ("ape", "bee", "cat"), strict=True):
        (tree / "train" / wnid).rename(tree / "train" / name)
        for image in (tree / "val" / wnid).iterdir():
            image.rename(tree / "val" / image.name)
        (tree / "val" / wnid).rmdir()
    given, out = f"--source={tree}", tmp_path / "out"
    for more in ([], ["--on-corrupt=skip"]):
        with pytest.raises(DataError, match=r"such as 'ape'; give .*--val-labels=FILE") as error:
            prepare(given, f"--out={out}", *more)
        assert "skip" not in str(error.value)
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(f"{name} bee" for _, name, _ in imagenet.images()["val"]))
    prepare(given, f"--out={out}", f"--val-labels={file}")
    assert len(ArrayRecords(str(out), "holdout")) == 6


def test_a_class_may_be_called_train(tree, tmp_path):
    for name in ("car", "train"):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        for number, content in enumerate(imagenet.jpegs(2, 2)):
            (tmp_path / "vehicles" / name / f"{number}.jpg").write_bytes(content)
    prepare(f"--source={tmp_path}/vehicles", f"--out={tmp_path}/out")
    source = ArrayRecords(str(tmp_path / "out"), "train", holdout=0)
    assert (source.class_names, len(source)) == (["car", "train"], 4)


def test_counts_are_compared_with_imagenets(tars, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    arguments = [f"--train-tar={tars['train']}", f"--out={tmp_path}/out"]
    prepare(*arguments)
    assert "train: 9 images of 3 classes, 3 to 3 of each" in caplog.text
    assert "3 of ILSVRC 2012's 1000 classes, without n01491361" in caplog.text
    assert "3 classes have fewer than 732 or more than 1300, as n01440764 3" in caplog.text
    caplog.clear()
    prepare(*arguments, f"--devkit={tars['devkit']}")  # made with three images of each class
    assert "than the devkit says" not in caplog.text

    def without_one(members):
        images = members_of(members["n01443537.tar"])
        images.pop("n01443537_7.JPEG")
        return members | {"n01443537.tar": imagenet.tar_of(images)}

    changed(tars["train"], without_one)
    prepare(f"--train-tar={tars['train']}", f"--devkit={tars['devkit']}", f"--out={tmp_path}/less")
    assert "train: 8 images; 1 class has another number than the devkit says" in caplog.text
    assert ", as n01443537 2 of 3" in caplog.text


def test_what_is_said_of_counts():
    names = list(known.listed("labels.txt"))
    assert len(names) == 1000
    right = [1300] * 999 + [732]
    assert known.compare_counts(["cat", "dog"], {"train": [1, 2]}) == []
    exact = dict(zip(names, right, strict=True))
    assert known.compare_counts(names, {"train": right, "val": [50] * 1000}, exact) == []
    (said,) = known.compare_counts(names, {"train": right})
    assert said.startswith(f"train: {sum(right)} images, ILSVRC 2012 has 1281167")
    (said,) = known.compare_counts(names, {"train": [1301, *right[1:]]}, exact)
    assert "1 class has another number than the devkit says, as n01440764 1301 of 1300" in said
    (said,) = known.compare_counts(names, {"val": [49] + [50] * 999})
    assert said == "val: 49999 images; 1 class has other than 50, as n01440764 49"
    (said,) = known.compare_counts(["n00000001"], {"train": [3]})
    assert "n00000001 is a WordNet id, but no class of ILSVRC 2012" in said
    assert sum(right) != known.TRAIN_IMAGES


def test_shards_that_cannot_be_opened_are_named(tree, tmp_path):
    prepare(f"--source={tree}", f"--out={tmp_path}/out")
    shard, manifest = (
        tmp_path / "out" / name for name in ("train-00000-of-00001.array_record", "manifest.json")
    )
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:1000])  # and the manifest goes along
    manifest.write_text(manifest.read_text().replace(f'"bytes": {size}', '"bytes": 1000', 1))
    with pytest.raises(DataError, match=r"train-00000-of-00001\.array_record has 0 records, not 9"):
        ArrayRecords(str(tmp_path / "out"), "train")


def test_a_manifest_leads_to_no_other_place(tree, tmp_path):
    prepare(f"--source={tree}", f"--out={tmp_path}/out")
    manifest = tmp_path / "out/manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"train-00000', '"../train-00000'))
    with pytest.raises(DataError, match=r"manifest\.json is damaged \(train lists a shard without"):
        ArrayRecords(str(tmp_path / "out"), "train")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["splits"].pop("val"), "made_of is of other splits than train"),
        (lambda m: m["splits"]["train"]["shards"][0].pop("skipped"), "no list of skipped images"),
        (lambda m: m["splits"]["train"].update(count=10**30), "another count than its shards"),
        (lambda m: m["splits"]["train"]["shards"][0].update(bytes=-1), "no count or no bytes"),
        (
            lambda m: m["splits"]["val"]["shards"][0]["classes"].update({"7": 0}),
            "none of 3 classes",
        ),
        (lambda m: m.update(complete="yes"), "complete is neither true nor false"),
        (lambda m: m.update(class_names=[1, 2]), "class_names is no list of names"),
    ],
)
def test_contradictions_in_a_manifest_are_told(tree, tmp_path, change, says):
    prepare(f"--source={tree}", f"--out={tmp_path}/out")
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    for split in ("train", "holdout"):
        with pytest.raises(DataError, match=rf"manifest\.json is damaged \(.*{says}"):
            ArrayRecords(str(tmp_path / "out"), split)


def test_all_images_skipped_is_told_when_they_are_read(tree, tmp_path):
    for path in (tree / "val").glob("*/*"):
        path.write_bytes(b"no")
    prepare(f"--source={tree}", f"--out={tmp_path}/out", "--on-corrupt=skip")
    with pytest.raises(DataError, match="holds no val images: all were left out"):
        ArrayRecords(str(tmp_path / "out"), "holdout")


def test_images_that_change_while_they_are_read(tree, tmp_path, monkeypatch):
    listed = originals.from_tree(tree, None)
    monkeypatch.setattr(prepare_data, "from_tree", lambda *_, **__: listed)
    path = tree / "train/n01443537/n01443537_7.JPEG"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"n01443537_7\.JPEG has \d+ bytes, \d+ when it was listed"):
        prepare(f"--source={tree}", f"--out={tmp_path}/out")


def test_names_that_are_not_utf8(tree, tmp_path, capsys):
    (tree / "train/n01440764/n01440764_7.JPEG").rename(tree / "train/n01440764/caf\udce9.JPEG")
    assert cli.main(["gae_jax", "prepare-data", f"--source={tree}", f"--out={tmp_path}/out"]) == 0
    source = ArrayRecords(str(tmp_path / "out"), "train")
    assert source._record(0).name == "caf\udce9.JPEG"
    out = f"{tmp_path}/caf\udce9"
    assert cli.main(["gae_jax", "prepare-data", f"--source={tree}", f"--out={out}"]) == 1
    assert "ArrayRecord needs a name in UTF-8" in capsys.readouterr().err
