"""State dicts on disk: safetensors and torch's own files, neither of which needs torch.

A path of weights names a file, the index of several safetensors (`parts`) or a folder. The
content decides what a file is, not its suffix.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from gae_jax.interop.parts import INDEX_SUFFIX, named, read_index, read_parts, read_safetensors
from gae_jax.interop.signatures import (
    SAFETENSORS,
    TORCH_PICKLE,
    TORCH_ZIP,
    WeightFileError,
    kind_of_file,
)
from gae_jax.interop.torch_files import read_torch
from gae_jax.interop.torch_pickle import Tensor, Unknown
from gae_jax.runtime.files import write_bytes

SUFFIXES = (
    ".safetensors",
    f".safetensors{INDEX_SUFFIX}",
    *(".pt", ".pth", ".ckpt", ".bin"),
)
IN_FOLDER = ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}")  # it must hold one of them
# What wrapping in DDP puts before every name; torch.compile, FSDP and the checkpointing of
# activations before those of any module.
WRAPPERS = re.compile(
    r"^(module\.|_orig_mod\.)+"
    r"|(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Functions that build weights that cannot be read, by the beginning of their names.
UNREADABLE = {
    "torch._utils._rebuild_meta": "on the device 'meta', without numbers",
    "torch._utils._rebuild_sparse": "sparse",
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_wrapper": "of a subclass of tensors",
}
NUMPY = ("numpy.core.", "numpy._core.")
OUTER = "model."  # before all names where a training module holds the network
BESIDE_OUTER = ("loss.",)  # and what names may be beside it there


class Checkpoint(NamedTuple):
    """One network's tensors of a file.

    Attributes:
      tensors: by name.
      entry: of the file, which held them; "" for a plain state dict.
      remarks: what was chosen or ignored, a line each.
    """

    tensors: dict[str, np.ndarray]
    entry: str
    remarks: tuple[str, ...] = ()


def read_state_dict(path: Path, *, optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read tensors by name, without the prefixes of DDP, FSDP and torch.compile.

    Args:
      path: as `weight_files` takes it; a torch file must be a plain state dict.
      optional: names that a torch file may have with None; they are left out then.

    Raises:
      WeightFileError: if the file cannot be read, or is something else.
    """
    content = _read(path)
    absent = [name for name in optional if name in content and content[name] is None]
    return _tensors(path, {name: x for name, x in content.items() if name not in absent})


def _flag(entry: str) -> str:
    return f"--config.import_torch.entry={entry}"


def read_checkpoint(path: Path, entry: str, *, rivals: tuple[str, ...] = ()) -> Checkpoint:
    """Read a file that holds the entry or is itself a plain state dict, as `read_state_dict`.

    Where the entry is absent and the file holds one state dict only, that is taken.

    Args:
      path: as `weight_files` takes it.
      entry: the key of the state dict inside a torch checkpoint that holds several things, such
        as "ema", "model", "state_dict" or "model_state_dict"; "": none is expected.
      rivals: entries that are never taken instead of the one asked for.

    Raises:
      WeightFileError: as `read_state_dict`, or if there is no such entry; names those there are.
    """
    content = _read(path)
    if all(map(_is_tensor, content.values())):
        return Checkpoint(_tensors(path, content), "")
    states = [key for key, value in content.items() if _is_state_dict(value)]
    remarks = []
    if entry not in states:
        has = f"it has {named(sorted(map(str, content)))}"
        absent = f"{path} has no entry {entry!r} and is no plain state dict"
        if not entry:
            absent = f"{path} is no plain state dict"
        if entry in content:
            absent = f"{path}: its entry {entry!r} holds no tensors"
        direct = {key: value for key, value in content.items() if _is_tensor(value)}
        if not states and entry not in content:
            _refuse_unreadable(path, content)
        if not states and direct and entry not in content:
            skipped = [str(key) for key in content if key not in direct]
            remarks.append(f"ignored, since not tensors: {named(skipped)}")
            return Checkpoint(_tensors(path, direct), "", tuple(remarks))
        if not states:
            raise WeightFileError(f"{absent}; {has}, in none of which a state dict is")
        if len(states) > 1 or states[0] in rivals or entry in content:
            flags = " or ".join(map(_flag, states))
            raise WeightFileError(f"{absent}; {has}; pass {flags}")
        if entry:
            remarks.append(f"there is no entry {entry!r}; {states[0]!r}, its only one, was taken")
        entry = states[0]
    elif untaken := [key for key in states if key != entry]:
        flags = " or ".join(map(_flag, untaken))
        remarks.append(f"its entry {entry!r} was taken; for the others pass {flags}")
    _refuse_unreadable(path, content[entry])
    inside = {key: value for key, value in content[entry].items() if _is_tensor(value)}
    if skipped := [str(key) for key in content[entry] if key not in inside]:
        remarks.append(f"ignored, since not tensors: {named(skipped)}")
    return Checkpoint(_tensors(path, inside), entry, tuple(remarks))


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the files that a path of weights stands for: one, or an index and all its parts.

    Args:
      path: a ``.safetensors`` or a torch file, the index of several ``.safetensors``, or a folder
        that holds exactly one of `IN_FOLDER`.

    Raises:
      WeightFileError: if it is none of these, or as `read_index`.
    """
    path = _file_of(path)
    return (path, *read_index(path).parts) if path.name.endswith(INDEX_SUFFIX) else (path,)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Mapping:
    """Read what the files of a path hold, before an entry is chosen."""
    path = _file_of(path)
    if path.name.endswith(INDEX_SUFFIX):
        return read_parts(read_index(path))
    kind = kind_of_file(path)
    if kind == SAFETENSORS or (path.suffix == ".safetensors" and kind not in _TORCH):
        return read_safetensors(path)
    if kind not in _TORCH:
        known = ", ".join(SUFFIXES)
        raise WeightFileError(
            f"{path}: unknown kind of file; known are {known}, and its content is none of them"
        )
    content = read_torch(path)
    if not isinstance(content, Mapping):
        raise WeightFileError(
            f"{path} holds {_what(content)}, no state dict; save a dictionary of named tensors"
        )
    return content


_TORCH = (TORCH_ZIP, TORCH_PICKLE)


def _file_of(path: Path) -> Path:
    """Return the path itself, or of a folder the one of `IN_FOLDER` that it holds."""
    if not path.exists():
        raise WeightFileError(f"{path} does not exist")
    if not path.is_dir():
        return path
    first, second = IN_FOLDER
    present = [path / name for name in IN_FOLDER if (path / name).exists()]
    if len(present) == 1:
        return present[0]
    if present:
        raise WeightFileError(
            f"{path} holds both {first} and {second}, which need not be the same weights; pass the "
            "path of the one that is meant"
        )
    files = [file.name for file in sorted(path.iterdir()) if file.is_file()]
    usable = [name for name in files if name.endswith((*SUFFIXES, INDEX_SUFFIX))]
    raise WeightFileError(
        f"{path} is a folder without {first} or {second}; "
        + (
            f"it has {', '.join(usable[:8])}: pass the path of the one that is meant (parts of one "
            "network need their index next to them)"
            if usable
            else "nor has it other weights: download them into it, or pass the path of a file"
        )
    )


def _is_tensor(value) -> bool:
    return isinstance(value, (np.ndarray, Tensor))


def _is_state_dict(value) -> bool:
    return isinstance(value, Mapping) and any(map(_is_tensor, value.values()))


def _refuse_unreadable(path: Path, state: Mapping) -> None:
    """Raise WeightFileError for weights that are not plain tensors; they would seem missing."""
    odd = []
    for name, value in state.items():
        kind = value.kind if isinstance(value, Unknown) else ""
        odd += [f"{name} ({why})" for start, why in UNREADABLE.items() if kind.startswith(start)]
    if odd:
        raise WeightFileError(
            f"{path} has weights that are no plain tensors: {named(odd)}; save them as such, in "
            "torch by to_dense(), dequantize() or load_state_dict into a network on the CPU"
        )
    arrays = [name for name, value in state.items() if _is_numpy(value)]
    if arrays and not any(map(_is_tensor, state.values())):
        raise WeightFileError(
            f"{path} has numpy arrays instead of tensors: {named(arrays)}; save them as "
            ".safetensors (safetensors.numpy.save_file), or as tensors by torch.from_numpy"
        )


def _is_numpy(value) -> bool:
    return isinstance(value, Unknown) and value.kind.startswith(NUMPY)


def _what(value) -> str:
    if isinstance(value, Tensor):
        return f"one tensor {list(value.shape)}"
    return f"a {value.kind if isinstance(value, Unknown) else type(value).__name__}"


def _tensors(path: Path, content: Mapping) -> dict[str, np.ndarray]:
    """Return the numpy arrays of a state dict, by names without wrappers."""
    if no_tensors := [name for name, value in content.items() if not _is_tensor(value)]:
        what = [f"{name!r} ({_what(content[name])})" for name in no_tensors]
        raise WeightFileError(
            f"{path} is no plain state dict: {named(what)} are no tensors; save the state dict "
            "alone"
        )
    plain = {name: WRAPPERS.sub("", str(name)) for name in content}
    while _all_outer(plain.values()):
        plain = {name: WRAPPERS.sub("", inner.removeprefix(OUTER)) for name, inner in plain.items()}
    if len(set(plain.values())) != len(content):
        raise WeightFileError(f"{path}: names clash once module. and _orig_mod. are taken off")
    try:
        return {plain[name]: _to_numpy(tensor) for name, tensor in content.items()}
    except WeightFileError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise WeightFileError(f"{where}{error}") from None


def _all_outer(names) -> bool:
    """Return whether all names begin with `OUTER`, except those of losses."""
    inside = [name for name in names if not name.startswith(BESIDE_OUTER)]
    return bool(inside) and all(name.startswith(OUTER) for name in inside)


def _to_numpy(tensor: np.ndarray | Tensor) -> np.ndarray:
    return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a ``.safetensors`` file atomically."""
    # not `ascontiguousarray`, which makes [1] of a scalar such as num_batches_tracked
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    write_bytes(path, safetensors.numpy.save(arrays))
