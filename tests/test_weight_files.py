"""State dicts on disk; the tests of torch's own files run where torch is installed."""

import sys

import numpy as np
import pytest

from gae_jax.interop.files import (
    WeightFileError,
    read_checkpoint,
    read_state_dict,
    write_safetensors,
)

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3)}


def test_safetensors_round_trip_and_wrappers_come_off(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {f"module._orig_mod.{name}": x for name, x in TENSORS.items()})
    names = {"b": TENSORS["b"], "a._orig_mod.weight": TENSORS["a.weight"]}  # one block compiled
    write_safetensors(tmp_path / "part.safetensors", names)
    assert set(read_state_dict(tmp_path / "part.safetensors")) == set(TENSORS)
    found = read_state_dict(path)
    assert set(found) == set(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_what_cannot_be_read_is_explained(tmp_path):
    with pytest.raises(WeightFileError, match="does not exist"):
        read_state_dict(tmp_path / "none.safetensors")
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(WeightFileError, match="unknown kind of file"):
        read_state_dict(tmp_path / "x.onnx")
    path = tmp_path / "cut.safetensors"
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightFileError, match="no whole safetensors file"):
        read_state_dict(path)
    plain = tmp_path / "plain.safetensors"
    write_safetensors(plain, TENSORS)
    assert read_checkpoint(plain, "ema")[1] == "", "a plain state dict has no entries"
    clash = tmp_path / "clash.safetensors"
    write_safetensors(clash, {"module.a": TENSORS["b"], "a": TENSORS["b"]})
    with pytest.raises(WeightFileError, match="names clash"):
        read_state_dict(clash)


def test_without_torch_a_torch_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(WeightFileError, match="pip install torch"):
        read_state_dict(tmp_path / "x.pt")


def test_torch_checkpoints_are_read_by_entry(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    weights = {f"module.{name}": torch.from_numpy(x.copy()) for name, x in TENSORS.items()}
    half = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    torch.save({"ema": weights | {"half": half}, "step": 3}, tmp_path / "x.pt")
    found, entry = read_checkpoint(tmp_path / "x.pt", "ema")
    assert entry == "ema"
    assert set(found) == {*TENSORS, "half"}
    np.testing.assert_array_equal(found["a.weight"], TENSORS["a.weight"])
    np.testing.assert_array_equal(found["half"], [1.5, -2.0])
    with pytest.raises(WeightFileError, match="are no tensors"):
        read_state_dict(tmp_path / "x.pt")
    with pytest.raises(WeightFileError, match=r"no entry 'model' and .*; it has \['ema', 'step'\]"):
        read_checkpoint(tmp_path / "x.pt", "model")
    torch.save(weights, tmp_path / "plain.pt")
    assert read_checkpoint(tmp_path / "plain.pt", "model")[1] == ""


def test_pickled_code_is_not_run(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    torch.save({"x": pytest.raises}, tmp_path / "x.pt")
    with pytest.raises(WeightFileError, match="weights_only"):
        read_state_dict(tmp_path / "x.pt")
