"""Torch's own files, written without torch: its zip and the older form, by hand."""

import io
import pickle
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
MAGIC = 0x1950A86A20F9469CFC6C


class Global:
    """A name that the pickle refers to; nothing of it need exist."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """What a pickle makes by calling a name, with a state and the items of a dictionary."""

    def __init__(self, function, *arguments, state=None, items=None):
        self.function, self.arguments = function, arguments
        self.state, self.items = state, items or {}


class View:
    """A part of an array that is saved whole."""

    def __init__(self, array, part):
        self.array, self.part = array, part


def instance(module, name, **state):
    """An object of a class, as protocol 2 pickles it."""
    return Call(Global("copyreg", "_reconstructor"), Global(module, name), state=state)


def module_of(tensors, name="Net", modules=None):
    """A whole torch.nn.Module, as `torch.save(module)` pickles it."""
    inside = {"_parameters": tensors, "_buffers": {}, "_modules": modules or {}}
    return instance("somewhere.models", name, training=True, **inside)


class _Pickler(pickle._Pickler):
    def __init__(self, file):
        super().__init__(file, 2)
        self.arrays = {}

    def save(self, item, save_persistent_id=True):
        if isinstance(item, Global):
            self.write(f"c{item.module}\n{item.name}\n".encode())
        elif isinstance(item, Call):
            self.save(item.function)
            self.save(item.arguments)
            self.write(pickle.REDUCE)
            self._batch_setitems(item.items.items())
            if item.state is not None:
                self.save(item.state)
                self.write(pickle.BUILD)
        elif isinstance(item, (np.ndarray, View)):
            self.save(self._tensor(item))
        elif isinstance(item, _Storage):
            self.save(("storage", Global("torch", item.kind), item.key, "cpu", item.count))
            self.write(pickle.BINPERSID)
        else:
            super().save(item)

    def _tensor(self, item):
        whole = item.array if isinstance(item, View) else item
        base = np.array(whole, order="C")
        view = base[item.part] if isinstance(item, View) else base
        key = next((key for key, (x, _) in self.arrays.items() if x is whole), None)
        if key is None:
            key = str(len(self.arrays))
            self.arrays[key] = (whole, base)
        storage = _Storage(STORAGES[base.dtype.name], key, base.size)
        offset = (view.ctypes.data - base.ctypes.data) // base.itemsize
        strides = tuple(step // base.itemsize for step in view.strides)
        hooks = Call(Global("collections", "OrderedDict"))
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        return Call(rebuild, storage, offset, tuple(view.shape), strides, False, hooks)


class _Storage:
    def __init__(self, kind, key, count):
        self.kind, self.key, self.count = kind, key, count


def _pickled(content):
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    return file.getvalue(), {key: base for key, (_, base) in pickler.arrays.items()}


def write_torch(path, content, *, legacy=False):
    """Writes what `torch.save` would of containers of arrays, `Call` and `Global`.

    Args:
      legacy: in the form before torch 1.6.

    Returns:
      The path.
    """
    data, arrays = _pickled(content)
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/byteorder", "little")
            for key, array in arrays.items():
                archive.writestr(f"archive/data/{key}", array.tobytes())
            archive.writestr("archive/version", "3\n")
        return path
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(x, 2) for x in (MAGIC, 1001, machine))
    storages = b"".join(
        array.size.to_bytes(8, "little") + array.tobytes() for array in arrays.values()
    )
    path.write_bytes(head + data + pickle.dumps(list(arrays), 2) + storages)
    return path


def half(array, name="bfloat16"):
    """The array in fewer bits."""
    return np.asarray(array).astype(getattr(ml_dtypes, name, None) or name)
