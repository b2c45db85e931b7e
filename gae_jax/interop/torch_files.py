"""Torch's own files, read without torch and without running anything that they name.

`torch.save` writes a pickle (`torch_pickle`) and the numbers of its tensors: in a zip (since torch
1.6) or one after the other.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gae_jax.interop.signatures import AGAIN, TORCH_ZIP, WeightFileError, kind_of_file
from gae_jax.interop.torch_pickle import Storage, Tensor, Unknown, Unpickler

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_torch(path: Path):
    """Read a file of `torch.save`: containers with `Tensor` and `Unknown` in them.

    A pickled module becomes the dictionary of its tensors, as its ``state_dict``.

    Raises:
      WeightFileError: if the file is cut, damaged or something else.
    """
    try:
        zipped = kind_of_file(path) == TORCH_ZIP
        content = _read_zip(path) if zipped else _read_legacy(path)
        return _plain(content)
    except WeightFileError as error:
        if str(path) in str(error):
            raise
        raise WeightFileError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a broken pickle or zip may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightFileError(
            f"{path} is cut or damaged, or torch.save did not write it ({reason}); {AGAIN}"
        ) from None


def _read_zip(path: Path):
    archive = zipfile.ZipFile(path)  # closed with the last of its storages
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if _is_pickle(name)]
    root = roots[0] if roots else ""
    if not roots:
        arrays = bool(names) and all(name.endswith(".npy") for name in names)
        what = "an npz of numpy arrays" if arrays else "a zip without data.pkl inside"
        raise WeightFileError(
            f"{path} is {what}, no file of weights; save a dictionary of named tensors with "
            "torch.save or as .safetensors"
        )
    if f"{root}constants.pkl" in names or any(n.startswith(f"{root}code/") for n in names):
        raise WeightFileError(
            f"{path} is a TorchScript archive (torch.jit.save), a program and not a state dict; "
            "where torch is, save its weights: torch.save(torch.jit.load(FILE).state_dict(), OUT)"
        )
    order = f"{root}byteorder"
    _check_order(path, little=order not in names or archive.read(order).strip() != b"big")

    def storage(key: str, dtype: np.dtype, count: int) -> Storage:
        size = archive.getinfo(f"{root}data/{key}").file_size
        if size < count * dtype.itemsize:
            raise WeightFileError(
                f"{path}: storage {key} has {size} bytes, {count} numbers of {dtype.name} were "
                f"saved: the file is damaged; {AGAIN}"
            )

        def load() -> np.ndarray:
            return np.frombuffer(archive.read(f"{root}data/{key}"), dtype, count)

        return Storage(dtype, count, load)

    with archive.open(f"{root}data.pkl") as file:
        return Unpickler(file, storage).load()


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def _read_legacy(path: Path):
    """Read five pickles (magic number, version, machine, content, keys), then all storages."""
    places: dict[str, int] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> Storage:
        def load() -> np.ndarray:
            with path.open("rb") as file:
                file.seek(places[key])
                stored = int.from_bytes(file.read(8), "little")
                numbers = np.fromfile(file, dtype, min(count, stored))
            if len(numbers) < count:
                raise WeightFileError(
                    f"{path} is cut or damaged: storage {key} has {len(numbers)} of {count} "
                    f"numbers; {AGAIN}"
                )
            return numbers

        return Storage(dtype, count, load)

    with path.open("rb") as file:
        if Unpickler(file, storage).load() != LEGACY_MAGIC:
            raise WeightFileError(
                f"{path} is a pickle that torch.save did not write; save a dictionary of named "
                "tensors with torch.save or as .safetensors"
            )
        version, machine = (Unpickler(file, storage).load() for _ in range(2))
        if version != 1001:
            raise WeightFileError(f"{path} is of version {version} of torch's files; save it again")
        _check_order(path, little=machine["little_endian"])
        unpickler = Unpickler(file, storage)
        content = unpickler.load()
        keys, place, end = Unpickler(file, storage).load(), file.tell(), path.stat().st_size
        for key in keys:
            places[key] = place
            file.seek(place)
            count = int.from_bytes(file.read(8), "little")
            place += 8 + count * unpickler.widths.get(key, 1)
        if place > end:
            raise WeightFileError(
                f"{path} is cut: it has {end} bytes of {place}; download or write it again"
            )
    return content


def _check_order(path: Path, *, little: bool) -> None:
    if not little:
        raise WeightFileError(
            f"{path} was written on a big-endian machine; write it as .safetensors there"
        )


def _plain(content):
    """Replace modules and dictionaries of other classes by plain dictionaries."""
    content = _as_dictionary(content)
    if isinstance(content, dict):
        return {key: _as_dictionary(value) for key, value in content.items()}
    return content


def _as_dictionary(value):
    """Return the tensors of a module, the items of a dictionary subclass, or the value itself."""
    if _is_module(value):
        return dict(_of_module(value, ""))
    return value.entries if isinstance(value, Unknown) and value.entries else value


def _is_module(value) -> bool:
    return isinstance(value, Unknown) and {"_parameters", "_modules"} <= value.state.keys()


def _of_module(module: Unknown, prefix: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a module and its children, as its ``state_dict`` has them."""
    if depth > 100:
        raise WeightFileError("a module lies inside of itself; save its state_dict")
    left_out = module.state.get("_non_persistent_buffers_set") or ()
    for part in ("_parameters", "_buffers"):
        for name, tensor in (module.state.get(part) or {}).items():
            if isinstance(tensor, Tensor) and not (part == "_buffers" and name in left_out):
                yield prefix + name, tensor
    for name, inner in module.state["_modules"].items():
        if _is_module(inner):
            yield from _of_module(inner, f"{prefix}{name}.", depth + 1)
