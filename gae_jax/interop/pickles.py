"""Pickles of arrays, read without running code."""

import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import numpy as np

from gae_jax.runtime.errors import DataError


class Numbers:
    """A dtype of numbers or text. numpy's own would take flags from the pickle unchecked."""

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if not re.fullmatch(r"[fiubcSU]\d+", code):
            raise pickle.UnpicklingError(f"it has an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """An array as numpy pickles it; `numpy.asarray` of it is the array."""

    def __init__(self, *reconstruct):
        self._array = np.zeros(0)

    def __setstate__(self, state: tuple):
        _, shape, numbers, fortran, content = state
        self._array = _array_of(content, numbers, shape, "F" if fortran else "C")

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._array.astype(dtype or self._array.dtype)


def _array_of(content, numbers: Numbers, shape: tuple, order: Literal["C", "F"]) -> np.ndarray:
    return np.frombuffer(content, numbers.dtype).reshape(shape, order=order)


def _scalar(numbers: Numbers, content: bytes) -> np.generic:
    return np.frombuffer(content, numbers.dtype)[0]


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes as protocols before 3 store them; any other codec is refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


# Names in numpy's pickles, before and since version 2, and what replaces them here.
ADMITTED = {
    "numpy.ndarray": Array,
    "numpy.dtype": Numbers,
    "_codecs.encode": _latin1,
    "collections.OrderedDict": OrderedDict,
}
for package in ("numpy.core", "numpy._core"):
    ADMITTED[f"{package}.multiarray._reconstruct"] = Array
    ADMITTED[f"{package}.multiarray.scalar"] = _scalar
    ADMITTED[f"{package}.numeric._frombuffer"] = _array_of


class ArraysOnly(pickle.Unpickler):
    """Builds plain arrays and containers; any other name is refused, not imported."""

    def find_class(self, module: str, name: str):
        if (stand_in := ADMITTED.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stand_in


def read_arrays(path: Path):
    """Read a pickle of plain arrays and containers; arrays become `Array`.

    Raises:
      DataError: if it is damaged or names anything else, which is then not run.
    """
    try:
        return ArraysOnly(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a broken pickle may raise anything
        raise DataError(
            f"{path} is no pickle of arrays ({error}), and nothing else is loaded from it, since a "
            "pickle can run code; save the statistics as npz with mu and sigma"
        ) from None
