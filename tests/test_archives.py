"""Archives of samples and of statistics: every format back and forth, and what is refused."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from gae_jax.errors import DataError
from gae_jax.evaluation import archives
from gae_jax.evaluation.archives import (
    is_statistics,
    load_statistics,
    open_samples,
    samples_digest,
    write_samples,
    write_statistics,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 6, 5, 3), np.uint8)
LABELS = np.array([3, 1, 3, 0, 2, 2, 1], np.int32)


def gaussian(d, seed=0):
    x = np.random.default_rng(seed).normal(size=(3 * d, d))
    return x.mean(axis=0), np.cov(x, rowvar=False)


def all_of(samples, size=3):
    batches = list(samples.batches(size))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    return np.concatenate(batches)


def save_pngs(folder, names):
    folder.mkdir(exist_ok=True)
    for name, pixels in zip(names, IMAGES, strict=False):
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_as_a_stream(save, tmp_path, monkeypatch):
    save(tmp_path / "x.npz", IMAGES, LABELS)
    monkeypatch.setattr(np, "load", None)  # never the whole array
    samples = open_samples(tmp_path / "x.npz")
    assert (samples.count, samples.shape, samples.kind) == (7, (6, 5, 3), "npz")
    np.testing.assert_array_equal(samples.labels, LABELS)
    np.testing.assert_array_equal(all_of(samples), IMAGES)


def test_an_npz_without_labels_and_an_npy(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=IMAGES)
    np.save(tmp_path / "x.npy", IMAGES)
    for name in ("x.npz", "x.npy"):
        samples = open_samples(tmp_path / name)
        assert samples.labels is None
        np.testing.assert_array_equal(all_of(samples), IMAGES)


def test_a_folder_is_read_in_the_order_of_numbers(tmp_path):
    """Not in that of names, and with the classes that they carry."""
    folder = save_pngs(tmp_path / "x", [f"{i}_{LABELS[i]}.png" for i in range(7)])
    samples = open_samples(folder)
    np.testing.assert_array_equal(samples.labels, LABELS)
    np.testing.assert_array_equal(all_of(samples), IMAGES)
    (folder / "grid.txt").write_text("not an image of the set")
    before = samples_digest(folder)
    assert open_samples(folder).count == 7
    Image.fromarray(IMAGES[1]).save(folder / "0_3.png")
    assert samples_digest(folder) != before


def test_what_we_write_is_what_numpy_reads(tmp_path):
    path = tmp_path / "new" / "x.npz"
    write_samples(path, (IMAGES[i : i + 2] for i in range(0, 7, 2)), LABELS)
    with np.load(path) as file:
        assert file.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], IMAGES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
    assert samples_digest(path) == samples_digest(path)


def test_a_set_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match="4 images were given for 7 labels"):
        write_samples(path, [IMAGES[:4]], LABELS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: np.savez(p, arr_0=IMAGES.astype(np.float32)), r"holds float32 \[7, 6, 5, 3\]"),
        (lambda p: np.savez(p, arr_0=np.moveaxis(IMAGES, -1, 1)), r"uint8 \[7, 3, 6, 5\]"),
        (lambda p: np.savez(p, x=IMAGES), r"has no arr_0 but \['x'\]"),
        (lambda p: np.savez(p, mu=np.zeros(2), sigma=np.eye(2)), "a file of statistics, not of"),
        (lambda p: p.write_bytes(b"no zip"), "damaged or cut off"),
        (lambda p: None, "there are no samples"),
    ],
)
def test_what_is_no_set_of_samples_is_refused(make, says, tmp_path):
    make(tmp_path / "x.npz")
    with pytest.raises(DataError, match=says):
        open_samples(tmp_path / "x.npz")


def test_a_damaged_archive_is_noticed_where_it_is_read(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=IMAGES)
    many = np.concatenate([IMAGES] * 200)  # more than is read ahead with the header
    np.savez(path, arr_0=many)
    content = bytearray(path.read_bytes())
    content[-2000:-1900] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged \(Bad CRC"):
        list(open_samples(path).batches(100))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["0.png", "2.png"], "none with number 1"),
        (["1.png", "2.png"], "none with number 0"),
        (["0_1.png", "000_2.png"], "has sample 0 twice"),
        (["0.png", "1.jpg"], r"JPEG files \(1.jpg\).*save PNG or npz"),
        (["cat.png"], "PNG files are called by their numbers"),
        ([], "PNG files are called by their numbers"),
    ],
)
def test_a_folder_that_is_no_set_is_refused(names, says, tmp_path):
    with pytest.raises(DataError, match=says):
        open_samples(save_pngs(tmp_path / "x", names))


def test_images_that_differ_in_size_are_refused(tmp_path):
    folder = save_pngs(tmp_path / "x", ["0.png", "1.png"])
    Image.fromarray(IMAGES[0][:4]).save(folder / "2.png")
    with pytest.raises(DataError, match=r"2\.png is RGB 5 x 4; the others are RGB 5 x 6"):
        list(open_samples(folder).batches(3))


def test_statistics_in_every_format(tmp_path):
    (m, s), (ms, ss), (mc, sc) = gaussian(4), gaussian(3, 1), gaussian(5, 2)
    np.savez(tmp_path / "adm.npz", mu=m, sigma=s, mu_s=ms, sigma_s=ss, arr_0=IMAGES)
    np.savez(tmp_path / "fid.npz", mu=m, sigma=s)
    np.savez(tmp_path / "imf.npz", ref_mu=m, ref_sigma=s)
    both = {"fid": {"mu": m, "sigma": s}, "fd_dinov2": {"mu": mc, "sigma": sc}}
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps(both))
    write_statistics(
        tmp_path / "ours.npz",
        {"pool": (m, s), "spatial": (ms, ss), "cls": (mc, sc)},
        count=12,
        front_end="tf",
        facts={"source": "here"},
        images=IMAGES,
    )
    expected = {"pool": (m, s), "spatial": (ms, ss), "cls": (mc, sc)}
    for name, spaces, count, front_end, has_images in (
        ("adm.npz", ("pool", "spatial"), 0, "tf", True),
        ("fid.npz", ("pool",), 0, "pytorch_fid", False),
        ("imf.npz", ("pool",), 0, "", False),
        ("edm.pkl", ("pool", "cls"), 0, "", False),
        ("ours.npz", ("pool", "spatial", "cls"), 12, "tf", True),
    ):
        assert is_statistics(tmp_path / name)
        found = load_statistics(tmp_path / name)
        assert set(found.spaces) == set(spaces)
        assert (found.count, found.front_end, found.has_images) == (count, front_end, has_images)
        for space in spaces:
            for got, want in zip(found.spaces[space], expected[space], strict=True):
                np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(all_of(open_samples(tmp_path / "ours.npz")), IMAGES)
    np.savez(tmp_path / "samples.npz", IMAGES)
    assert not is_statistics(tmp_path / "samples.npz")
    assert not is_statistics(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros(3)}, "holds no statistics"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"a mean \[3\] and a covariance \[4, 4\]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])}, "is not symmetric"),
    ],
)
def test_statistics_that_cannot_be_are_refused(arrays, says, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=says):
        load_statistics(tmp_path / "x.npz")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_calls_something_is_refused_and_not_called(tmp_path):
    path, harm = tmp_path / "x.pkl", tmp_path / "harm"
    path.write_bytes(pickle.dumps({"fid": Malicious(str(harm))}))
    with pytest.raises(DataError, match=r"it would call posix.mkdir.*save its mu and sigma as npz"):
        load_statistics(path)
    assert not harm.exists()
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="holds a list, not a dict of statistics"):
        load_statistics(path)


def test_a_pickle_of_another_numpy_is_read(tmp_path):
    """numpy 1 called its module numpy.core; numpy 2 still has it under that name."""
    m, s = gaussian(3)
    content = pickle.dumps({"fid": {"mu": m, "sigma": s}}, protocol=2)
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "x.pkl").write_bytes(old)
    np.testing.assert_array_equal(archives.load_statistics(tmp_path / "x.pkl").spaces["pool"][1], s)
