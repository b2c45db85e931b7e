"""Images as people have them: odd modes, damage of every kind, sizes that would fill the memory."""

import io
import logging
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from test_data import image_data

from gae_jax.data import decoding
from gae_jax.data.decoding import MOST_BYTES, UnreadableError, decode
from gae_jax.data.images import CROPS, LONGEST, center_crop, lightningdit_crop, random_crop
from gae_jax.data.sources import base
from gae_jax.data.sources.folder import Folder
from gae_jax.runtime.errors import DataError

PIXELS = photographs.chelsea()[:60, :80]


def encoded(image, kind="png", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    file.seek(0)
    return file


def pixels_of(file, **more):
    return np.asarray(decode(file, **more))


def png(width, height, depth=8, colour=2, data=b"\0" * 1000, head=b""):
    """A PNG file of this header."""

    def chunk(kind, content):
        code = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + code

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + head + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )  # fmt: skip


RAMP = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled(kind):
    found = pixels_of(encoded(Image.fromarray(RAMP), kind))
    np.testing.assert_array_equal(found, np.repeat(np.round(RAMP / 257)[..., None], 3, -1))
    assert (found.min(), found.max()) == (0, 255)


def tiff(values, bits, photometric=1):
    """A grey TIFF of one strip with samples of this many bits, little-endian."""
    height, width = values.shape
    if bits == 12:
        rows = []
        for row in values:
            a, b = row[::2], row[1::2]
            rows.append(np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8))
        content = np.stack(rows).tobytes()
    else:
        content = values.astype(f"<u{bits // 8}").tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0),
            (277, 1), (278, height), (279, len(content))]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    rows = []
    for tag, value in tags:
        value = start if tag == 273 else value
        rows.append(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(rows) + bytes(4) + content


def test_12_bit_grey_is_scaled():
    levels = (RAMP >> 4).astype(np.uint16)
    found = pixels_of(io.BytesIO(tiff(levels, 12)))
    np.testing.assert_array_equal(found[..., 0], np.round(levels / (4095 / 255)))


def test_16_bit_grey_where_white_is_zero():
    found = pixels_of(io.BytesIO(tiff(RAMP, 16, photometric=0)))
    np.testing.assert_array_equal(found[..., 0], 255 - np.round(RAMP / 257))


def test_16_bit_grey_with_a_transparent_level():
    head = b"tRNS" + struct.pack(">H", 4000)
    chunk = struct.pack(">I", 2) + head + struct.pack(">I", zlib.crc32(head))
    rows = b"".join(b"\0" + struct.pack(">HH", 4000, 8000) for _ in range(2))
    found = pixels_of(io.BytesIO(png(2, 2, 16, 0, rows, chunk)))
    np.testing.assert_array_equal(found[:, :, 0], [[255, 31], [255, 31]])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_samples_without_a_white_are_refused(dtype):
    file = encoded(Image.fromarray(RAMP.astype(dtype)), "tiff")
    with pytest.raises(UnreadableError, match="whose white is not known; convert it to 8 or 16"):
        decode(file)


def test_ordinary_images_keep_their_pixels():
    photograph = Image.fromarray(PIXELS)
    for kind in ("png", "tiff", "bmp"):
        np.testing.assert_array_equal(pixels_of(encoded(photograph, kind)), PIXELS)
    file = encoded(photograph.convert("CMYK"), "jpeg", quality=95)
    wanted = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    np.testing.assert_array_equal(pixels_of(file), wanted)
    assert np.abs(wanted.astype(int) - PIXELS).mean() < 4


def test_the_first_frame_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "tiff", "png"):
        more = {"lossless": True} if kind == "webp" else {}
        file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **more)
        np.testing.assert_array_equal(pixels_of(file)[0, 0], [255, 0, 0])


def test_transparent_palettes_lie_on_white(recwarn):
    image = Image.new("P", (4, 1))
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 9, 9, 9])
    image.putdata([0, 1, 2, 3])
    found = pixels_of(encoded(image, transparency=bytes([0, 255, 0, 128])))
    assert found[0].tolist() == [[255] * 3, [200, 0, 0], [255] * 3, [132] * 3]
    found = pixels_of(encoded(image, "gif", transparency=1))
    assert found[0, 1].tolist() == [255] * 3


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_where_it_is_asked_for(kind, orientation):
    from PIL import ImageOps

    content = encoded(Image.fromarray(PIXELS), kind, exif=exif(orientation)).getvalue()
    ignored = Image.open(io.BytesIO(content)).convert("RGB")
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    np.testing.assert_array_equal(pixels_of(io.BytesIO(content)), ignored)
    np.testing.assert_array_equal(pixels_of(io.BytesIO(content), exif="apply"), wanted)


@pytest.mark.parametrize("damaged", [b"Exif\0\0MM", b"Exif\0\0" + b"\xff" * 30, b"x"])
def test_damaged_exif_is_none(damaged):
    file = encoded(Image.fromarray(PIXELS), "jpeg", exif=damaged)
    for how in decoding.EXIF:
        assert pixels_of(file, exif=how).shape == PIXELS.shape


def folder_of(tmp_path, files, **more):
    (tmp_path / "a").mkdir(exist_ok=True)
    for name, content in files.items():
        (tmp_path / "a" / name).write_bytes(content)
    return Folder(str(tmp_path), "train", **more)


def good(**more):
    return encoded(Image.fromarray(PIXELS), "jpeg", **more).getvalue()


def test_one_line_says_that_orientations_are_ignored(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(base, "LOOKED_AT", 4)
    files = {f"{index}.jpg": good(exif=exif(6 if index in (1, 3) else 1)) for index in range(6)}
    source = folder_of(tmp_path, files)
    for index in (0, 1, 1, 1, 2):
        source[index]
    assert not caplog.records
    for index in (3, 4, 5, 0):
        source[index]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"2 of the first 4 images read of {tmp_path} have an EXIF orientation, which is ignored, "
        "as for ImageNet; turn photographs upright with --config.data.exif=apply"
    )
    caplog.clear()
    applied = folder_of(tmp_path, files, exif="apply")
    assert repr(applied).replace(", exif apply", "") == repr(source) != repr(applied)
    assert [applied[index]["image"].size for index in range(2)] == [(80, 60), (60, 80)]
    assert applied[5]["image"].size == (80, 60)
    for index in range(6):
        applied[index]
    assert not caplog.records


def tiff_bomb():
    content = tiff(np.zeros((2, 2), np.uint16), 16)
    for tag in (256, 257):
        was, now = (struct.pack("<HHII", tag, 3, 1, edge) for edge in (2, 60000))
        content = content.replace(was, now)
    return content


BROKEN = {
    "bomb.png": (png(20000, 20000), "exceeds limit of 178956970 pixels"),
    "bomb.tif": (tiff_bomb(), "exceeds limit"),
    "zero.jpg": (b"", "the file is empty"),
    "blank.jpg": (bytes(5000), "begins with zeros"),
    "cut.jpg": (good()[:700], "truncated"),
    "html.jpg": (b"<html>404</html>", "HTML or XML"),
    "xml.png": (b"\n <?xml version='1.0'?><Error/>", "HTML or XML"),
    "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    "text.jpg": (b"no image", "not an image of a known format"),
    "cut.png": (encoded(Image.fromarray(PIXELS)).getvalue()[:300], ""),
    "cut.gif": (encoded(Image.fromarray(PIXELS), "gif").getvalue()[:900], ""),
    "cut.webp": (encoded(Image.fromarray(PIXELS), "webp").getvalue()[:300], ""),
    "cut.tif": (encoded(Image.fromarray(PIXELS), "tiff").getvalue()[:90], ""),
    "cut.bmp": (encoded(Image.fromarray(PIXELS), "bmp").getvalue()[:40], ""),
    "float.tif": (encoded(Image.fromarray(PIXELS[..., 0].astype("f")), "tiff").getvalue(), "white"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named_or_skipped(tmp_path, name, caplog):
    content, says = BROKEN[name]
    files = {"0.jpg": good(), name: content, "zz.jpg": good()}
    source = folder_of(tmp_path, files)
    with pytest.raises(DataError, match=rf"a/{name} cannot be read as an image .*{says}") as error:
        [source[index] for index in range(3)]
    assert "0x" not in str(error.value)
    assert "on_corrupt=skip" in str(error.value)
    caplog.clear()
    skipping = folder_of(tmp_path, files, on_corrupt="skip")
    for index in range(3):
        assert skipping[index]["image"].size == (80, 60)
    assert [path.name for path in skipping.skipped] == [name]
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "error",
    [struct.error("x"), zlib.error("x"), MemoryError(), IndexError("x"), EOFError(), KeyError("x"),
     RecursionError(), AssertionError(), OverflowError("x"), ZeroDivisionError()],
)  # fmt: skip
def test_every_exception_of_a_decoder_names_the_file(tmp_path, monkeypatch, error):
    convert = Image.Image.convert

    def failing(self, *arguments, **more):
        if self.size == (7, 7):
            raise error
        return convert(self, *arguments, **more)

    monkeypatch.setattr(Image.Image, "convert", failing)
    odd = encoded(Image.new("RGB", (7, 7))).getvalue()
    files = {"0.jpg": good(), "7.png": odd}
    with pytest.raises(DataError, match=r"a/7.png cannot be read as an image \(.+\)"):
        folder_of(tmp_path, files)[1]
    assert folder_of(tmp_path, files, on_corrupt="skip")[1]["image"].size == (80, 60)
    if not isinstance(error, MemoryError):  # that may be the machine's fault
        with pytest.raises(UnreadableError):
            decode(io.BytesIO(odd))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_of_every_kind_raise_one_error():
    """Some hundred files with bytes changed or cut: what is raised is always the same."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(PIXELS)
    contents = [
        encoded(image, kind, **more).getvalue()
        for kind, more in (
            ("png", {}), ("jpeg", {"exif": exif(6)}), ("webp", {}), ("gif", {}), ("bmp", {}),
            ("tiff", {}), ("tiff", {"compression": "tiff_lzw"}), ("ppm", {}),
        )
    ]  # fmt: skip
    failed = 0
    for content in contents:
        for trial in range(60):
            damaged = bytearray(content)
            if trial % 3 == 0:
                del damaged[rng.integers(len(damaged)) :]
            for _ in range(1 + trial % 7):
                if damaged:
                    at = rng.integers(min(len(damaged), 400 if trial % 2 else len(damaged)))
                    damaged[at] = rng.integers(256)
            try:
                decode(io.BytesIO(bytes(damaged)), exif="apply")
            except UnreadableError:
                failed += 1
    assert failed > 100


def test_odd_metadata_does_not_fill_the_log(tmp_path, capfd, recwarn):
    """PIL warns of it, once for every text; the program is run as people run it."""
    import subprocess

    for index in range(3):
        content = good(exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes([40 + index, 0]) + b"\x12\x01\x03")
        folder_of(tmp_path, {f"{index}.jpg": content})
    code = (
        f"from gae_jax.data.sources import Folder; s = Folder({str(tmp_path)!r}, 'train')\n"
        "for i in range(len(s)): s[i]"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == ""


def whole_center(image, size):
    """ADM's crop by way of the whole resized image."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = tuple(round(x * scale) for x in image.size)
    array = np.asarray(image.resize(shape, resample=Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def whole_random(image, size, rng):
    short = int(rng.integers(size, int(size / 0.8) + 1))
    while min(image.size) >= 2 * short:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = short / min(image.size)
    shape = tuple(round(x * scale) for x in image.size)
    array = np.asarray(image.resize(shape, resample=Image.Resampling.BICUBIC))
    top = int(rng.integers(array.shape[0] - size + 1))
    left = int(rng.integers(array.shape[1] - size + 1))
    return array[top : top + size, left : left + size]


def smooth(width, height):
    rng = np.random.default_rng(width + height)
    grid = rng.integers(0, 256, (max(height // 3, 1), max(width // 3, 1), 3), np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (17, 500), (500, 17), (200, 9)])
def test_ordinary_crops_are_the_same_to_the_bit(shape):
    image = smooth(*shape)
    assert max(shape) <= LONGEST * min(shape)
    np.testing.assert_array_equal(center_crop(image, 16), whole_center(image, 16))
    for seed in range(4):
        ours, whole = (
            crop(image, 16, np.random.default_rng(seed)) for crop in (random_crop, whole_random)
        )
        np.testing.assert_array_equal(ours, whole)


@pytest.mark.parametrize("shape", [(3, 200), (400, 5), (1, 300), (40, 2000)])
def test_long_images_are_cut_as_the_whole_would_be(shape, monkeypatch):
    image = smooth(*shape)
    assert max(shape) > LONGEST * min(shape)

    def near(one, other):
        assert one.shape == (16, 16, 3)
        assert np.abs(one.astype(int) - other).max() <= 1

    near(center_crop(image, 16), whole_center(image, 16))
    for seed in range(4):
        crops = [
            crop(image, 16, np.random.default_rng(seed)) for crop in (random_crop, whole_random)
        ]
        near(*crops)
    cut = lightningdit_crop(image, 16)
    monkeypatch.setattr("gae_jax.data.images.LONGEST", 10**9)
    near(cut.pixels, lightningdit_crop(image, 16).pixels)


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (2, 60000)])
def test_long_images_take_little_memory(shape):
    image = Image.new("RGB", shape, "red")
    tracemalloc.start()  # PIL's own memory is not seen: the sizes that it is asked for are
    sizes, resize = [], Image.Image.resize

    def watched(self, size, *arguments, **more):
        sizes.append(size[0] * size[1])
        return resize(self, size, *arguments, **more)

    try:
        Image.Image.resize = watched
        for crop in (center_crop, *CROPS.values()):
            assert np.asarray(getattr(crop(image, 256), "pixels", crop(image, 256))).shape == (
                256, 256, 3,
            )  # fmt: skip
        random_crop(image, 256, np.random.default_rng(0))
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        Image.Image.resize = resize
        tracemalloc.stop()
    assert max(sizes) < LONGEST * 256 * 320


def test_a_length_in_a_damaged_file_takes_no_memory(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    content, path = file.getvalue(), tmp_path / "claims.png"
    for kind in (b"IDAT", b"tEXt", b"iCCP"):
        start = content.index(b"IDAT") - 4
        path.write_bytes(content[:start] + struct.pack(">I", 2**31 - 1) + kind + bytes(20))
        tracemalloc.start()
        try:
            with pytest.raises(UnreadableError):
                decode(path)
            assert tracemalloc.get_traced_memory()[1] < 2**24
        finally:
            tracemalloc.stop()
    with path.open("ab") as file:  # a file that nobody would read whole, without its bytes
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(UnreadableError, match="it has 2,147,483,649 bytes"):
        decode(path)


def test_a_crop_that_fails_names_the_file(tmp_path, monkeypatch):
    folder_of(tmp_path, {"0.jpg": good(), "1.jpg": good()})
    data = image_data(name="folder", root=str(tmp_path), holdout=0.0)

    def fail(*arguments, **more):
        raise MemoryError

    monkeypatch.setattr("gae_jax.data.images._part", fail)
    for crop in CROPS:
        with pytest.raises(DataError, match=r"a/0.jpg of 80 x 60 pixels cannot be cut"):
            next(iter(data.ordered(data.source("train"), 1, crop)))
    with pytest.raises(DataError, match=r"a/\d.jpg of 80 x 60 pixels cannot be cut"):
        next(iter(data.training_batches(data.source("train"), 1, 0).read()))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_photograph_of_a_hundred_megapixels_is_read(tmp_path, caplog):
    """PIL warns of it; nobody is told, and it is no bomb."""
    caplog.set_level(logging.INFO)
    content = encoded(Image.new("L", (10000, 10000), 7), compress_level=1).getvalue()
    source = folder_of(tmp_path, {"0.png": content})
    item = source[0]
    assert item["image"].size == (10000, 10000)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
