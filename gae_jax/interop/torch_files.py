"""Torch's own files, read without torch and without running anything that they name.

`torch.save` writes a pickle and the numbers of its tensors: in a zip (since torch 1.6) or one after
the other. Here the pickle may build plain containers and tensors. Whatever else it names becomes an
inert `Unknown`, which is neither imported nor called, so that tensors can be read beside it.
"""

import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from gae_jax.interop.signatures import AGAIN, TORCH_ZIP, WeightFileError, kind_of_file

REPEATS = 4096  # how often a tensor may repeat what is stored, by strides of 0
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
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
    """What a pickle builds of a name that is not known here: it keeps its state and does nothing.

    Attributes:
      kind: the name, "module.class".
      state: what the pickle sets it to, {} if nothing or no dictionary.
    """

    kind = "unknown"

    def __new__(cls, *arguments, **more):
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *arguments, **more):
        pass

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) == 2:  # (dictionary, slots)
            state = state[0]
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    extend = add = append

    def __call__(self, *arguments, **more):
        return Unknown()

    def __repr__(self) -> str:
        return self.kind


class Dictionary(dict):
    """In the place of a dictionary that a pickle may give attributes, which are left aside."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class Storage:
    """The numbers behind tensors, which are read when they are asked for."""

    def __init__(self, dtype: np.dtype, count: int, load: Callable[[], np.ndarray]):
        self.dtype, self.count, self._load = dtype, count, load
        self._numbers: np.ndarray | None = None

    def numbers(self) -> np.ndarray:
        """[count], or WeightFileError."""
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
            raise pickle.UnpicklingError("it describes a tensor that there cannot be")
        if len(shape) != len(stride):
            raise pickle.UnpicklingError("it has a tensor with other strides than dimensions")
        self.storage, self.offset = storage, offset
        self.shape, self.stride = tuple(shape), tuple(stride)
        self.dtype = dtype or storage.dtype

    def numpy(self) -> np.ndarray:
        """The array, read-only; bfloat16 and float8 in the dtypes of ml_dtypes."""
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


def read_torch(path: Path):
    """What a file of `torch.save` holds: containers with `Tensor` and `Unknown` in them.

    A whole module becomes the dictionary of its tensors, as its ``state_dict``.

    Raises:
      WeightFileError: if the file is cut, damaged or something else.
    """
    try:
        zipped = kind_of_file(path) == TORCH_ZIP
        content = _read_zip(path) if zipped else _read_legacy(path)
        return _plain(content)
    except WeightFileError:
        raise
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
        return _Unpickler(file, storage).load()


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def _read_legacy(path: Path):
    """Five pickles: a magic number, version, machine, content, keys; then all storages."""
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
        if _Unpickler(file, storage).load() != LEGACY_MAGIC:
            raise WeightFileError(
                f"{path} is a pickle that torch.save did not write; save a dictionary of named "
                "tensors with torch.save or as .safetensors"
            )
        version, machine = (_Unpickler(file, storage).load() for _ in range(2))
        if version != 1001:
            raise WeightFileError(f"{path} is of version {version} of torch's files; save it again")
        _check_order(path, little=machine["little_endian"])
        unpickler = _Unpickler(file, storage)
        content = unpickler.load()
        keys, place, end = _Unpickler(file, storage).load(), file.tell(), path.stat().st_size
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


class _Unpickler(pickle.Unpickler):
    """Builds plain containers, tensors, and `Unknown` for every other name.

    Attributes:
      widths: key of a storage -> bytes of one of its numbers.
    """

    def __init__(self, file, storage: Callable[[str, np.dtype, int], Storage]):
        super().__init__(file, encoding="latin1")  # bytes of Python 2 are text then
        self._storage, self._storages, self._classes = storage, {}, {}
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
            return pid[1]  # of a whole module, with the text of its class
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise pickle.UnpicklingError("it refers to something other than a storage")
        _, kind, key, _, count = pid[:5]
        if (
            not (isinstance(kind, _Kind) and isinstance(key, str) and type(count) is int)
            or count < 0
        ):
            raise pickle.UnpicklingError(f"it has a storage of {kind!r}")
        if key not in self._storages:
            self._storages[key] = self._storage(key, kind.dtype, count)
            self.widths[key] = kind.dtype.itemsize
        whole = self._storages[key]
        if len(pid) < 6 or pid[5] is None:
            return whole
        _, offset, size = pid[5]
        if min(offset, size) < 0:
            raise pickle.UnpicklingError("it has a part of a storage that there cannot be")
        part = slice(offset, offset + size)
        return Storage(whole.dtype, size, lambda: whole.numbers()[part])


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
    """A tensor of a subclass: the plain tensor, if it is one underneath."""
    return make(*arguments) if make in (_tensor, _typed_tensor, _parameter) else Unknown()


def _parameter(data, *_):
    return data


def _attribute(owner, name: str):
    """`getattr`, by which older pickles name a class inside of a class."""
    return type("Unknown", (Unknown,), {"kind": f"{getattr(owner, 'kind', owner)}.{name}"})


def _default(factory=None, items=()):
    """`collections.defaultdict`, without its default."""
    return Dictionary(items)


def _new(kind, *_):
    """`copyreg._reconstructor`, which would call ``kind``."""
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


def _plain(content):
    """The content with the dictionary of its tensors in the place of every module."""
    if _is_module(content):
        return dict(_of_module(content, ""))
    if isinstance(content, dict):
        return {k: dict(_of_module(v, "")) if _is_module(v) else v for k, v in content.items()}
    return content


def _is_module(value) -> bool:
    return isinstance(value, Unknown) and {"_parameters", "_modules"} <= value.state.keys()


def _of_module(module: Unknown, prefix: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module and those inside, as its ``state_dict`` has them."""
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
