"""The pickle inside torch's own files, which may build plain containers and tensors only.

Whatever else it names becomes an inert `Unknown`, which is neither imported nor called.
"""

import math
import pickle
from collections.abc import Callable

import ml_dtypes
import numpy as np

from gae_jax.interop.signatures import AGAIN, WeightFileError

REPEATS = 4096  # how often a tensor may repeat what is stored, by strides of 0
# torch's names of kinds of numbers, as dtypes; and the classes of storages that hold them
_INTEGERS = (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
DTYPES = {
    name: np.dtype(name)
    for name in ("float64", "float32", "float16", "complex64", "complex128", "bool", *_INTEGERS)
}
DTYPES |= {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


class Unknown:
    """What a pickle builds for an unknown name: it stores its state and does nothing.

    Attributes:
      kind: the name, "module.class".
      state: its attributes; {} if the pickle sets none or no dictionary.
      entries: its items, if it is a subclass of a dictionary.
    """

    kind = "unknown"
    state: dict
    entries: dict

    def __new__(cls, *arguments, **named):
        instance = super().__new__(cls)
        instance.state, instance.entries = {}, {}
        return instance

    def __init__(self, *arguments, **named):
        pass

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) == 2:  # (dictionary, slots)
            state = state[0]
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key, value):
        self.entries[key] = value

    def append(self, value):
        pass

    extend = add = append

    def __call__(self, *arguments, **named):
        return Unknown()

    def __repr__(self) -> str:
        return self.kind


class Dictionary(dict):
    """A dictionary to which a pickle may give attributes, which are ignored."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class Storage:
    """The numbers behind tensors, read on demand."""

    def __init__(self, dtype: np.dtype, count: int, load: Callable[[], np.ndarray]):
        self.dtype, self.count, self._load = dtype, count, load
        self._numbers: np.ndarray | None = None

    def numbers(self) -> np.ndarray:
        """Return the numbers [count]; raise WeightFileError if they cannot be read."""
        if self._numbers is None:
            try:
                self._numbers = self._load()
            except WeightFileError:
                raise
            except Exception as error:  # a broken file may raise anything
                raise WeightFileError(f"a storage cannot be read ({error!r}); {AGAIN}") from None
        return self._numbers


class Tensor:
    """A tensor of a file; `numpy` reads it."""

    def __init__(self, storage, offset, shape, stride, dtype: np.dtype | None = None):
        integers = (offset, *shape, *stride)
        if not isinstance(storage, Storage) or not all(type(x) is int and x >= 0 for x in integers):
            raise pickle.UnpicklingError("it describes an impossible tensor")
        if len(shape) != len(stride):
            raise pickle.UnpicklingError("it has a tensor with other strides than dimensions")
        self.storage, self.offset = storage, offset
        self.shape, self.stride = tuple(shape), tuple(stride)
        self.dtype = dtype or storage.dtype

    def numpy(self) -> np.ndarray:
        """Return the array, read-only; bfloat16 and float8 in the dtypes of ml_dtypes."""
        numbers = self.storage.numbers()
        if numbers.dtype != self.dtype:  # of an untyped storage
            numbers = numbers.view(np.uint8)
            numbers = numbers[: len(numbers) // self.dtype.itemsize * self.dtype.itemsize]
            numbers = numbers.view(self.dtype)
        if (size := math.prod(self.shape)) == 0:
            return np.zeros(self.shape, self.dtype)
        if size > REPEATS * max(len(numbers), REPEATS):
            raise WeightFileError(
                f"a tensor {list(self.shape)} is stored as {len(numbers)} numbers: the file is "
                f"damaged; {AGAIN}"
            )
        last = self.offset + sum(
            (size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)
        )
        if last >= len(numbers):
            raise WeightFileError(
                f"a tensor {list(self.shape)} reaches over the end of its storage of "
                f"{len(numbers)} numbers: the file is damaged; {AGAIN}"
            )
        steps = tuple(step * self.dtype.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(
            numbers[self.offset :], self.shape, steps, writeable=False
        )


class Unpickler(pickle.Unpickler):
    """Builds plain containers, tensors, and `Unknown` for every other name.

    Attributes:
      widths: key of a storage -> bytes of one of its numbers.
    """

    def __init__(self, file, storage: Callable[[str, np.dtype, int], Storage]):
        super().__init__(file, encoding="latin1")  # bytes of Python 2 are text then
        self._storage = storage
        self._storages: dict[str, Storage] = {}
        self._classes: dict[str, type[Unknown]] = {}
        self.widths: dict[str, int] = {}

    def find_class(self, module: str, name: str):
        if module in ("torch", "torch.storage"):
            if name in STORAGES:
                return _Kind(DTYPES[STORAGES[name]])
            if module == "torch" and name in DTYPES:
                return _Kind(DTYPES[name])
        if (known := KNOWN.get(f"{module}.{name}")) is not None:
            return known
        key = f"{module}.{name}"
        if key not in self._classes:
            self._classes[key] = type("Unknown", (Unknown,), {"kind": key})
        return self._classes[key]

    def persistent_load(self, pid):
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # of a pickled module, with the text of its class
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise pickle.UnpicklingError("it refers to something other than a storage")
        _, kind, key, _, count = pid[:5]
        if (
            not (isinstance(kind, _Kind) and isinstance(key, str) and type(count) is int)
            or count < 0
        ):
            if isinstance(kind, type) and issubclass(kind, Unknown):
                raise WeightFileError(
                    f"it has numbers of {kind.kind}, which are not read: save the weights in "
                    "float32 (a quantised tensor by its dequantize())"
                )
            raise pickle.UnpicklingError(f"it has a storage of {kind!r}")
        if key not in self._storages:
            self._storages[key] = self._storage(key, kind.dtype, count)
            self.widths[key] = kind.dtype.itemsize
        storage = self._storages[key]
        if len(pid) < 6 or pid[5] is None:
            return storage
        _, offset, size = pid[5]
        if min(offset, size) < 0:
            raise pickle.UnpicklingError("it has an impossible part of a storage")
        part = slice(offset, offset + size)
        return Storage(storage.dtype, size, lambda: storage.numbers()[part])


class _Kind:
    """A class of storages, or a dtype of torch."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


def _tensor(storage, offset, shape, stride, *_) -> Tensor:
    return Tensor(storage, offset, shape, stride)


def _typed_tensor(storage, offset, shape, stride, grad, hooks, kind, *_) -> Tensor:
    if not isinstance(kind, _Kind):
        raise pickle.UnpicklingError("it has a tensor of a dtype that is not known")
    return Tensor(storage, offset, shape, stride, kind.dtype)


def _subclass(make, kind, arguments, state):
    """Return the plain tensor under a tensor of a subclass, if it has one."""
    return make(*arguments) if make in (_tensor, _typed_tensor, _parameter) else Unknown()


def _parameter(data, *_):
    return data


def _attribute(owner, name: str):
    """Stand in for `getattr`, by which older pickles name a class inside a class."""
    return type("Unknown", (Unknown,), {"kind": f"{getattr(owner, 'kind', owner)}.{name}"})


def _default(factory=None, items=()):
    """Stand in for `collections.defaultdict`, without its default."""
    return Dictionary(items)


def _new(kind, *_):
    """Stand in for `copyreg._reconstructor`, which would call ``kind``."""
    return kind() if isinstance(kind, type) and issubclass(kind, Unknown) else Unknown()


KNOWN = {
    "collections.OrderedDict": Dictionary,
    "collections.defaultdict": _default,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "copyreg._reconstructor": _new,
    "copy_reg._reconstructor": _new,
}
for _module in ("builtins", "__builtin__"):
    KNOWN |= {f"{_module}.set": set, f"{_module}.frozenset": set, f"{_module}.getattr": _attribute}
