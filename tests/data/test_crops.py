"""Crops, quantisers and resizes against torchvision, torch and torch-fidelity.

tests/golden/make_reconstruction.py made what they are compared with.
"""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from skimage import data as photographs

from gae_jax.data.images import CROPS, center_crop, lightningdit_crop
from gae_jax.nn import positions
from gae_jax.nn.pixels import QUANTISERS, dinov2_preprocess, to_float, to_uint8
from gae_jax.pretrained import inception

PATH = Path(__file__).parents[1] / "golden" / "reconstruction.safetensors"
GOLDEN = load_file(PATH)
with safe_open(PATH, "numpy") as file:
    FACTS = {name: json.loads(value) for name, value in file.metadata().items()}
ROWS = slice(3, None, 37)  # those of resized images that the golden file keeps
LEVELS = np.arange(256, dtype=np.uint8)


def noise(seed, *shape):
    """uint8 of numpy's frozen generator, as the golden file's."""
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("name", FACTS["photographs"])
def test_photographs_are_those_of_the_golden_file(name):
    pixels = getattr(photographs, name)()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == FACTS["photographs"][name]


@pytest.mark.parametrize("case", FACTS["crops"])
def test_lightningdit_crop_is_torchvisions(case):
    photograph, box, size = FACTS["crops"][case]
    image = Image.fromarray(getattr(photographs, photograph)()).crop(box)
    crop = lightningdit_crop(image, size)
    want = GOLDEN[f"crop.{case}"]
    assert crop.values.dtype == np.float32
    np.testing.assert_allclose(crop.values, want, rtol=0, atol=4e-6)  # 5e-4 levels
    assert crop.pixels.dtype == np.uint8
    wanted = np.clip(127.5 * want + 128, 0, 255).astype(np.uint8)
    difference = np.abs(crop.pixels.astype(int) - wanted)
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 1e-3
    np.testing.assert_array_equal(to_uint8(crop.values), crop.pixels)


def test_adm_crop_is_the_pipelines_and_another_than_lightningdits():
    image = Image.fromarray(photographs.chelsea())
    adm, other = (CROPS[name](image, 64) for name in ("adm", "lightningdit"))
    np.testing.assert_array_equal(adm.pixels, center_crop(image, 64))
    np.testing.assert_array_equal(adm.values, to_float(adm.pixels))
    error = np.mean(np.square(adm.pixels.astype(float) - other.pixels))
    assert 20 < 10 * np.log10(255**2 / error) < 45


@pytest.mark.parametrize(("quantiser", "lost"), [("floor128", 0), ("trunc255", 63), ("round", 0)])
def test_round_trip_of_the_levels(quantiser, lost):
    values = np.asarray(to_float(LEVELS))  # on the host: not fused with what follows
    assert np.sum(np.asarray(to_uint8(values, quantiser)) != LEVELS) == lost


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_quantisers_saturate(quantiser):
    values = np.array([-3.0, -1.0, 1.0, 3.0])
    np.testing.assert_array_equal(to_uint8(values, quantiser), [0, 0, 255, 255])


def test_bias_of_the_quantisers():
    """In levels, on values between them: rounding has none, truncation half a level."""
    values = np.random.default_rng(0).uniform(-0.99, 0.99, 100_000).astype(np.float32)
    exact = 127.5 * values.astype(np.float64) + 127.5
    for name, bias in (("floor128", 0.0), ("trunc255", -0.5), ("round", 0.0)):
        got = np.asarray(to_uint8(values, name)).astype(float)
        assert abs(np.mean(got - exact) - bias) < 0.01, name


def test_quantisers_compute_in_fp32():
    """The same affine map in bf16 would change many pixels."""
    values = jnp.linspace(-1, 1, 4096).astype(jnp.bfloat16)
    expected = np.floor(np.clip(127.5 * np.asarray(values, np.float64) + 128, 0, 255))
    np.testing.assert_array_equal(to_uint8(values), expected)
    np.testing.assert_array_equal(jax.jit(to_uint8)(values), expected)
    in_bf16 = jnp.clip(127.5 * values + 128, 0, 255).astype(jnp.uint8)
    assert np.mean(in_bf16 != expected) > 0.2


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_compiled_reductions_see_levels(quantiser):
    """A compiler that drops the casts to uint8 and back would be half a level off."""
    values = np.linspace(-1.1, 1.1, 8000).astype(np.float32).reshape(2, 4, 1000)
    levels = np.asarray(to_uint8(values, quantiser))
    run = jax.jit(lambda x: jnp.mean(to_uint8(x, quantiser).astype(jnp.float32), axis=(1, 2)))
    np.testing.assert_allclose(run(values), levels.mean(axis=(1, 2)), rtol=0, atol=0.01)


def test_unknown_quantiser():
    with pytest.raises(ValueError, match=r"no quantiser 'ceil'; there are \['floor128', "):
        to_uint8(np.zeros(3), "ceil")


@pytest.mark.parametrize("size", [64, 256, 512])
def test_front_ends_are_those_of_torch_fidelity_and_torch(size):
    images = noise(size, 1, size, size, 1)
    tf = GOLDEN[f"tf.{size}"]
    got = inception.tf1_resize(images)[0, ROWS, :, 0]
    np.testing.assert_array_equal(got, (tf - 128) / 128)
    # compiled, a multiplication and an addition may become one
    got = jax.jit(inception.tf1_resize)(images)[0, ROWS, :, 0]
    np.testing.assert_allclose(128 * got + 128, tf, rtol=0, atol=1e-3)
    # the positions are fp32: on noise, torch and this are both 4e-3 levels off at 512 pixels
    got = inception.half_pixel_resize(images)[0, ROWS, :, 0]
    np.testing.assert_allclose(127.5 * (got + 1), GOLDEN[f"half_pixel.{size}"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [256, 100])
def test_antialiased_bicubic_resize_is_torchs(size):
    image = noise(size, size, size).astype(np.float32)
    matrix = positions.resize_matrix(size, 224, antialias=True)
    got = (matrix @ image @ matrix.T)[ROWS]
    # of which 3.4e-3 at 256 pixels are the rounding of torch's fp32 weights (ours: 3e-5)
    np.testing.assert_allclose(got, GOLDEN[f"bicubic.{size}"], rtol=0, atol=4e-3)


@pytest.mark.parametrize("grid", [(16, 16), (11, 45)])
def test_positions_are_interpolated_as_torch_does(grid):
    """Bicubic with a = -0.75; the antialiased kernel is another one."""
    grids = np.random.RandomState(0).randn(1, 4, 37, 37).astype(np.float32)
    table = np.concatenate([np.zeros((1, 1, 4)), np.moveaxis(grids, 1, -1).reshape(1, -1, 4)], 1)
    want = GOLDEN[f"positions.{grid[0]}x{grid[1]}"]

    def resized(antialias):
        return positions.resize_positions(
            jnp.asarray(table, jnp.float32), grid, antialias=antialias
        )[0, 1:].reshape(*grid, 4)

    np.testing.assert_allclose(resized(antialias=False), want, rtol=0, atol=1e-5)
    assert np.max(np.abs(resized(antialias=True) - want)) > 0.1


def test_dinov2_sees_what_dgm_eval_shows_it():
    images = {
        "astronaut": photographs.astronaut()[100:356, 100:356],
        "noise": noise(1, 150, 224, 3),
    }
    for name, image in images.items():
        got = dinov2_preprocess(image[None])
        assert got.shape == (1, 224, 224, 3)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got[0, ROWS], GOLDEN[f"dinov2.{name}"])


def test_dinov2_preprocess_refuses_other_inputs():
    for images in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="takes uint8 images"):
            dinov2_preprocess(images)
