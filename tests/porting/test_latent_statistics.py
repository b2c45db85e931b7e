"""Statistics of latents in released files: GAE's of channels, RAE's of elements."""

import numpy as np
import pytest
from torch_zip import write_torch

from gae_jax.interop.convert import ConversionError
from gae_jax.interop.files import write_safetensors
from gae_jax.interop.signatures import WeightFileError
from gae_jax.porting.latent_statistics import of_latents

SHAPE = (2, 3, 4)  # h, w, d
VAR = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


@pytest.fixture
def saved(tmp_path):
    """Function of a torch file's content -> its path."""
    return lambda content: write_torch(tmp_path / "stat.pt", content)


def test_a_mean_of_none_is_zero(saved):
    mean, std = of_latents(saved({"mean": None, "var": VAR}), SHAPE)
    assert (mean.shape, mean.dtype) == (SHAPE, np.float32)
    assert not mean.any()
    np.testing.assert_allclose(std, np.sqrt(np.moveaxis(VAR, 0, -1) + 1e-5), rtol=1e-6)


def test_a_mean_is_taken_channels_last(saved, tmp_path):
    mean, _ = of_latents(saved({"mean": VAR + 1, "var": VAR}), SHAPE)
    np.testing.assert_array_equal(mean[1, 2], VAR[:, 1, 2] + 1)
    write_safetensors(tmp_path / "stat.safetensors", {"var": VAR})
    mean, _ = of_latents(tmp_path / "stat.safetensors", SHAPE)
    assert not mean.any()


def test_channels_as_gae_has_them(saved):
    stats = {"mean": VAR[:, :1, :1][None], "std": VAR[:, :1, :1][None] + 1}
    mean, std = of_latents(saved(stats), SHAPE)
    np.testing.assert_array_equal((mean, std), (VAR[:, 0, 0], VAR[:, 0, 0] + 1))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"mean": None, "var": VAR[:, :1]}, ConversionError, r"\[4, 2, 3\] .* \[4, 1, 3\]"),
        ({"mean": VAR, "var": VAR, "std": VAR}, ConversionError, "must hold var, and mean or None"),
        ({"mean": None, "var": VAR - 1}, ConversionError, "a var is below 0"),
        ({"mean": VAR * np.nan, "var": VAR}, ConversionError, "not finite"),
        ({"mean": VAR, "var": None}, WeightFileError, "no plain state dict"),
        ({"mean": None, "std": VAR}, WeightFileError, r"'mean' \(a NoneType\) are no tensors"),
        ({"mean": VAR, "std": VAR}, ConversionError, "must hold mean and std of 4 channels"),
    ],
)
def test_what_is_neither_is_refused(saved, content, error, message):
    with pytest.raises(error, match=message):
        of_latents(saved(content), SHAPE)
