"""Read mean and std of latents from released files.

GAE's ``latents_stats.pt`` holds ``mean`` and ``std`` of channels, [1, d, 1, 1]. RAE's
``stat.pt`` holds ``mean`` and ``var`` of every element, [d, h, w]; that of DINOv2-B has None for
the mean, which then is 0, and its code adds 1e-5 to the variances.
"""

from pathlib import Path

import numpy as np

from gae_jax.data.latent_shards import ELEMENT_EPS
from gae_jax.interop.convert import ConversionError
from gae_jax.interop.files import read_state_dict


def of_channels(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read mean and std per channel, [channels], of a file like GAE's.

    Raises:
      ConversionError: if the file does not hold them for this many channels.
    """
    tensors = read_state_dict(path)
    for key in ("mean", "std"):
        if key not in tensors or tensors[key].size != channels:
            raise ConversionError(
                f"{path} must hold mean and std of {channels} channels, it has {_shapes(tensors)}"
            )
    mean, std = (tensors[key].astype(np.float32).reshape(-1) for key in ("mean", "std"))
    if not (_finite(mean, std) and (std > 0).all()):
        raise ConversionError(
            f"{path}: mean or std is not finite, or a std is not above 0; create it again, or "
            "leave it out to use exact statistics of the latents"
        )
    return mean, std


def of_latents(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Read mean and std of a file like GAE's, [d], or like RAE's, [h, w, d].

    Args:
      shape: (h, w, d) of the latents.

    Raises:
      ConversionError: if the file is neither, or not of latents of this shape.
    """
    tensors = read_state_dict(path, optional=("mean",))
    if "var" not in tensors:
        return of_channels(path, shape[-1])
    expected = (shape[2], *shape[:2])
    if tensors.keys() - {"mean", "var"} or any(x.shape != expected for x in tensors.values()):
        raise ConversionError(
            f"{path} must hold var, and mean or None, of latents {list(expected)} (channels "
            f"first), it has {_shapes(tensors)}; give the config of their tokenizer"
        )
    var = np.moveaxis(tensors["var"].astype(np.float64), 0, -1)
    mean = np.moveaxis(tensors["mean"], 0, -1) if "mean" in tensors else np.zeros(shape)
    if not (_finite(mean, var) and (var >= 0).all()):
        raise ConversionError(
            f"{path}: mean or var is not finite, or a var is below 0; create the file again"
        )
    return mean.astype(np.float32), np.sqrt(var + ELEMENT_EPS).astype(np.float32)


def _finite(*arrays: np.ndarray) -> bool:
    return all(np.isfinite(array).all() for array in arrays)


def _shapes(tensors: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}
