"""Sources, pipelines and latents on disk."""

import itertools

import grain
import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from gae_jax.data.images import center_crop, random_crop
from gae_jax.data.latent_files import DTYPES
from gae_jax.data.latent_shards import Moments, ShardFile, finish_set, finished_shards, write_shard
from gae_jax.data.latents import LatentSet
from gae_jax.data.pipeline import ImageData
from gae_jax.data.sources import make_source
from gae_jax.data.sources.base import held_out
from gae_jax.data.sources.digits import Digits
from gae_jax.data.sources.folder import Folder
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.files import read_json, write_json


def image_data(**changes):
    fields = dict(
        name="digits", root="", holdout=0.2, image_size=16, crop="center", mirror=False,
        on_corrupt="error", workers=0,
    )  # fmt: skip
    return ImageData(**fields | changes)


@pytest.fixture
def tree(tmp_path):
    """Two classes of three photographs, in three formats and with odd modes."""
    pixels = photographs.astronaut()
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index, suffix in enumerate(("jpg", "png", "webp")):
            start = 60 * label + 20 * index
            Image.fromarray(pixels[start : start + 90, start : start + 70]).save(
                folder / f"{index}.{suffix}"
            )
    return tmp_path / "images"


def test_digits_are_split_by_class_and_complete():
    train, holdout = Digits("train"), Digits("holdout")
    assert len(train) + len(holdout) == 1797
    counts = np.bincount([holdout[i]["label"] for i in range(len(holdout))])
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert train[0]["image"].size == (32, 32)
    assert train.class_names == [str(i) for i in range(10)]


def test_held_out_is_fixed_and_stratified():
    labels = np.repeat([0, 1], [10, 30])
    chosen = held_out(labels, 0.1)
    np.testing.assert_array_equal(chosen, held_out(labels, 0.1))
    assert (chosen[:10].sum(), chosen[10:].sum()) == (1, 3)


def test_folder_reads_every_format(tree):
    source = Folder(str(tree), "train")
    assert source.class_names == ["cat", "dog"]
    assert len(source) == 6
    for index in range(6):
        item = source[index]
        assert item["image"].mode == "RGB"
        assert item["label"] == index // 3


def test_folder_lays_transparency_on_white_and_reads_grey(tree):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tree / "cat" / "clear.png")
    Image.new("L", (20, 20), 7).save(tree / "cat" / "grey.png")
    source = Folder(str(tree), "train")
    found = {source.place(i).name: np.asarray(source[i]["image"]) for i in range(len(source))}
    assert (found["clear.png"] == 255).all()
    assert (found["grey.png"] == 7).all()


def test_folder_uses_a_split_on_disk(tree):
    (tree.parent / "both").mkdir()
    tree.rename(tree.parent / "both" / "train")
    root = tree.parent / "both"
    with pytest.raises(DataError, match="no val/"):
        Folder(str(root), "holdout")
    (root / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(root / "val" / "cat" / "a.png")
    assert len(Folder(str(root), "holdout")) == 1
    assert len(Folder(str(root), "train")) == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(name="folder", root=""), "is no directory; give --config.data.root"),
        (dict(name="folder", root="/nowhere/at/all"), "/nowhere/at/all"),
        (dict(name="imagnet"), "known sources are 'digits', 'folder', 'tfds' and"),
        (dict(name="digits", holdout=1.5), r"must be in \[0, 1\)"),
    ],
)
def test_missing_data_is_explained(arguments, says):
    with pytest.raises(DataError, match=says):
        make_source(split="train", **arguments)


def test_an_empty_folder_and_an_empty_split_are_explained(tree, tmp_path):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"holds no images: expected CLASS/NAME with one of .*\.jpg"
    ):
        Folder(str(tmp_path / "empty"), "train")
    with pytest.raises(DataError, match=r"the holdout split is empty: data.holdout is 0.0"):
        Folder(str(tree), "holdout")


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_corrupt_image_is_named_or_skipped_and_counted(tree, damage):
    path = tree / "cat" / "0.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not an image")
    with pytest.raises(DataError, match=r"cat/0.jpg cannot be read .*on_corrupt=skip"):
        Folder(str(tree), "train")[0]
    source = Folder(str(tree), "train", on_corrupt="skip")
    np.testing.assert_array_equal(source[0]["image"], source[1]["image"])
    assert source.skipped == {path}
    data = image_data(name="folder", root=str(tree), on_corrupt="skip")
    batch = next(data.ordered(source, 8))
    np.testing.assert_array_equal(batch["valid"], [False] + [True] * 5 + [False] * 2)


def test_a_folder_of_nothing_but_corrupt_images_ends(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"no")
    with pytest.raises(DataError, match="none of the 1 images"):
        Folder(str(tmp_path), "train", on_corrupt="skip")[0]


def test_a_corrupt_image_in_training_reaches_the_user(tree):
    (tree / "dog" / "2.webp").write_bytes(b"no")
    data = image_data(name="folder", root=str(tree), holdout=0.0)
    batches = iter(data.training_batches(data.source("train"), 6, seed=0).read())
    with pytest.raises(DataError, match=r"dog/2.webp"):
        next(batches)


def adm_center_crop(image, size):
    """Copied in substance from openai/guided-diffusion image_datasets.py (MIT)."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(
        tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC
    )
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("size", [16, 100, 256])
def test_center_crop_is_adms(size):
    for pixels in (photographs.coffee(), photographs.chelsea()):
        image = Image.fromarray(pixels)
        np.testing.assert_array_equal(center_crop(image, size), adm_center_crop(image, size))


def test_random_crop_has_the_size_and_moves():
    image = Image.fromarray(photographs.chelsea())
    crops = [random_crop(image, 32, np.random.default_rng(seed)) for seed in range(4)]
    assert {crop.shape for crop in crops} == {(32, 32, 3)}
    assert len({crop.tobytes() for crop in crops}) == 4


def take(data, count, seed=0, size=64):
    batches = iter(data.training_batches(data.source("train"), size, seed).read())
    return list(itertools.islice(batches, count))


def test_training_order_depends_on_the_seed_alone():
    one, four = (take(image_data(workers=n, mirror=True), 5) for n in (1, 4))
    other = take(image_data(mirror=True), 5, seed=1)
    assert all((a["image"] == b["image"]).all() for a, b in zip(one, four, strict=True))
    assert any((a["label"] != b["label"]).any() for a, b in zip(one, other, strict=True))


def test_an_epoch_sees_every_image_once(tree):
    data = image_data(name="folder", root=str(tree), holdout=0.0)
    batches = take(data, 4, size=3)  # two epochs of six images
    for epoch in (batches[:2], batches[2:]):
        seen = np.concatenate([batch["image"] for batch in epoch]).reshape(6, -1)
        assert len(np.unique(seen, axis=0)) == 6


def test_the_iterator_resumes_where_it_was():
    data = image_data(mirror=True)
    batches = data.training_batches(data.source("train"), 32, 0)
    expected = list(itertools.islice(batches.read(), 60))[-1]  # in the second epoch
    again = data.training_batches(data.source("train"), 32, 0)
    np.testing.assert_array_equal(next(iter(again.read(start=59)))["image"], expected["image"])


def test_processes_read_the_rows_of_the_same_batches():
    data = image_data(mirror=True)
    batches = data.training_batches(data.source("train"), 32, 0)
    whole = next(iter(batches.read(start=7)))
    for rows in (range(8, 16), [0, 1, 30, 31]):
        part = next(iter(batches.read(rows, start=7)))
        for name in whole:
            np.testing.assert_array_equal(part[name], whole[name][list(rows)])


def test_the_ordered_pass_sees_every_image_once():
    data = image_data()
    batches = list(data.ordered(data.source("holdout"), 100))
    assert [batch["image"].shape for batch in batches] == [(100, 16, 16, 3)] * 4
    index = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
    np.testing.assert_array_equal(index, np.arange(len(data.source("holdout"))))


def test_moments_are_exact_for_any_batches():
    rows = np.random.default_rng(0).normal(1e4, 1, (1000, 3)).astype(np.float32)
    for sizes in ([1000], [1, 10, 989], [333, 667]):
        moments = Moments(3)
        for part in np.split(rows, np.cumsum(sizes)[:-1]):
            moments.add(part)
        np.testing.assert_allclose(moments.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.std, rows.astype(np.float64).std(0), rtol=1e-9)


def write_latents(folder, views=2, dtype="float32", elements=False, **more):
    latents = np.random.default_rng(0).normal(size=(25, views, 2, 2, 3)).astype(np.float32)
    latents = latents.astype(DTYPES[dtype])
    for index in (2, 0, 1):  # whoever is ready first
        rows = slice(10 * index, 10 * index + 10)
        write_shard(
            folder, index, latents[rows], np.arange(25)[rows], elements=elements, tokenizer="3f2a",
            skipped=0,
        )  # fmt: skip
    finish_set(folder, 3, dtype=dtype, tokenizer="3f2a", **more)
    return latents.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_come_back_with_exact_statistics(tmp_path, dtype):
    latents = write_latents(tmp_path, dtype=dtype)
    found = LatentSet.open(tmp_path)
    assert len(found) == 25
    assert [shard["count"] for shard in found.manifest["shards"]] == [10, 10, 5]
    for index in (0, 9, 10, 24):
        np.testing.assert_array_equal(found[index]["latent"], latents[index])
        assert found[index]["label"] == index
    np.testing.assert_array_equal(found.label_counts, np.ones(25))
    np.testing.assert_allclose(found.mean, latents.mean(axis=(0, 1, 2, 3)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.std, latents.std(axis=(0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(found.take(np.arange(len(found)))[0], latents[:, 0])


@pytest.mark.parametrize("value", [0.25, 0.1, -1000.1])  # the last two are rounded
def test_a_constant_channel_can_be_divided_by(tmp_path, value):
    latents = np.random.default_rng(0).normal(size=(10, 1, 2, 2, 3)).astype(np.float32)
    latents[..., 1] = value
    write_shard(tmp_path, 0, latents, np.arange(10), elements=False, tokenizer="3f2a", skipped=0)
    finish_set(tmp_path, 1, dtype="float32", tokenizer="3f2a")
    found = LatentSet.open(tmp_path)
    assert found.constant_channels == [1]
    assert found.std[1] == 1
    scaled = (latents - found.mean) / found.std
    assert np.all(np.abs(scaled[..., 1]) <= (0 if value == 0.25 else 1e-7 * abs(value)))
    np.testing.assert_allclose(scaled[..., 0].std(), 1, rtol=1e-5)


def test_shards_that_come_in_pieces_are_as_if_written_at_once(tmp_path):
    rng = np.random.default_rng(1)
    latents, labels = rng.normal(size=(150, 1, 2, 2, 3)).astype(np.float32), np.arange(150)
    for name, cuts in (("whole", ()), ("pieces", (1, 70, 129))):
        (tmp_path / name).mkdir()
        shard = ShardFile(tmp_path / name, 0, latents.shape[1:], latents.dtype, elements=True)
        for part in np.split(np.arange(150), cuts):
            shard.add(latents[part], labels[part])
        shard.finish(tokenizer="3f2a", skipped=0)
        shard.discard()
    for file in ("latents-00000.npy", "labels-00000.npy", "moments-00000.npy", "shard-00000.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "pieces" / file).read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "pieces" / "latents-00000.npy"), latents)
    unfinished = ShardFile(tmp_path / "whole", 1, latents.shape[1:], latents.dtype)
    unfinished.add(latents, labels)
    unfinished.discard()
    assert len(list((tmp_path / "whole").iterdir())) == 4


def test_moments_of_a_shard_that_are_huge_whole_numbers_are_taken(tmp_path):
    write_latents(tmp_path)
    shard = read_json(tmp_path / "shard-00001.json")
    write_json(tmp_path / "shard-00001.json", shard | {"mean": [10**30, 0, 0]})
    manifest = finish_set(tmp_path, 3, dtype="float32", tokenizer="3f2a")
    assert manifest["mean"][0] > 1e29


def test_statistics_of_every_element(tmp_path):
    more = dict(elements=True, statistics_of="element")
    latents = write_latents(tmp_path, **more)
    found = LatentSet.open(tmp_path)
    assert found.per == "element"
    np.testing.assert_allclose(found.mean, latents.mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(latents.var(axis=(0, 1)) + 1e-5), rtol=1e-5)
    assert np.ptp(found.std[..., 0]) > 0.05  # places differ
    write_latents(tmp_path, **more, variance_only=True)
    again = LatentSet.open(tmp_path)
    np.testing.assert_array_equal(again.mean, np.zeros((2, 2, 3)))
    np.testing.assert_array_equal(again.std, found.std)


def test_latent_batches_draw_a_view_and_never_mirror(tmp_path):
    latents = write_latents(tmp_path)
    batches = LatentSet.open(tmp_path).training_batches(5, 0, workers=2).read()
    views = []
    for batch in itertools.islice(iter(batches), 10):
        for latent, label in zip(batch["latent"], batch["label"], strict=True):
            views.append([(latent == latents[label, v]).all() for v in (0, 1)])
    assert np.sum(views) == 50
    assert 10 < np.sum(views, axis=0)[0] < 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latent_batches_have_the_order_and_the_views_of_grain(tmp_path, dtype):
    write_latents(tmp_path, dtype=dtype)
    latents = LatentSet.open(tmp_path)

    def choose(item, rng):
        return {**item, "latent": item["latent"][rng.integers(len(item["latent"]))]}

    examples = grain.MapDataset.source(latents).seed(7).shuffle().repeat().random_map(choose)
    rows = [4, 1, 3]  # of a process among several
    batches = iter(latents.training_batches(8, 7, workers=2).read(rows, start=1))
    for number, batch in zip(range(1, 9), batches, strict=False):  # three epochs of 25
        expected = [examples[8 * number + row] for row in rows]
        for name in ("latent", "label"):
            stacked = np.stack([example[name] for example in expected])
            np.testing.assert_array_equal(batch[name], stacked)
            assert batch[name].dtype == stacked.dtype


def test_stale_and_unfinished_latents_are_refused(tmp_path):
    write_latents(tmp_path)
    np.save(tmp_path / "latents-00007.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"disagree on \['latents-00007.npy'\].*--fresh"):
        LatentSet.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="no finished set"):
        LatentSet.open(tmp_path)


def test_shards_of_another_tokenizer_or_length_are_refused(tmp_path):
    write_latents(tmp_path)
    assert finished_shards(tmp_path, 3, tokenizer="3f2a") == [0, 1, 2]
    with pytest.raises(DataError, match=r"shard-00000.json: made by tokenizer 3f2a, .*uses 91bc"):
        finished_shards(tmp_path, 3, tokenizer="91bc")
    with pytest.raises(DataError, match=r"shard-00002.json: the set has 2 shards"):
        finished_shards(tmp_path, 2, tokenizer="3f2a")
    np.save(tmp_path / "latents-00001.npy", np.zeros((9, 2, 2, 2, 3), np.float32))
    with pytest.raises(DataError, match=r"latents-00001.npy holds 9 images, the manifest says 10"):
        LatentSet.open(tmp_path)


def test_jax_is_not_needed_to_read(tree):
    """Decoding threads must not touch devices: arrays that come out are numpy."""
    batch = take(image_data(name="folder", root=str(tree), holdout=0.0), 1, size=2)[0]
    assert not any(isinstance(value, jax.Array) for value in batch.values())
