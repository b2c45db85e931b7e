"""State dicts on disk: safetensors always, torch's own files where torch is installed."""

import re
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from gae_jax.errors import UserError
from gae_jax.run import write_bytes

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# What wrapping a module in DDP or torch.compile puts before every name.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


class WeightFileError(UserError):
    """A file of weights that cannot be read, or does not hold what was asked for."""


def read_state_dict(path: Path, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a file by name, without the prefixes of DDP and torch.compile.

    Args:
      path: ``.safetensors``, or a torch file.
      entry: the key of the state dict inside a torch checkpoint that holds several things, such
        as "ema", "model", "state_dict" or "model_state_dict"; None: the file is the state dict.

    Raises:
      WeightFileError: if the file cannot be read, or has no such entry (those it has are named).
    """
    if not path.exists():
        raise WeightFileError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        try:
            tensors = safetensors.numpy.load_file(path)
        except SafetensorError as error:
            raise WeightFileError(f"{path} is no whole safetensors file ({error})") from error
        if entry is not None:
            raise WeightFileError(f"{path} is a plain state dict; it has no entry {entry!r}")
    elif path.suffix in TORCH_SUFFIXES:
        tensors = _read_torch(path, entry)
    else:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise WeightFileError(f"{path}: unknown kind of file; known are {known}")
    named = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(named) != len(tensors):
        raise WeightFileError(f"{path}: names clash once module. and _orig_mod. are taken off")
    return named


def _read_torch(path: Path, entry: str | None) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError:
        raise WeightFileError(
            f"{path} is a torch file and torch is not installed; pip install torch, or convert the "
            "file to .safetensors where torch is"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met
        reason = str(error).splitlines()[0]
        raise WeightFileError(f"{path} cannot be read with weights_only=True: {reason}") from error
    if entry is not None:
        if entry not in content:
            raise WeightFileError(f"{path} has no entry {entry!r}; it has {sorted(content)}")
        content = content[entry]
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise WeightFileError(
            f"{path} is no plain state dict: {others[:8]} are no tensors; name the entry to read"
        )
    return {name: _to_numpy(tensor) for name, tensor in content.items()}


def _to_numpy(tensor) -> np.ndarray:
    """numpy has no bfloat16: such tensors become fp32, which holds every value of theirs."""
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    return tensor.detach().numpy()


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A ``.safetensors`` file, whole or absent."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write_bytes(path, safetensors.numpy.save(arrays))
