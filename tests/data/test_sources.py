"""Sources of ImageNet's size: the same images from TFDS, from our shards and class folders."""

import itertools
import json
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import imagenet
import numpy as np
import pytest
from test_data import image_data

from gae_jax.commands.cli import main
from gae_jax.config import default_config
from gae_jax.config.validate import validate
from gae_jax.data import shards
from gae_jax.data.sources import SPLITS, make_source
from gae_jax.data.sources.array_record import ArrayRecords
from gae_jax.data.sources.folder import Folder
from gae_jax.data.sources.tfds import Tfds
from gae_jax.runtime.errors import ConfigError, DataError

IMAGENET = "imagenet2012:5.*.*"


def prepare(*arguments):
    assert main(["gae_jax", "prepare-data", "--workers=1", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """Source -> root, of the same images."""
    root = tmp_path_factory.mktemp("imagenet")
    imagenet.write_tree(root / "tree")
    prepare(f"--source={root}/tree", f"--out={root}/shards", "--shard-images=4")
    imagenet.write_tfds(root / "tfds")
    assert "tensorflow" not in sys.modules
    return {"folder": root / "tree", "array_record": root / "shards", "tfds": root / "tfds"}


@pytest.fixture
def copied(everywhere, tmp_path):
    """A copy of a source's files that a test may damage."""

    def copy(name):
        target = tmp_path / name
        for path in everywhere[name].rglob("*"):
            if path.is_file():
                new = target / path.relative_to(everywhere[name])
                new.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(path.read_bytes())
        return target

    return copy


def opened(everywhere, name, split, **more):
    return make_source(name, split, root=str(everywhere[name]), dataset=IMAGENET, **more)


def pixels_of(source):
    return [
        (np.asarray(item["image"]), item["label"])
        for item in map(source.__getitem__, range(len(source)))
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_all_sources_have_the_same_images(everywhere, split):
    folder, records, tfds = (
        opened(everywhere, name, split) for name in ("folder", "array_record", "tfds")
    )
    assert len(folder) == {"train": 9, "holdout": 6}[split]
    assert folder.class_names == records.class_names == tfds.class_names == [*imagenet.CLASSES]
    wanted = pixels_of(folder)
    for (pixels, label), (other, other_label) in zip(wanted, pixels_of(records), strict=True):
        np.testing.assert_array_equal(pixels, other)
        assert label == other_label
    for known in (folder, records):  # without a look at an image
        np.testing.assert_array_equal(known.labels, [label for _, label in wanted])
    assert not hasattr(tfds, "labels")
    # TFDS shuffles what it writes
    assert sorted((p.tobytes(), label) for p, label in pixels_of(tfds)) == sorted(
        (p.tobytes(), label) for p, label in wanted
    )
    assert "tensorflow" not in sys.modules


def test_batches_of_shards_are_those_of_the_folder(everywhere):
    batches = {}
    for name in ("folder", "array_record"):
        data = image_data(name=name, root=str(everywhere[name]), crop="random", mirror=True)
        training = iter(data.training_batches(data.source("train"), 4, seed=3).read())
        batches[name] = [next(training) for _ in range(5)]
        batches[name] += data.ordered(data.source("holdout"), 4)
    for one, other in zip(*batches.values(), strict=True):
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])


@pytest.mark.parametrize("name", ["array_record", "tfds"])
def test_worker_processes_read_what_threads_read(everywhere, name):
    def batches(workers):
        data = image_data(
            name=name,
            root=str(everywhere[name]),
            dataset=IMAGENET,
            crop="random",
            mirror=True,
            workers=workers,
        )
        training = iter(data.training_batches(data.source("train"), 4, seed=3).read())
        found = [next(training) for _ in range(5)]
        if hasattr(training, "close"):
            training.close()
        return found + list(data.ordered(data.source("holdout"), 4))

    for one, other in zip(batches(0), batches(2), strict=True):
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])


def test_a_config_reaches_tfds(everywhere):
    data = image_data(name="tfds", root=str(everywhere["tfds"]), dataset=IMAGENET)
    labels = [batch["label"] for batch in data.ordered(data.source("holdout"), 6)]
    assert sorted(np.concatenate(labels)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["folder", "array_record", "tfds"])
def test_sources_travel_and_are_read_from_threads(everywhere, name):
    source = opened(everywhere, name, "train")
    wanted = pixels_of(source)
    again = pickle.loads(pickle.dumps(source))
    assert repr(again) == repr(source)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(again.__getitem__, [*range(9)] * 8))
    for index, item in enumerate(found):
        np.testing.assert_array_equal(np.asarray(item["image"]), wanted[index % 9][0])


@pytest.mark.parametrize("name", ["folder", "array_record", "tfds"])
def test_the_repr_tells_contents_apart(everywhere, name):
    train, again, holdout = (
        opened(everywhere, name, split) for split in ("train", "train", "holdout")
    )
    assert repr(train) == repr(again) != repr(holdout)
    assert "0x" not in repr(train)


def test_the_repr_of_shards_knows_their_content(copied, tmp_path):
    tree, roots = copied("folder"), []
    for number in (0, 1):
        roots.append(tmp_path / f"shards-{number}")
        prepare(f"--source={tree}", f"--out={roots[-1]}")
        (tree / "train/n01440764/n01440764_7.JPEG").write_bytes(imagenet.jpegs(77, 1)[0])
    one, other = (repr(ArrayRecords(str(root), "train")) for root in roots)
    assert one != other


def test_the_iterator_over_shards_resumes_where_it_was(everywhere):
    data = image_data(name="array_record", root=str(everywhere["array_record"]))
    expected = list(itertools.islice(data.training_batches(data.source("train"), 2, 0).read(), 4))
    again = iter(data.training_batches(data.source("train"), 2, 0).read(start=3))
    np.testing.assert_array_equal(next(again)["image"], expected[3]["image"])


@pytest.mark.parametrize("name", ["array_record", "tfds"])
def test_without_a_validation_set_a_share_is_held_out(tmp_path, name):
    if name == "tfds":
        pytest.importorskip("tensorflow_datasets")
        root = imagenet.write_tfds(tmp_path, splits=("train",))
    else:
        root = tmp_path / "shards"
        imagenet.write_tree(tmp_path / "tree")
        prepare(f"--source={tmp_path}/tree/train", f"--out={root}", "--shard-images=4")
    made = {
        split: make_source(name, split, root=str(root), dataset=IMAGENET, holdout=1 / 3)
        for split in SPLITS
    }
    assert [len(source) for source in made.values()] == [6, 3]
    seen = [p.tobytes() for source in made.values() for p, _ in pixels_of(source)]
    assert len(set(seen)) == 9
    if name == "array_record":  # the very images that the folder holds out
        folder = Folder(f"{tmp_path}/tree/train", "holdout", holdout=1 / 3)
        for (one, _), (other, _) in zip(pixels_of(folder), pixels_of(made["holdout"]), strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(DataError, match=r"the holdout split is empty: data.holdout is 0.0"):
        make_source(name, "holdout", root=str(root), dataset=IMAGENET)
    with pytest.raises(DataError, match=r"data.holdout is 1.5; it must be in \[0, 1\)"):
        make_source(name, "train", root=str(root), dataset=IMAGENET, holdout=1.5)


def test_a_record_is_what_the_format_says():
    record = shards.Record(258, "ä.JPEG", b"\xff\xd8")
    stored = shards.pack(record)
    assert stored == b"GIM1" + bytes([2, 1, 0, 0]) + bytes([7, 0]) + "ä.JPEG".encode() + b"\xff\xd8"
    assert shards.unpack(stored) == record
    for broken in (b"", b"GIM1", b"JPEG" + stored[4:]):
        with pytest.raises(ValueError, match="not a record"):
            shards.unpack(broken)
    with pytest.raises(DataError, match="65,535 bytes"):
        shards.pack(shards.Record(0, "x" * 70_000, b""))


def test_a_corrupt_record_is_named_or_skipped(tmp_path, caplog):
    imagenet.write_tree(tmp_path / "tree")
    (tmp_path / "tree/train/n01443537/n01443537_1003.JPEG").write_bytes(b"not an image")
    prepare(
        f"--source={tmp_path}/tree", f"--out={tmp_path}/shards", "--shard-images=4", "--no-check"
    )
    source = ArrayRecords(str(tmp_path / "shards"), "train")
    where = r"record 0 \(n01443537_1003.JPEG\) of train-00001-of-00003.array_record"
    with pytest.raises(DataError, match=where + ".*on_corrupt=skip"):
        source[4]
    source = ArrayRecords(str(tmp_path / "shards"), "train", on_corrupt="skip")
    np.testing.assert_array_equal(source[4]["image"], source[5]["image"])
    assert len(source.skipped) == 1
    assert "1 skipped so far" in caplog.text
    data = image_data(name="array_record", root=str(tmp_path / "shards"), on_corrupt="skip")
    valid = np.concatenate([b["valid"] for b in data.ordered(source, 3)])
    np.testing.assert_array_equal(valid, np.arange(9) != 4)


@pytest.mark.parametrize("name", ["array_record", "tfds"])
def test_a_damaged_block_is_one_unreadable_image(copied, name):
    root = copied(name)
    path = next(root.rglob("*train.array_record-0*" if name == "tfds" else "train-00000*"))
    content = bytearray(path.read_bytes())
    content[2000] ^= 255  # in the first image
    path.write_bytes(content)
    source = make_source(name, "train", root=str(root), dataset=IMAGENET, on_corrupt="skip")
    pixels_of(source)
    assert len(source.skipped) == 1
    assert "no name" in next(iter(source.skipped))


def test_an_image_is_decoded_once_in_an_ordered_pass(everywhere, monkeypatch):
    source = opened(everywhere, "array_record", "train")
    reads, own = [], type(source)._encoded
    monkeypatch.setattr(
        type(source), "_encoded", lambda self, index: reads.append(index) or own(self, index)
    )
    list(image_data().ordered(source, 9))
    assert sorted(reads) == [*range(9)]


def test_shards_that_the_manifest_does_not_describe_are_named(copied):
    root = copied("array_record")
    whole = (root / "train-00001-of-00003.array_record").read_bytes()
    (root / "train-00001-of-00003.array_record").write_bytes(whole[:-10])
    (root / "train-00002-of-00003.array_record").unlink()
    with pytest.raises(DataError) as error:
        ArrayRecords(str(root), "train")
    for says in (
        f"train-00001-of-00003.array_record has {len(whole) - 10} bytes, not {len(whole)}",
        "train-00002-of-00003.array_record is missing",
    ):
        assert says in str(error.value)
    assert "train-00000" not in str(error.value)
    assert len(ArrayRecords(str(root), "holdout")) == 6


def test_a_count_that_disagrees_is_named(copied):
    root = copied("array_record")
    manifest = json.loads((root / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    shard["count"] += 1
    shard["classes"]["0"] += 1
    manifest["splits"]["train"]["count"] += 1
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"train-00000-of-00003.array_record has 4 records, not 5"):
        ArrayRecords(str(root), "train")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"complete": False}, "is unfinished: run the same prepare-data"),
        ({"version": 2}, "has version 2 of the format, this code reads 1"),
        ({"format": "latents"}, "was not written by prepare-data"),
    ],
)
def test_a_manifest_that_is_none_is_refused(copied, changes, says):
    root = copied("array_record")
    manifest = json.loads((root / "manifest.json").read_text()) | changes
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=says):
        ArrayRecords(str(root), "train")


@pytest.mark.parametrize("name", ["array_record", "tfds", "folder"])
@pytest.mark.parametrize("root", ["", "/nowhere/at/all", "s3://bucket/x", "gs://bucket/x"])
def test_data_that_are_not_there_are_explained(name, root):
    says = {
        "": "--config.data.root=DIR",
        "/nowhere/at/all": "prepare-data|give --config",
        "s3://bucket/x": "mount it",
        "gs://bucket/x": "mount it" if name == "folder" else "gs://bucket/x.*gcsfs",
    }[root]
    with pytest.raises(DataError, match=says):
        make_source(name, "train", root=root, dataset=IMAGENET)


def test_tfrecord_data_are_explained(copied):
    root = copied("tfds")
    path = root / "imagenet2012/5.1.0/dataset_info.json"
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    for old in path.parent.glob("*array_record*"):
        old.rename(str(old).replace("array_record", "tfrecord"))
    with pytest.raises(DataError) as error:
        Tfds(str(root), IMAGENET, "train")
    for word in ("tfrecord", "only TensorFlow reads", 'file_format="array_record"', "prepare-data"):
        assert word in str(error.value)
    assert "tensorflow" not in sys.modules


def test_a_missing_shard_of_tfds_is_named(copied):
    root = copied("tfds")
    next(root.rglob("*train.array_record*")).unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 1 shards, such as imagenet2012-train"):
        Tfds(str(root), IMAGENET, "train")


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("imagenet2012:4.0.0", "'imagenet2012:4.0.0', which TFDS does not find in .*5.1.0"),
        ("imagnet", "'imagnet', which TFDS does not find"),
        ("mnist", "holds no prepared mnist"),
    ],
)
def test_another_data_set_of_tfds_is_explained(everywhere, dataset, says):
    with pytest.raises(DataError, match=says):
        Tfds(str(everywhere["tfds"]), dataset, "train")


def test_a_data_set_without_labels_is_refused(tmp_path):
    imagenet.write_tfds(tmp_path, label=None)
    with pytest.raises(DataError, match=r"no features image and label .* it has file_name, image"):
        Tfds(str(tmp_path), IMAGENET, "train")


def test_classes_are_numbered_by_the_training_images(everywhere, copied):
    """A validation set without images of the first class keeps the numbers of the others."""
    root = copied("folder")
    first, *_, last = imagenet.CLASSES
    for path in (root / "val" / first).iterdir():
        path.unlink()
    (root / "val" / first).rmdir()
    assert {label for _, label in pixels_of(Folder(str(root), "holdout"))} == {1, 2}
    (root / "val" / last).rename(root / "val" / "n99999999")
    with pytest.raises(DataError, match="classes that the training images lack: n99999999"):
        Folder(str(root), "holdout")


def test_an_unknown_source_is_refused_in_the_config():
    config = default_config()
    config.data.name = "imagenet"
    with pytest.raises(ConfigError, match=r"data.name is 'imagenet'; use one of digits, folder"):
        validate(config)


def test_nothing_is_logged_of_whole_data(everywhere, caplog):
    caplog.set_level(logging.WARNING)
    for name in everywhere:
        opened(everywhere, name, "train")
    assert not [r for r in caplog.records if r.name == "root"]
