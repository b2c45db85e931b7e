"""Safetensors: one file, or several with an index.

A large state dict is stored in parts, as transformers' ``save_pretrained`` writes them, with an
index ``{"metadata": {"total_size": bytes}, "weight_map": {tensor: part}}``.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path, PurePath

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from gae_jax.interop.signatures import WeightFileError, kind_of_file

INDEX_SUFFIX = ".index.json"
FORM = 'an index is {"metadata": {"total_size": bytes}, "weight_map": {tensor: file, ...}}'
AGAIN = "download the index and all of its parts again, of one revision"
NAMED = 8  # so many tensors or files an error names


@dataclasses.dataclass(frozen=True)
class Index:
    """An index whose parts exist.

    Attributes:
      weight_map: tensor -> name of the part that holds it.
      total_size: bytes of all tensors as it says; None: it does not say.
      parts: all of them, by name.
    """

    path: Path
    weight_map: dict[str, str]
    total_size: float | None
    parts: tuple[Path, ...]


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of one file.

    Raises:
      WeightFileError: if it is cut or something else.
    """
    with _explained(path):
        return safetensors.numpy.load_file(path)


def read_index(path: Path) -> Index:
    """Read an index and check its form and the names of its parts.

    Raises:
      WeightFileError: if it is something else, or names a part that is missing, that is no
        ``.safetensors`` or that may lie in another folder.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise WeightFileError(f"{path} is no JSON ({error}); {FORM}; {AGAIN}") from None
    except OSError as error:  # a folder of this name, say
        raise WeightFileError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from None
    if not isinstance(content, dict):
        raise WeightFileError(f"{path} holds a {type(content).__name__}; {FORM}; {AGAIN}")
    weight_map, metadata = content.get("weight_map"), content.get("metadata", {})
    if not (isinstance(weight_map, dict) and weight_map):
        raise WeightFileError(f"{path} has no weight_map; {FORM}; {AGAIN}")
    if unplaced := [x for x, part in weight_map.items() if not isinstance(part, str)]:
        raise WeightFileError(
            f"{path}: its weight_map gives no name of a file for {named(unplaced)}; {FORM}; {AGAIN}"
        )
    if not isinstance(metadata, dict):
        raise WeightFileError(f"{path}: its metadata is {metadata!r}; {FORM}; {AGAIN}")
    parts = _parts(path, sorted(set(weight_map.values())))
    return Index(path, weight_map, metadata.get("total_size"), parts)


def read_parts(index: Index) -> dict[str, np.ndarray]:
    """Read the tensors of all parts, once every header fits the index.

    Raises:
      WeightFileError: if a part is cut, a tensor is missing, in several parts or not in the index,
        or their sizes are not what the index says.
    """
    parts_of: dict[str, list[str]] = {}  # tensor -> files that hold it
    size = 0
    for part in index.parts:
        names, count = _header(part)
        size += count
        for name in names:
            parts_of.setdefault(name, []).append(part.name)
    listed = index.weight_map.items()
    twice = [f"{x} ({' and '.join(parts)})" for x, parts in parts_of.items() if len(parts) > 1]
    absent = [f"{x} ({part})" for x, part in listed if part not in parts_of.get(x, ())]
    unnamed = [f"{x} ({parts[0]})" for x, parts in parts_of.items() if x not in index.weight_map]
    for what, places in (
        ("lie in several parts", twice),
        ("are not in the part that the index names", absent),
        ("are in a part, but not in the index", unnamed),
    ):
        if places:
            raise WeightFileError(f"{index.path}: tensors {what}: {named(sorted(places))}; {AGAIN}")
    if index.total_size not in (None, size):
        raise WeightFileError(
            f"{index.path} says total_size {index.total_size!r}, but the tensors of its "
            f"{len(index.parts)} parts are {size} bytes; {AGAIN}, or take total_size out of the "
            "index if they are the right ones (some programs write the sizes of the files there)"
        )
    tensors: dict[str, np.ndarray] = {}
    for part in index.parts:  # references: no tensor is held twice
        tensors |= read_safetensors(part)
    return tensors


def _parts(index: Path, names: list[str]) -> tuple[Path, ...]:
    """Return the parts of these names, next to the index."""
    # The names alone are judged: the cache of Hugging Face has links to another folder in there.
    if outside := [name for name in names if PurePath(name).name != name]:
        raise WeightFileError(
            f"{index} names parts that are no plain names of files in its own folder: "
            f"{named(map(repr, outside))}; put the parts next to the index and name them so, or "
            "download it again"
        )
    if foreign := [name for name in names if PurePath(name).suffix != ".safetensors"]:
        raise WeightFileError(
            f"{index} names parts that are no .safetensors: {named(map(repr, foreign))}; take the "
            ".safetensors of the same model, or join these into one file where torch is"
        )
    parts = tuple(index.parent / name for name in names)
    if missing := [part.name for part in parts if not part.is_file()]:
        raise WeightFileError(
            f"{index} names {len(parts)} parts, of which {len(missing)} are not next to it: "
            f"{named(missing)}; download them into {index.parent}"
        )
    return parts


def _header(path: Path) -> tuple[list[str], int]:
    """Return (names of the tensors of a file, bytes of all of them)."""
    kind_of_file(path)  # says what else it is
    with _explained(path), safe_open(path, "numpy") as content:
        names = list(content.keys())
    with path.open("rb") as file:  # 8 bytes say how long the header is; after it are tensors only
        length = int.from_bytes(file.read(8), "little")
    return names, path.stat().st_size - 8 - length


@contextlib.contextmanager
def _explained(path: Path):
    try:
        yield
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # KeyError: of a dtype
        raise WeightFileError(
            f"{path} is not a complete safetensors file ({error}); download or write it again"
        ) from error
    except OSError as error:
        raise WeightFileError(f"{path} cannot be read: {error.strerror or error}") from None


def named(names: Iterable[str]) -> str:
    """List the first of some names, and how many others there are."""
    names = list(names)
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
