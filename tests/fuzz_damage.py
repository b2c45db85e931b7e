"""Ways to damage a file: blindly, or inside of what it is (JSON, zip, gzip, safetensors, npy)."""

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable

HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body></body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
TEXT = "Überall Text, wo Zahlen stehen sollten.\n".encode() * 20
OTHERS = (b"", HTML, LFS, TEXT, b"\0" * 4096, b"PK\3\4", b"\x80\4.", b"{}", b"[]", b"null", b"\xff")
LENGTHS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NAMES = ("", "../x", "/etc/hostname", "a\0b", "\ud800", "caf\xe9" * 300, "__class__", "latents")
VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, 10**30, 0.5, -0.0, 1e308),
    *(float("inf"), float("-inf"), float("nan"), [], {}, [[]], [0] * 5, {"": {}}, *NAMES),
)


def _place(rng: random.Random, data: bytes, most: int) -> tuple[int, int]:
    """A range of the data, at times in its first or last bytes, where headers are."""
    size = rng.randint(1, min(most, len(data)))
    first = rng.choice((0, 0, rng.randrange(len(data)), len(data) - size))
    return first, min(first + size, len(data))


def flip(rng, data):
    content = bytearray(data)
    start, stop = _place(rng, data, rng.choice((64, 512, len(data))))
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        content[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut(rng, data):
    return data[: rng.choice((rng.randrange(len(data)), len(data) - 1, min(len(data), 8)))]


def zero(rng, data):
    start, stop = _place(rng, data, len(data))
    return data[:start] + bytes(stop - start) + data[stop:]


def noise(rng, data):
    start, stop = _place(rng, data, len(data))
    return data[:start] + rng.randbytes(stop - start) + data[stop:]


def swap(rng, data):
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def drop(rng, data):
    start, stop = _place(rng, data, 1000)
    return data[:start] + data[stop:]


def double(rng, data):
    start, stop = _place(rng, data, 1000)
    return data[:stop] + data[start:]


def length(rng, data):
    """A huge number where a length may be."""
    number, form = rng.choice(LENGTHS), rng.choice(("<Q", ">Q", "<I", ">I"))
    packed = struct.pack(form, number & (2 ** (8 * struct.calcsize(form)) - 1))
    at = rng.choice((0, rng.randrange(len(data)), rng.randrange(min(len(data), 64))))
    return data[:at] + packed + data[at + len(packed) :]


def digits(rng, data):
    """Another number instead of one that is written in digits."""
    places = [at for at, value in enumerate(data) if 48 <= value < 58]
    if not places:
        return flip(rng, data)
    at = rng.choice(places)
    text = str(rng.choice((-1, 0, 7, 99, 2**33, 10**18, 10**40))).encode()
    return data[:at] + text + data[at + 1 :]


def other(rng, data):
    return rng.choice(OTHERS)


BLIND = (flip, flip, flip, cut, zero, noise, swap, drop, double, length, digits, other)


def blind(rng: random.Random, data: bytes) -> bytes:
    return rng.choice(BLIND)(rng, data) if data else rng.choice(OTHERS)


def _json_value(rng: random.Random, value):
    """The value with one place in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.25:
            return value | {rng.choice(NAMES): rng.choice(VALUES)}
        return value | {key: _json_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        how = rng.random()
        if how < 0.15:
            return value[:at] + value[at + 1 :]
        if how < 0.3:
            return [*value, value[at]]
        return [*value[:at], _json_value(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def inside_json(rng, data):
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        value = _json_value(rng, value)
    if rng.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(value).encode()


def inside_zip(rng, data):
    """One member damaged, with a right checksum, or renamed, twice there or missing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    how = rng.random()
    if how < 0.1:
        del members[at]
    elif how < 0.2:
        members[at] = (rng.choice(("../x", "mu.npy", "arr_0.npy", "data.pkl", "x" * 300)), content)
    else:
        inner = inside_npy if name.endswith(".npy") and rng.random() < 0.5 else blind
        members[at] = (name, inner(rng, content))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as out:
        for name, content in members:
            out.writestr(name, content)
    return file.getvalue()


def inside_npy(rng, data):
    """Another dtype, order or shape in the header."""
    size = struct.unpack("<H", data[8:10])[0]
    header = data[10 : 10 + size].decode("latin1")
    fields = {
        "descr": ("'|u1'", "'<f4'", "'<f8'", "'>i8'", "'|O'", "'<U9'", "'|V8'", "'x'", "7", "[]"),
        "fortran_order": ("True", "False", "7", "None"),
        "shape": (
            "()",
            "(0,)",
            "(3,)",
            "(-1,)",
            "(1, 2)",
            f"({2**62}, 4)",
            f"({2**40},)",
            "7",
            "x",
        ),
    }
    name = rng.choice(list(fields))
    start = header.index(f"'{name}': ") + len(name) + 4
    rest, depth, stop = header[start:], 0, 0
    while depth or rest[stop] not in ",}":
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(rest[stop], 0)
        stop += 1
    header = (header[:start] + rng.choice(fields[name]) + rest[stop:]).encode("latin1")
    return data[:8] + struct.pack("<H", len(header)) + header + data[10 + size :]


def inside_safetensors(rng, data):
    size = struct.unpack("<Q", data[:8])[0]
    header = inside_json(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def inside_gzip(rng, data):
    return gzip.compress(blind(rng, gzip.decompress(data)), 1)


INSIDE: dict[str, Callable] = {
    ".json": inside_json,
    ".npz": inside_zip,
    ".pt": inside_zip,
    ".npy": inside_npy,
    ".safetensors": inside_safetensors,
    ".gz": inside_gzip,
}


def damage(rng: random.Random, suffix: str, data: bytes) -> bytes:
    """The content of a file, damaged."""
    inside = INSIDE.get(suffix)
    if inside and rng.random() < 0.5:
        return inside(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = blind(rng, data)
    return data
