"""Archives of samples and reference statistics, against numpy and against damage."""

import hashlib
import io
import itertools
import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from gae_jax.evaluation.archives import open_samples, samples_digest, write_samples
from gae_jax.evaluation.stored_statistics import is_statistics, load_statistics, write_statistics
from gae_jax.interop.pickles import read_arrays
from gae_jax.runtime.errors import DataError


def images_of(count=7, size=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size + 2, 3), np.uint8)


LABELS = np.array([3, 1, 4, 1, 5, 9, 2], np.int32)


def moments(d, seed=0):
    x = np.random.default_rng(seed).normal(size=(4 * d, d))
    return x.mean(0), np.cov(x.T)


def all_of(samples, size=3):
    return np.concatenate(list(samples.batches(size)))


def refused(call, *words):
    """The call raises a DataError that has all these words."""
    with pytest.raises(DataError) as error:
        call()
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} not in {error.value}"


def png_folder(folder, images, labels=None):
    folder.mkdir()
    for i, image in enumerate(images):
        name = f"{i:06d}.png" if labels is None else f"{i:06d}_{labels[i]:04d}.png"
        Image.fromarray(image).save(folder / name)
    return folder


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


# Samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_npz_is_read_in_batches(save, size, tmp_path):
    images = images_of()
    save(tmp_path / "a.npz", images, LABELS.astype(np.int64))
    samples = open_samples(tmp_path / "a.npz")
    assert (samples.count, samples.shape, samples.kind) == (7, (6, 8, 3), "npz")
    assert samples.labels.dtype == np.int32
    np.testing.assert_array_equal(samples.labels, LABELS)
    batches = list(samples.batches(size))
    assert [len(b) for b in batches] == [min(size, 7 - i) for i in range(0, 7, size)]
    assert all(b.dtype == np.uint8 for b in batches)
    np.testing.assert_array_equal(np.concatenate(batches), images)
    np.testing.assert_array_equal(all_of(samples), images)  # a second time


def test_npz_is_never_read_whole(tmp_path, monkeypatch):
    images = images_of(40, 32)
    np.savez_compressed(tmp_path / "a.npz", images)
    largest = 0
    read = zipfile.ZipExtFile.read

    def spy(self, n=-1):
        nonlocal largest
        content = read(self, n)
        largest = max(largest, len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", spy)
    monkeypatch.setattr(np, "load", None)
    np.testing.assert_array_equal(all_of(open_samples(tmp_path / "a.npz"), 4), images)
    assert largest == 4 * images[0].size


def test_npy_and_folders(tmp_path):
    images = images_of(12)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "f.npy", np.asfortranarray(images))
    with_labels = png_folder(tmp_path / "labelled", images[:7], LABELS)
    (with_labels / "manifest.json").write_text("{}")
    for path, kind, labels, count in (
        (tmp_path / "a.npy", "npy", None, 12),
        (tmp_path / "f.npy", "npy", None, 12),
        (png_folder(tmp_path / "plain", images), "png", None, 12),
        (with_labels, "png", LABELS, 7),
    ):
        samples = open_samples(path)
        assert (samples.kind, samples.count, samples.shape) == (kind, count, (6, 8, 3))
        np.testing.assert_array_equal(samples.labels, labels)
        np.testing.assert_array_equal(all_of(samples, 5), images[:count])


def test_a_folder_is_ordered_by_number_not_by_name(tmp_path):
    images = images_of(12)
    (tmp_path / "a").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "a" / f"{i}.png")  # 10.png sorts before 2.png
    np.testing.assert_array_equal(all_of(open_samples(tmp_path / "a")), images)


def test_an_arr_1_of_another_length_is_no_label(tmp_path):
    path = npz(tmp_path / "a.npz", arr_0=images_of(), arr_1=np.zeros((7, 2)))
    assert open_samples(path).labels is None
    path = npz(tmp_path / "a.npz", arr_0=images_of(), arr_1=np.zeros(7))
    refused(lambda: open_samples(path), "a.npz", "arr_1 is float64", "integers")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (images_of().astype(np.float32), ("float32", "not uint8")),
        (images_of().astype(np.int64), ("int64", "not uint8")),
        (images_of().transpose(0, 3, 1, 2).copy(), (r"\[7, 3, 6, 8\]", "channels last")),
        (images_of()[..., :1].copy(), (r"\[7, 6, 8, 1\]",)),
        (images_of()[0], (r"\[6, 8, 3\]",)),
        (images_of()[:0], ("no images",)),
    ],
)
def test_other_arrays_are_refused(images, words, tmp_path):
    np.savez(tmp_path / "a.npz", images)
    np.save(tmp_path / "a.npy", images)
    for name in ("a.npz", "a.npy"):
        refused(lambda name=name: open_samples(tmp_path / name), name, *words)


def test_npz_that_is_no_archive_of_samples(tmp_path):
    mu, sigma = moments(4)
    path = npz(tmp_path / "s.npz", mu=mu, sigma=sigma)
    refused(lambda: open_samples(path), "s.npz", r"\['mu', 'sigma'\]", "statistics, not of samples")
    path = npz(tmp_path / "x.npz", pictures=images_of(), y=LABELS)
    refused(lambda: open_samples(path), r"\['pictures', 'y'\]", "arr_0")
    np.savez(tmp_path / "f.npz", np.asfortranarray(images_of()))
    refused(lambda: open_samples(tmp_path / "f.npz"), "Fortran", "ascontiguousarray")
    np.savez(tmp_path / "o.npz", np.array([{}], object))
    refused(lambda: open_samples(tmp_path / "o.npz"), "o.npz")
    (tmp_path / "t.txt").write_text("hello")
    refused(lambda: open_samples(tmp_path / "t.txt"), "neither an npz nor an npy")
    refused(lambda: open_samples(tmp_path / "none.npz"), "none.npz", "No such file")
    with open(tmp_path / "e.pkl", "wb") as file:
        pickle.dump({"fid": {"mu": mu, "sigma": sigma}}, file)
    refused(lambda: open_samples(tmp_path / "e.pkl"), "statistics, not samples")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused(save, tmp_path):
    path = tmp_path / "a.npz"
    save(path, images_of(30, 20), np.arange(30))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(lambda: open_samples(path), "a.npz", "truncated or damaged", "again")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255  # amid the pixels: the directory is whole
    path.write_bytes(flipped)
    refused(lambda: all_of(open_samples(path)), "a.npz", "truncated or damaged")
    path.write_bytes(b"")
    refused(lambda: open_samples(path), "neither")


def test_an_npz_with_fewer_bytes_than_its_header_says_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, images_of())
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-1])
    refused(lambda: open_samples(tmp_path / "a.npz"), "truncated or damaged", "1007 bytes")
    (tmp_path / "a.npy").write_bytes(buffer.getvalue()[:-1])
    refused(lambda: open_samples(tmp_path / "a.npy"), "truncated or damaged")


def test_a_batch_needs_a_size(tmp_path):
    np.save(tmp_path / "a.npy", images_of())
    refused(lambda: open_samples(tmp_path / "a.npy").batches(0), "at least 1")


def test_folders_that_are_refused(tmp_path):
    def folder(name, change):
        path = png_folder(tmp_path / name, images_of())
        change(path)
        return path

    def save(name, image, **how):
        return lambda path: Image.fromarray(image).save(path / name, **how)

    def of_16_bits(path):
        content = bytearray((path / "000006.png").read_bytes())
        content[24] = 16  # the depth in the header
        (path / "000006.png").write_bytes(content)

    def remove(name):
        return lambda path: (path / name).unlink()

    image = images_of()[0]
    grey16 = np.zeros((6, 8), np.uint16)
    for number, (change, *words) in enumerate(
        [
            (save("000007.jpg", image), "JPEG", r"000007\.jpg", "moves the FID"),
            (save("000007.JPEG", image), "JPEG"),
            (save("000007.png", image, format="jpeg"), r"000007\.png", "JPEG file by its content"),
            (remove("000003.png"), "no sample 3", "6 files", "0 to 6"),
            (remove("000000.png"), "no sample 0"),
            (save("3.png", image), "sample 3 twice"),
            (save("cat.png", image), r"cat\.png without a global id"),
            (save("000007_0001.png", image), "has no label", "mixes two sets"),
            (save("000007.png", images_of(1, 8)[0]), "8 x 10", "6 x 8", "one size"),
            (save("000007.png", image[..., 0]), "grey of 8 bits", "RGB of 8 bits"),
            (of_16_bits, "RGB of 16 bits"),
            (save("000007.png", grey16), "grey of 16 bits"),
            (save("000007.png", np.dstack([image, image[..., :1]])), "RGBA of 8 bits"),
            (lambda path: (path / "000007.png").write_bytes(b"\x89PNG"), "an incomplete PNG"),
        ]
    ):
        path = folder(f"f{number}", change)
        refused(lambda path=path: open_samples(path), str(tmp_path), *words)
    (tmp_path / "empty").mkdir()
    refused(lambda: open_samples(tmp_path / "empty"), "no PNG files")


def test_a_truncated_png_is_named(tmp_path):
    path = png_folder(tmp_path / "a", images_of(3, 32))
    bad = path / "000001.png"
    bad.write_bytes(bad.read_bytes()[:500])
    refused(lambda: all_of(open_samples(path)), r"000001\.png is damaged")


def test_digests(tmp_path):
    np.save(tmp_path / "a.npy", images_of())
    expected = hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()
    assert samples_digest(tmp_path / "a.npy") == expected
    one, two = (png_folder(tmp_path / name, images_of()) for name in ("one", "two"))
    assert samples_digest(one) == samples_digest(two)
    (one / "note.txt").write_text("no sample")
    assert samples_digest(one) == samples_digest(two)
    (one / "000006.png").rename(one / "6.png")
    assert samples_digest(one) != samples_digest(two)
    Image.fromarray(images_of(seed=1)[0]).save(two / "000000.png")
    three = png_folder(tmp_path / "three", images_of())
    assert samples_digest(two) != samples_digest(three)
    refused(lambda: samples_digest(tmp_path / "none"), "none")


@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize("form", ["array", "memmap", "iterator"])
def test_samples_round_trip(form, labels, tmp_path):
    images = images_of()
    np.save(tmp_path / "raw.npy", images)
    given = {
        "array": images,
        "memmap": np.load(tmp_path / "raw.npy", mmap_mode="r"),
        "iterator": (images[i : i + 2] for i in range(0, 9, 2)),  # the last one is empty
    }[form]
    path = tmp_path / "new" / "a.npz"
    write_samples(path, given, labels)
    assert os.listdir(path.parent) == ["a.npz"]
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"] + ["arr_1"] * (labels is not None)
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], images)
        if labels is not None:
            assert file["arr_1"].dtype == np.int32
    samples = open_samples(path)
    np.testing.assert_array_equal(all_of(samples), images)
    np.testing.assert_array_equal(samples.labels, labels)
    expected = tmp_path / "numpy.npz"
    np.savez(expected, images, *([] if labels is None else [labels]))
    assert path.read_bytes() == expected.read_bytes()


def test_more_images_than_one_chunk(tmp_path):
    images = images_of(600, 2)
    write_samples(tmp_path / "a.npz", images)
    np.testing.assert_array_equal(all_of(open_samples(tmp_path / "a.npz"), 256), images)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path, images = tmp_path / "a.npz", images_of()
    write_samples(path, images, LABELS)
    before = path.read_bytes()

    def dies():
        yield images[:2]
        raise KeyboardInterrupt

    for labels in (LABELS, None):
        with pytest.raises(KeyboardInterrupt):
            write_samples(path, dies(), labels)
    for given, labels, *words in (
        ([images], LABELS[:6], "more than 6 images for 6 labels"),
        (itertools.repeat(images), LABELS, "more than 7 images"),
        ([images[:5]], LABELS, "5 images for 7 labels"),
        (images, LABELS[:6], "more than 6 images"),
        ([], None, "no images"),
        ([], LABELS, "0 images for 7 labels"),
        ([images, images_of(1, 4)], None, "one size"),
        ([images.astype(np.float32)], None, "float32, not uint8"),
        (images[..., :2], None, "channels last"),
        (images, LABELS[:, None], r"int32 \[7, 1\]"),
        (images, LABELS / 2, "float64"),
    ):
        refused(lambda g=given, y=labels: write_samples(path, g, y), "a.npz", *words)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npz"]


# Statistics ------------------------------------------------------------------------------------


def dump(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def same(found, expected):
    assert found[0].dtype == found[1].dtype == np.float64
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_adms_format(tmp_path):
    pool, spatial = moments(6), moments(4, 1)
    arrays = {
        **dict(zip(("mu", "sigma"), pool, strict=True)),
        **dict(zip(("mu_s", "sigma_s"), spatial, strict=True)),
        "mu_clip": np.full(3, np.nan),
        "sigma_clip": np.zeros(2),
    }
    path = npz(tmp_path / "a.npz", arr_0=images_of(), **arrays)
    found = load_statistics(path)
    assert (found.front_end, found.count, found.has_images) == ("tf", 0, True)
    assert set(found.spaces) == {"pool", "spatial"}
    same(found.spaces["pool"], pool)
    same(found.spaces["spatial"], spatial)
    assert is_statistics(path)
    np.testing.assert_array_equal(all_of(open_samples(path)), images_of())


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_formats_of_two_arrays_do_not_say_their_front_end(names, tmp_path):
    pool = tuple(x.astype(np.float32) for x in moments(6))
    path = npz(tmp_path / "a.npz", **dict(zip(names, pool, strict=True)))
    found = load_statistics(path)
    assert (found.front_end, found.count, found.has_images) == ("", 0, False)
    assert set(found.spaces) == {"pool"}
    same(found.spaces["pool"], [x.astype(np.float64) for x in pool])
    assert is_statistics(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_edm2s_pickle(protocol, module, tmp_path):
    pool, cls = moments(6), moments(5, 1)
    pool = tuple(x.astype(">f4") for x in pool)
    cls = (cls[0], np.asfortranarray(cls[1]))
    content = {
        "fid": {"mu": pool[0], "sigma": pool[1]},
        "fd_dinov2": {"mu": cls[0], "sigma": cls[1], "n": np.float64(3)},
    }
    path = dump(tmp_path / "a.pkl", content, protocol)
    if protocol < 4:  # names are lines: the ones of older and of newer numpy
        old = path.read_bytes()
        path.write_bytes(re.sub(rb"cnumpy\._?core\.", b"c" + module + b".", old))
    found = load_statistics(path)
    assert (found.front_end, found.count, found.has_images) == ("", 0, False)
    same(found.spaces["pool"], [x.astype(np.float64) for x in pool])
    same(found.spaces["cls"], cls)
    assert is_statistics(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_arrays_keep_their_order_and_dtype(protocol, tmp_path):
    c = np.arange(6, dtype=np.int16).reshape(2, 3)
    given = [c, np.asfortranarray(c), c.astype(">f8"), c.astype(str), np.array(2.5)]
    for found, array in zip(
        read_arrays(dump(tmp_path / "a.pkl", given, protocol)), given, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(found), array, strict=True)
    assert read_arrays(dump(tmp_path / "a.pkl", np.float32(1.5), protocol)) == np.float32(1.5)


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_and_not_run(protocol, tmp_path):
    victim = tmp_path / "victim"
    mu, sigma = moments(3)
    for attack in (
        Attack(os.mkdir, str(victim)),
        Attack(eval, f"__import__('os').mkdir({str(victim)!r})"),
        Attack(getattr, np.ndarray, "tofile"),
        Attack(os.system, f"mkdir {victim}"),
    ):
        content = {"fid": {"mu": mu, "sigma": sigma}, "x": attack}
        path = dump(tmp_path / "a.pkl", content, protocol)
        refused(lambda path=path: load_statistics(path), "a.pkl", "it asks for", "can run code")
        assert not is_statistics(path)
        refused(lambda path=path: open_samples(path), "a.pkl")
        assert not victim.exists()
    pickle.loads(dump(tmp_path / "b.pkl", Attack(os.mkdir, str(victim)), protocol).read_bytes())
    assert victim.exists(), "the attack must be one"


def test_an_object_array_in_an_npz_is_not_unpickled(tmp_path):
    victim = tmp_path / "victim"
    arrays = np.array([Attack(os.mkdir, str(victim))], object)
    path = npz(tmp_path / "a.npz", mu=arrays, sigma=np.eye(1))
    refused(lambda: load_statistics(path), "a.npz")
    assert not victim.exists()


def test_other_pickles_are_refused(tmp_path):
    mu, sigma = moments(3)
    for value, *words in (
        ({"mu": mu, "sigma": sigma}, "fd_dinov2", "mu"),
        ([mu, sigma], "list"),
        ({"fid": [mu, sigma]}, "fid is no dictionary"),
        ({"fid": {"mu": mu}}, "sigma is missing"),
        ({"fid": {"mu": [[1], [1, 2]], "sigma": sigma}}, "no arrays"),
        ({"fid": {"mu": mu, "sigma": np.array([{}])}}, "array of 'O8'"),
        ({"fid": {"mu": np.zeros(2, "f8,O"), "sigma": sigma}}, "array of 'V"),
    ):
        path = dump(tmp_path / "a.pkl", value)
        refused(lambda path=path: load_statistics(path), "a.pkl", *words)
    path.write_bytes(dump(path, {"fid": {"mu": mu, "sigma": sigma}}).read_bytes()[:-40])
    refused(lambda: load_statistics(path), "a.pkl", "no pickle of arrays")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, s: (m[:2], s), (r"mean \[2\] and covariance \[3, 3\]",)),
        (lambda m, s: (m[None], s), (r"\[d\] and \[d, d\]",)),
        (lambda m, s: (m, s[0]), (r"covariance \[3\]",)),
        (lambda m, s: (m * np.nan, s), ("NaN or an infinity",)),
        (lambda m, s: (m, s / 0), ("NaN or an infinity",)),
        (lambda m, s: (m, s + np.triu(np.ones((3, 3)), 1)), ("not symmetric",)),
        (lambda m, s: (m[:0], s[:0, :0]), ("no real numbers",)),
        (lambda m, s: (m.astype(str), s), ("no real numbers",)),
        (lambda m, s: (m, s + 0j), ("complex128", "no real numbers")),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_statistics_that_are_none_are_refused(change, words, tmp_path):
    good = moments(3)
    mu, sigma = change(*good)
    path = npz(tmp_path / "a.npz", mu=good[0], sigma=good[1], mu_s=mu, sigma_s=sigma)
    refused(lambda: load_statistics(path), "a.npz", "mu_s and sigma_s", *words)
    path = dump(tmp_path / "a.pkl", {"fid": {"mu": mu, "sigma": sigma}})
    refused(lambda: load_statistics(path), "a.pkl", "mu and sigma", *words)
    refused(
        lambda: write_statistics(
            tmp_path / "new.npz", {"pool": (mu, sigma)}, count=9, front_end="tf", facts={}
        ),
        "new.npz",
        *words,
    )
    assert not (tmp_path / "new.npz").exists()


def test_files_without_statistics(tmp_path):
    mu, sigma = moments(3)
    samples = npz(tmp_path / "a.npz", arr_0=images_of())
    assert not is_statistics(samples)
    refused(lambda: load_statistics(samples), "no mu and sigma", "it holds samples")
    half = npz(tmp_path / "h.npz", mu=mu)
    refused(lambda: load_statistics(half), "sigma is missing", r"\['mu'\]")
    (tmp_path / "t.txt").write_text("x")
    for name in ("t.txt", "none.npz", "."):
        assert not is_statistics(tmp_path / name)
    refused(lambda: load_statistics(tmp_path / "t.txt"), "neither an npz nor a pickle")
    refused(lambda: load_statistics(tmp_path / "none.npz"), "No such file")
    whole = npz(tmp_path / "w.npz", mu=mu, sigma=sigma)
    whole.write_bytes(whole.read_bytes()[:-30])
    assert not is_statistics(whole)
    refused(lambda: load_statistics(whole), "truncated or damaged")


@pytest.mark.parametrize("images", [None, images_of()])
def test_statistics_round_trip(images, tmp_path):
    spaces = {"pool": moments(6), "spatial": moments(4, 1), "cls": moments(5, 2)}
    facts = {"crop": "adm", "seed": 3}
    path = tmp_path / "a.npz"
    write_statistics(
        path, spaces, count=50, front_end="pytorch_fid", facts=facts,
        images=None if images is None else iter(np.split(images, 7)),
    )  # fmt: skip
    assert os.listdir(tmp_path) == ["a.npz"]
    found = load_statistics(path)
    assert (found.count, found.front_end, found.facts) == (50, "pytorch_fid", facts)
    assert found.has_images == (images is not None)
    assert is_statistics(path)
    for space, pair in spaces.items():
        same(found.spaces[space], pair)
    with np.load(path, allow_pickle=False) as file:  # as ADM's evaluator does
        np.testing.assert_array_equal(file["mu"], spaces["pool"][0])
        np.testing.assert_array_equal(file["sigma_s"], spaces["spatial"][1])
        assert json.loads(bytes(file["manifest"]))["count"] == 50
        if images is not None:
            np.testing.assert_array_equal(file["arr_0"], images)
    if images is not None:
        np.testing.assert_array_equal(all_of(open_samples(path)), images)


def test_write_statistics_refuses(tmp_path):
    def write(spaces, **change):
        given = {"count": 9, "front_end": "tf", "facts": {}} | change
        return lambda: write_statistics(tmp_path / "a.npz", spaces, **given)

    pool = {"pool": moments(3)}
    refused(write({}), "a.npz", "pool")
    refused(write({"clip": moments(3)}), "clip", "spatial")
    refused(write(pool, count=1), "statistics of 1 images")
    refused(write(pool, images=[images_of() / 2]), "not uint8")
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_cannot_be_read(tmp_path):
    mu, sigma = moments(3)
    for text in ("{", "[]", '{"count": 3}'):
        manifest = np.frombuffer(text.encode(), np.uint8)
        path = npz(tmp_path / "a.npz", mu=mu, sigma=sigma, manifest=manifest)
        refused(lambda path=path: load_statistics(path), "a.npz", "manifest")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"files": ["../000000.png"]}, "is no name of a file next to it"),
        ({"files": ["x" * 400 + ".png"]}, "File name too long"),
        ({"files": [7]}, "'7' is no name"),
        ({"labels": [2**40]}, "truncated or damaged"),
        ({"labels": 7}, "truncated or damaged"),
    ],
)
def test_a_damaged_manifest_of_drawn_images_is_named(tmp_path, change, says):
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    made = {"files": ["000000.png"], "labels": [1], "finished": True} | change
    (tmp_path / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(DataError, match=rf"manifest\.json.*{says}"):
        open_samples(tmp_path)


def test_hidden_files_beside_images_are_left_aside(tmp_path):
    for i, image in enumerate(images_of(3)):
        Image.fromarray(image).save(tmp_path / f"{i:06d}.png")
    (tmp_path / "._000001.png").write_bytes(b"Mac OS X")
    assert open_samples(tmp_path).count == 3


def test_a_set_in_two_forms_is_refused(tmp_path):
    write_samples(tmp_path / "samples.npz", images_of(4))
    Image.fromarray(images_of(1)[0]).save(tmp_path / "grid.png")  # as `sample` leaves it
    assert open_samples(tmp_path).count == 4
    Image.fromarray(images_of(1)[0]).save(tmp_path / "000000.png")
    with pytest.raises(DataError, match="and 1 images such as 000000"):
        open_samples(tmp_path)
    assert open_samples(tmp_path / "samples.npz").count == 4, "the remedy"


def test_statistics_in_half_precision_are_refused(tmp_path):
    mean, covariance = moments(5)
    np.savez(tmp_path / "x.npz", mu=mean, sigma=covariance.astype(np.float16))
    with pytest.raises(DataError, match=r"x\.npz.*float16 keeps too few digits"):
        load_statistics(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", mu=mean, sigma=covariance.astype(np.float32))
    np.testing.assert_allclose(load_statistics(tmp_path / "x.npz").spaces["pool"][1], covariance)
