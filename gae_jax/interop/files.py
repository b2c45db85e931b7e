"""State dicts on disk: safetensors always, torch's own files where torch is installed.

A path of weights names a file, the index of several safetensors (`parts`) or a folder.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from gae_jax.files import write_bytes
from gae_jax.interop.parts import (
    INDEX_SUFFIX,
    WeightFileError,
    read_index,
    read_parts,
    read_safetensors,
)

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", f".safetensors{INDEX_SUFFIX}", *TORCH_SUFFIXES)
IN_FOLDER = ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}")  # it must hold one of them
# What wrapping in DDP puts before every name, and torch.compile before those of any module.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")


def read_state_dict(path: Path, *, optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The tensors of a file by name, without the prefixes of DDP and torch.compile.

    Args:
      path: as `weight_files` takes it; a torch file must be a plain state dict.
      optional: names that a torch file may have with None; they are left out then.

    Raises:
      WeightFileError: if the file cannot be read, or is something else.
    """
    content = _read(path)
    absent = [name for name in optional if name in content and content[name] is None]
    return _tensors(path, {name: x for name, x in content.items() if name not in absent})


def read_checkpoint(path: Path, entry: str) -> tuple[dict[str, np.ndarray], str]:
    """As `read_state_dict`, of a file that holds the entry or is itself a plain state dict.

    Args:
      path: as `weight_files` takes it.
      entry: the key of the state dict inside a torch checkpoint that holds several things, such
        as "ema", "model", "state_dict" or "model_state_dict".

    Raises:
      WeightFileError: as `read_state_dict`, or if there is no such entry; names those there are.

    Returns:
      (tensors by name, the entry or "" for a plain state dict).
    """
    if _is_state_dict(content := _read(path)):
        return _tensors(path, content), ""
    if entry not in content:
        raise WeightFileError(
            f"{path} has no entry {entry!r} and is no plain state dict; it has {sorted(content)}"
        )
    return _tensors(path, content[entry]), entry


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files that a path of weights stands for: one, or an index and then all of its parts.

    Args:
      path: a ``.safetensors`` or a torch file, the index of several ``.safetensors``, or a folder
        that holds exactly one of `IN_FOLDER`.

    Raises:
      WeightFileError: if it is none of these, or as `read_index`.
    """
    path = _file_of(path)
    return (path, *read_index(path).parts) if path.name.endswith(INDEX_SUFFIX) else (path,)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict:
    """What the files of a path hold, before any entry is taken."""
    path = _file_of(path)
    if path.name.endswith(INDEX_SUFFIX):
        return read_parts(read_index(path))
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix not in TORCH_SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise WeightFileError(f"{path}: unknown kind of file; known are {known}")
    torch = import_torch_library(f"{path} is a torch file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met
        reason = str(error).splitlines()[0]
        raise WeightFileError(f"{path} cannot be read with weights_only=True: {reason}") from error
    if not isinstance(content, Mapping):
        raise WeightFileError(f"{path} holds a {type(content).__name__}, no state dict")
    return content


def _file_of(path: Path) -> Path:
    """The path itself, or of a folder the one of `IN_FOLDER` that it holds."""
    if not path.exists():
        raise WeightFileError(f"{path} does not exist")
    if not path.is_dir():
        return path
    first, second = IN_FOLDER
    found = [path / name for name in IN_FOLDER if (path / name).exists()]
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightFileError(
            f"{path} holds both {first} and {second}, which need not be the same weights; pass the "
            "path of the one that is meant"
        )
    files = [file.name for file in sorted(path.iterdir()) if file.is_file()]
    others = [name for name in files if name.endswith((*SUFFIXES, INDEX_SUFFIX))]
    raise WeightFileError(
        f"{path} is a folder without {first} or {second}; "
        + (
            f"it has {', '.join(others[:8])}: pass the path of the one that is meant (parts of one "
            "network need their index beside them)"
            if others
            else "nor has it other weights: download them into it, or pass the path of a file"
        )
    )


def import_torch_library(why: str):
    """The torch module, which is optional.

    Raises:
      WeightFileError: if it is not installed, saying how to get it.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise WeightFileError(
            f"{why} and torch is not installed; pip install torch, or convert the file to "
            ".safetensors where torch is"
        ) from None
    return torch


def _is_tensor(value) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _is_state_dict(content: Mapping) -> bool:
    return all(_is_tensor(value) for value in content.values())


def _tensors(path: Path, content: Mapping) -> dict[str, np.ndarray]:
    """The numpy arrays of a state dict, by names without wrappers."""
    others = [name for name, value in content.items() if not _is_tensor(value)]
    if others:
        raise WeightFileError(
            f"{path} is no plain state dict: {others[:8]} are no tensors; save the state dict alone"
        )
    named = {WRAPPERS.sub("", name): _to_numpy(tensor) for name, tensor in content.items()}
    if len(named) != len(content):
        raise WeightFileError(f"{path}: names clash once module. and _orig_mod. are taken off")
    return named


def _to_numpy(tensor) -> np.ndarray:
    """numpy has no bfloat16: such tensors become fp32, which holds every value of theirs."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    return tensor.detach().numpy()


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A ``.safetensors`` file, whole or absent."""
    # not `ascontiguousarray`, which makes [1] of a scalar such as num_batches_tracked
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    write_bytes(path, safetensors.numpy.save(arrays))
