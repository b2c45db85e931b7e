"""Class folders as people have them: what is read, what is left aside and what is refused."""

import json
import logging
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from gae_jax.data.contents import ClassContents, Contents, differences, printable
from gae_jax.data.sources.folder import Folder
from gae_jax.data.sources.listing import class_folders
from gae_jax.runtime.errors import DataError, number_of


def write(folder, *names, size=(20, 16)):
    """Small images of these names, in the format of their suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shade = sum(os.fsencode(str(folder / name))) % 256
        image = Image.new("RGB", size, (shade, 40, 90))
        if name.lower().endswith((".gif", ".pgm")):
            image = image.convert("L")
        kind = {".jpe": "jpeg", ".jfif": "jpeg"}.get(os.path.splitext(name)[1].lower())
        image.save(folder / name, format=kind)


@pytest.fixture
def root(tmp_path):
    """Two classes of four JPEG files."""
    for name in "ab":
        write(tmp_path / "data" / name, *(f"{index}.jpg" for index in range(4)))
    return tmp_path / "data"


def test_a_single_thing_is_told_in_the_singular(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path / "all", "0.jpg")
    opened(tmp_path)
    assert "1 class, 1 image (1 to 1 in a class)" in caplog.text
    assert number_of(2, "class", "classes") == "2 classes"
    assert number_of(0, "image") == "0 images"


def opened(root, split="train", **more):
    return Folder(str(root), split, **more)


JUNK = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "lost+found", "__pycache__")


def test_junk_is_no_class_and_no_image(root, caplog):
    caplog.set_level(logging.INFO)
    whole = repr(opened(root))
    for name in JUNK:
        write(root / name, "0-checkpoint.jpg")
        write(root / "a" / name, "0-checkpoint.jpg")
    write(root / "b", "._0.jpg")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (root / "a" / name).write_bytes(b"x")
        (root / name).write_bytes(b"x")
    caplog.clear()
    source = opened(root)
    assert source.class_names == ["a", "b"]
    assert class_folders(root) == ["a", "b"]
    assert repr(source) == whole
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "2 classes, 8 images (4 to 4 in a class); ignored: hidden or system: 19" in lines[0]
    assert caplog.records[0].levelno == logging.INFO


def test_other_files_are_counted_by_suffix(root, caplog):
    caplog.set_level(logging.INFO)
    for name in ("x.txt", "y.TXT", "labels.csv", "README"):
        (root / "a" / name).write_bytes(b"x")
    write(root, "loose.jpg")
    opened(root)
    assert "ignored: .csv: 1, .txt: 2, images outside of class folders: 1, no suffix: 1" in (
        caplog.text
    )
    assert caplog.records[-1].levelno == logging.WARNING  # images that are not used


def test_formats_and_cases_of_suffixes(root):
    names = ["t.tif", "t.TIFF", "m.bmp", "g.gif", "w.webp", "p.PNG", "j.JPEG", "u.JPG", "f.jfif",
             "e.jpe", "p.ppm", "q.pgm"]  # fmt: skip
    write(root / "c", *names)
    source = opened(root)
    assert len(source) == 8 + len(names)
    assert source.class_names == ["a", "b", "c"]
    for index in range(8, len(source)):
        item = source[index]
        assert (item["image"].mode, item["image"].size, item["label"]) == ("RGB", (20, 16), 2)


@pytest.mark.parametrize("holds", ["nothing", "svg", "links", "folders"])
def test_an_empty_class_is_refused_by_name(root, holds):
    (root / "aa").mkdir()
    if holds == "svg":
        (root / "aa" / "x.svg").write_text("<svg/>")
    elif holds == "links":
        (root / "aa" / "x.jpg").symlink_to("/nowhere/x.jpg")
    elif holds == "folders":
        (root / "aa" / "deeper" / "still").mkdir(parents=True)
    why = {"svg": r"\.svg: 1", "links": "links that lead nowhere: 1"}.get(holds, "empty")
    for split in ("train", "holdout"):
        with pytest.raises(DataError, match=rf"class folders without images: 'aa' \({why}\)"):
            opened(root, split, holdout=0.25)


def test_a_folder_that_may_not_be_read_is_named(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"data/a cannot be read \(Permission denied\)"):
        opened(root)


def test_links_are_followed_and_circles_end(root, caplog):
    caplog.set_level(logging.INFO)
    write(root.parent / "more", "m0.jpg", "m1.jpg")
    (root / "a" / "more").symlink_to(root.parent / "more")
    (root / "a" / "again").symlink_to(root.parent / "more")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b")
    (root / "b" / "everything").symlink_to("/")
    (root / "b" / "gone").symlink_to("/nowhere/more")
    (root.parent / "more" / "back").symlink_to(root / "a")
    (root / "c").symlink_to(root.parent / "elsewhere")
    write(root.parent / "elsewhere", "0.jpg")
    os.mkfifo(root / "a" / "pipe.jpg")
    source = opened(root)
    assert source.class_names == ["a", "b", "c"]
    assert np.bincount([source[i]["label"] for i in range(len(source))]).tolist() == [6, 4, 1]
    for said in ("links that lead nowhere: 1", "no regular files: 1", "folders met before: 5"):
        assert said in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


def test_an_image_that_is_a_link_to_nowhere_cannot_be_read(root, caplog):
    """As any other image that cannot be read; it is counted at once."""
    (root / "a" / "9.jpg").symlink_to("/nowhere/x.jpg")
    source = opened(root)
    assert "9 images (4 to 5 in a class); 1 of them links that lead nowhere, such as" in caplog.text
    with pytest.raises(DataError, match=r"a/9.jpg cannot be read as an image .*No such file"):
        source[4]
    assert opened(root, on_corrupt="skip")[4]["label"] == 1


def test_a_class_that_is_a_link_to_nowhere_is_named(root):
    (root / "c").symlink_to("/nowhere/c")
    with pytest.raises(DataError, match="data/c is a link that leads nowhere"):
        opened(root)


def test_images_lie_as_deep_as_they_like(tmp_path):
    write(tmp_path / "train" / "n01" / "images", "n01_0.JPEG", "n01_1.JPEG")
    write(tmp_path / "val" / "n01" / "images" / "more", "v.JPEG")
    assert (len(opened(tmp_path)), len(opened(tmp_path, "holdout"))) == (2, 1)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val", "VALID"])
@pytest.mark.parametrize("train", ["train", "training", "Train"])
def test_names_of_splits(tmp_path, name, train):
    write(tmp_path / train / "a", "0.jpg", "1.jpg")
    write(tmp_path / name / "a", "2.jpg")
    assert opened(tmp_path).class_names == ["a"]
    assert (len(opened(tmp_path)), len(opened(tmp_path, "holdout"))) == (2, 1)


@pytest.mark.parametrize("other", ["Caf\xe9", "cafe\u0301", "caf\xe9 "])
def test_classes_of_splits_that_are_spelt_otherwise(tmp_path, other):
    """In another case, in the Unicode form of another system, with a space."""
    write(tmp_path / "train" / "caf\xe9", "0.png")
    write(tmp_path / "val" / other, "0.png")
    with pytest.raises(DataError) as caught:
        opened(tmp_path, "holdout")
    assert f"rename {other!a} to 'caf\\xe9'" in str(caught.value)
    (tmp_path / "val" / other).rename(tmp_path / "val" / "caf\xe9")
    assert len(opened(tmp_path, "holdout")) == 1


def test_a_root_that_is_a_file_is_called_so(tmp_path):
    (tmp_path / "images.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"images.tar', which is a file; unpack it"):
        opened(tmp_path / "images.tar")


def test_splits_that_are_not_clear(tmp_path):
    write(tmp_path / "two" / "train" / "a", "0.jpg")
    for name in ("val", "valid"):
        write(tmp_path / "two" / name / "a", "0.jpg")
    with pytest.raises(DataError, match="has val/ and valid/; rename"):
        opened(tmp_path / "two")
    write(tmp_path / "test" / "train" / "a", "0.jpg", "1.jpg")
    write(tmp_path / "test" / "test" / "a", "0.jpg")
    with pytest.raises(DataError, match=r"has train/ but no val/.*use test/: rename it to val/"):
        opened(tmp_path / "test", "holdout")
    # both remedies work
    assert len(opened(tmp_path / "test" / "train", "holdout", holdout=0.5)) == 1
    (tmp_path / "test" / "test").rename(tmp_path / "test" / "val")
    assert len(opened(tmp_path / "test", "holdout")) == 1
    for name in ("val", "test"):
        write(tmp_path / "none" / name / "a", "0.jpg")
    with pytest.raises(DataError, match="has test/, val/ but no train/"):
        opened(tmp_path / "none")
    for name in ("a", "val/a"):
        write(tmp_path / "up" / name, "0.jpg")
    with pytest.raises(DataError, match="has a/, val/ but no train/"):
        opened(tmp_path / "up")


def test_classes_that_are_called_as_splits_are(tmp_path):
    for name in ("bus", "car", "train"):
        write(tmp_path / "traffic" / name, "0.jpg", "1.jpg")
    for name in ("invalid", "valid"):
        write(tmp_path / "forms" / name, "0.jpg", "1.jpg")
    assert opened(tmp_path / "traffic").class_names == ["bus", "car", "train"]
    assert opened(tmp_path / "forms").class_names == ["invalid", "valid"]


def test_a_root_one_folder_too_high_or_too_low_is_explained(tmp_path):
    write(tmp_path / "up" / "cars" / "train" / "a", "0.jpg")
    write(tmp_path / "up" / "cars" / "val" / "a", "0.jpg")
    with pytest.raises(DataError, match=rf"give --config.data.root={tmp_path}/up/cars$"):
        opened(tmp_path / "up")
    write(tmp_path / "flat", "0.jpg", "1.jpg")
    with pytest.raises(DataError, match=r"holds 2 images in no class folders: .*num_classes=1"):
        opened(tmp_path / "flat")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no images: expected CLASS/NAME"):
        opened(tmp_path / "nothing")


@pytest.mark.parametrize("wordnet", [True, False])
def test_a_flat_val_names_the_command_that_sorts_it(tmp_path, wordnet):
    import shlex

    from gae_jax.commands.cli import main

    root, names = tmp_path / "my data", ["n01440764", "n01443537"] if wordnet else ["a", "b"]
    for name in names:
        write(root / "train" / name, f"{name}_0.JPEG", f"{name}_1.JPEG")
    write(root / "val", "v1.JPEG", "v2.JPEG")
    assert len(opened(root)) == 4
    with pytest.raises(DataError, match="holds 2 images in no class folders") as error:
        opened(root, "holdout")
    text = str(error.value)
    command = shlex.split(text[text.index("prepare-data") :].split(" (--val-labels")[0])
    assert ("--val-labels=FILE" in command) == (not wordnet)
    (tmp_path / "labels").write_text(f"v1.JPEG {names[0]}\nv2.JPEG {names[1]}\n")
    command = [part for part in command if "val-labels" not in part]
    assert main(["gae_jax", *command, f"--val-labels={tmp_path}/labels", "--workers=1"]) == 0
    flags = shlex.split(text[text.index("--config.data.name") :].split("; or")[0])
    out = dict(flag.removeprefix("--config.data.").split("=", 1) for flag in flags)
    assert out["name"] == "array_record"
    from gae_jax.data.sources import make_source

    assert len(make_source(out["name"], "holdout", root=out["root"])) == 2


def test_names_that_are_not_utf8(root, caplog):
    caplog.set_level(logging.INFO)
    odd = os.fsdecode(b"caf\xe9")
    write(root / "a", "x.jpg")
    (root / "a" / "x.jpg").rename(root / "a" / f"{odd}.jpg")
    (root / "b").rename(root / odd)
    source = opened(root)
    assert source.class_names == ["a", r"caf\xe9"]
    assert len(source) == 9
    assert source[8]["label"] == 1
    for text in (repr(source), *source.class_names, caplog.text):
        text.encode()
    json.dumps(source.contents.to_json()).encode()
    (root / odd / "0.jpg").write_bytes(b"no image")
    (root / "a" / f"{odd}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"caf\\xe9/0.jpg cannot be read") as error:
        opened(root)[5]
    str(error.value).encode()
    skipping = opened(root, on_corrupt="skip")
    for index in range(9):
        skipping[index]
    assert len(skipping.skipped) == 2
    caplog.text.encode()
    changed = differences(source.contents, opened(root).contents)
    str(changed).encode()


@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.99])
@pytest.mark.parametrize("counts", [(2, 2), (3, 4), (1, 1, 3), (4,), (2, 1)])
def test_the_share_that_an_empty_split_advises_works(tmp_path, counts, holdout):
    for label, count in enumerate(counts):
        write(tmp_path / f"c{label}", *(f"{index}.png" for index in range(count)), size=(4, 4))
    for split in ("train", "holdout"):
        try:
            opened(tmp_path, split, holdout=holdout)
        except DataError as error:
            text = str(error)
            assert f"the {split} split is empty: data.holdout is {holdout}" in text
            share = float(text.split("--config.data.holdout=")[1].split()[0])
            assert share != holdout
            for other in ("train", "holdout"):
                source = opened(tmp_path, other, holdout=share)
                labels = {source[index]["label"] for index in range(len(source))}
                if min(counts) > 1:
                    assert labels == set(range(len(counts)))


def test_no_share_is_advised_where_none_works(tmp_path):
    write(tmp_path / "a", "0.png")
    with pytest.raises(DataError, match="no share leaves both splits an image, so add images"):
        opened(tmp_path, "holdout", holdout=0.1)


def test_contents_do_not_depend_on_where_they_lie(root, monkeypatch):
    source = opened(root)
    root.rename(root.parent / "moved")
    monkeypatch.chdir(root.parent)
    (root.parent / "link").symlink_to("moved")
    for spelling in ("moved", "./moved/", f"{root.parent}/moved", "moved/../moved", "link"):
        again = opened(spelling)
        assert again.contents == source.contents
        assert repr(again) == repr(source)
    assert pickle.loads(pickle.dumps(again)).contents == source.contents


def test_differences_are_named(root):
    def changed(change):
        before = opened(root).contents
        change()
        return differences(before, opened(root).contents)

    assert not changed(lambda: None)
    found = changed(lambda: write(root / "c", "0.jpg"))
    assert str(found) == "class 'c' was added"
    found = changed(lambda: (root / "b").rename(root / "x"))
    assert found.classes == ("class 'b' was renamed to 'x'",)
    found = changed(lambda: write(root / "a", "n1.jpg", "n2.jpg"))
    assert str(found) == "'a' has 2 images more (n1.jpg, n2.jpg)"
    assert found.names
    found = changed(lambda: (root / "a" / "n1.jpg").unlink())
    assert str(found) == "'a' has 1 image fewer (n1.jpg)"
    found = changed(lambda: write(root / "a", "0.jpg", size=(99, 99)))
    assert str(found) == "'a' has 1 image of another size (0.jpg)"
    assert (found.replaced, found.names) == (1, False)
    found = changed(lambda: [path.unlink() for path in (root / "c").iterdir()]
                    and (root / "c").rmdir())  # fmt: skip
    assert str(found) == "class 'c' was removed"


def test_differences_where_names_are_not_known():
    def contents(count, facts):
        return Contents.of([ClassContents("a", count)], facts=facts)

    assert str(differences(contents(3, "x"), contents(4, "x"))) == (
        "'a' has 4 images, not 3 as before"
    )
    # as of TensorFlow Datasets, which does not say how many images a class has
    unknown = contents(None, "x")
    assert str(differences(unknown, contents(4, "x"))) == "'a' has 4 images"
    assert "is not known" in str(differences(contents(4, "x"), unknown))
    assert "3 images (digest" in str(differences(contents(3, "x"), contents(3, "y")))
    assert not differences(contents(3, "x"), contents(3, "x"))


def test_long_differences_are_cut(tmp_path):
    def contents(names, count):
        files = [(f"{index}.jpg", index) for index in range(count)]
        return Contents.of([ClassContents.of_files(name, files) for name in names])

    text = str(differences(contents("abcdefgh", 3), contents("abcdefgh", 30)))
    assert "27 images more (3.jpg, 4.jpg, 5.jpg, 6.jpg, 7.jpg and 22 more)" in text
    assert "the images of 3 more classes changed" in text
    assert printable("a") == "a"


def tiny_imagenet(root, lines):
    """Tiny-ImageNet's own layout: train/WNID/images, and val/images with a list of classes."""
    for name in ("n01", "n02"):
        write(root / "train" / name / "images", f"{name}_0.JPEG", f"{name}_1.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t63\n")
    write(root / "val" / "images", "val_0.JPEG", "val_1.JPEG", "val_2.JPEG")
    write(root / "test" / "images", "test_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


def test_tiny_imagenet_is_read_as_it_lies(tmp_path, caplog):
    boxes = "\t0\t32\t44\t62"
    caplog.set_level(logging.INFO)
    tiny_imagenet(tmp_path, [f"val_0.JPEG\tn02{boxes}", f"val_1.JPEG\tn01{boxes}"])
    train, holdout = opened(tmp_path), opened(tmp_path, "holdout")
    assert (len(train), train.class_names) == (4, ["n01", "n02"])
    assert holdout.labels.tolist() == [0, 1]
    assert [holdout.place(index).name for index in (0, 1)] == ["val_1.JPEG", "val_0.JPEG"]
    assert holdout[1]["label"] == 1
    assert holdout.contents.classes[1].count == 1
    assert "images without a class: 1" in caplog.text


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["val_0.JPEG\tn03\t0"], "line 1: there is no class 'n03'"),
        (["val_0.JPEG\tn01", "val_9.JPEG\tn02"], "line 2: there is no image 'val_9.JPEG'"),
        (["val_0.JPEG\tn01", "val_0.JPEG\tn02"], "line 2: there is no image 'val_0.JPEG'"),
        (["val_0.JPEG n01"], "line 1: there is no class ''"),
        ([""], "names no images"),
    ],
)
def test_a_damaged_list_of_classes_is_refused_by_line(tmp_path, lines, problem):
    tiny_imagenet(tmp_path, lines)
    with pytest.raises(DataError, match=f"val_annotations.txt.*{problem}"):
        opened(tmp_path, "holdout")
