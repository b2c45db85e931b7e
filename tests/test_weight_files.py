"""State dicts on disk; the tests of torch's own files run where torch is installed."""

import json
import shutil
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from in_parts import write_parts
from safetensors.numpy import load_file, save_file

from gae_jax.interop.files import (
    WeightFileError,
    read_checkpoint,
    read_state_dict,
    weight_files,
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


def test_scalars_and_transposed_arrays_are_written_as_they_are(tmp_path):
    tensors = {"count": np.array(7), "kernel": np.arange(6.0).reshape(2, 3).T}
    write_safetensors(tmp_path / "weights.safetensors", tensors)
    found = load_file(tmp_path / "weights.safetensors")
    assert found["count"].shape == ()
    assert found["kernel"].shape == (3, 2)
    same(found, tensors)


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


PARTS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
LARGER = {
    **TENSORS,
    "module.c": np.float16([1, 2, 3]),
    "d": np.ones((3, 2), ml_dtypes.bfloat16),
    "e": np.array([True, False]),
}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_parts_are_what_one_file_with_all_of_them_is(tmp_path):
    index = write_parts(tmp_path / "parts", LARGER, 3)
    (tmp_path / "one").mkdir()
    save_file(LARGER, tmp_path / "one" / "model.safetensors")
    whole = read_state_dict(tmp_path / "one" / "model.safetensors")
    assert "c" in whole, "wrappers come off"
    for path in (index, index.parent, tmp_path / "one"):
        same(read_state_dict(path), whole)
    found, entry = read_checkpoint(index.parent, "ema")
    assert entry == ""
    same(found, whole)
    assert weight_files(index) == weight_files(index.parent)
    assert weight_files(index) == (index, *(index.parent / name for name in PARTS))
    one = (tmp_path / "one" / "model.safetensors",)
    assert weight_files(tmp_path / "one") == weight_files(*one) == one
    clash = write_parts(tmp_path / "clash", {"module.b": TENSORS["b"], "b": TENSORS["b"]})
    with pytest.raises(WeightFileError, match=r"clash.* names clash"):
        read_state_dict(clash)


def test_parts_may_be_links_to_another_folder_and_the_index_need_not_say_their_size(tmp_path):
    """As in the cache of Hugging Face; and as of programs that write no total_size."""
    index = write_parts(tmp_path / "blobs", LARGER, 3, metadata=None)
    (tmp_path / "snapshot").mkdir()
    for file in index.parent.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    same(read_state_dict(tmp_path / "snapshot"), read_state_dict(index))
    size = sum(x.nbytes for x in LARGER.values())
    same(read_state_dict(write_parts(tmp_path / "f", LARGER, metadata={"total_size": float(size)})),
         read_state_dict(index))  # fmt: skip


def test_no_tensor_is_held_twice(tmp_path):
    tensors = {f"x.{i}": np.full(200_000, i, np.float32) for i in range(6)}
    size = sum(x.nbytes for x in tensors.values())
    index = write_parts(tmp_path, tensors, 3)
    read_state_dict(index)  # imports and caches of the first call
    tracemalloc.start()
    found = read_state_dict(index)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    same(found, tensors)
    assert size <= now <= peak < 1.1 * size


def drop_part(folder):
    (folder / PARTS[1]).unlink()


def cut_part(folder):
    (folder / PARTS[1]).write_bytes((folder / PARTS[1]).read_bytes()[:-1])


def pointer_of_git_lfs(folder):
    (folder / PARTS[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")


def drop_tensor(folder):
    save_file({}, folder / PARTS[1])


def add_tensor(folder):
    save_file(load_file(folder / PARTS[1]) | {"more": TENSORS["b"]}, folder / PARTS[1])


def repeat_tensor(folder):
    save_file(load_file(folder / PARTS[1]) | load_file(folder / PARTS[0]), folder / PARTS[1])


def exchange_parts(folder):
    shutil.move(folder / PARTS[0], folder / "x")
    shutil.move(folder / PARTS[1], folder / PARTS[0])
    shutil.move(folder / "x", folder / PARTS[1])


def other_numbers(folder):
    save_file({"b": TENSORS["b"].astype(np.int32)}, folder / PARTS[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop_part,
            rf"names 3 parts, of which 1 are not beside it: {PARTS[1]}; download them into",
        ),
        (cut_part, rf"{PARTS[1]} is no whole safetensors file \(.*\); download"),
        (pointer_of_git_lfs, rf"{PARTS[1]} is no whole safetensors file \(.*\); download"),
        (drop_tensor, rf"not in the part that the index names: b \({PARTS[1]}\); download"),
        (add_tensor, rf"are in a part, but not in the index: more \({PARTS[1]}\); download"),
        (repeat_tensor, rf"several parts: a.weight \({PARTS[0]} and {PARTS[1]}\); download"),
        (exchange_parts, rf"the index names: a.weight \({PARTS[0]}\), b \({PARTS[1]}\); download"),
        (
            other_numbers,
            "says total_size 38, but the tensors of its 3 parts are 34 bytes; download",
        ),
    ],
)
def test_parts_that_do_not_fit_their_index(tmp_path, change, message):
    tensors = TENSORS | {"c": np.float16([1, 2, 3])}
    index = write_parts(tmp_path, tensors, 3)
    change(tmp_path)
    for path in (index, tmp_path):
        with pytest.raises(WeightFileError, match=message) as error:
            read_state_dict(path)
        assert str(tmp_path) in str(error.value)


def test_only_the_first_of_many_tensors_are_named(tmp_path):
    index = write_parts(tmp_path, {f"x{i:02}": TENSORS["b"] for i in range(20)}, 1)
    save_file({}, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(WeightFileError, match=r"x07 \(model\S*\) and 12 more; download"):
        read_state_dict(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON .* an index is .* download the index"),
        (b"\xff\xfe\xfa", "is no JSON"),
        (b"[1]", "holds a list; an index is"),
        (b"{}", "has no weight_map; an index is"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": ["x.safetensors"]}', "has no weight_map"),
        (
            b'{"weight_map": {"a": {"file": "x.safetensors"}}}',
            "its weight_map gives no .* for a; an index",
        ),
        (b'{"weight_map": {"a": "x"}, "metadata": 5}', "its metadata is 5; an index is"),
    ],
)
def test_an_index_of_another_form(tmp_path, content, message):
    index = tmp_path / "x.index.json"
    index.write_bytes(content)
    for function in (read_state_dict, weight_files):
        with pytest.raises(WeightFileError, match=rf"x.index.json:? {message}"):
            function(index)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("../x.safetensors", "no plain names of files in its own folder: '../x.safetensors'; put"),
        ("/x.safetensors", "no plain names of files in its own folder: '/x.safetensors'; put"),
        ("a/../../x.safetensors", "no plain names of files in its own folder"),
        ("a/x.safetensors", "no plain names of files in its own folder"),
        ("..", "no .safetensors: '..'; take"),
        ("", "no .safetensors: ''; take"),
        (
            "pytorch_model-00001-of-00002.bin",
            r"no .safetensors: 'pytorch.*'; take .* or join these",
        ),
    ],
)
def test_part_names_that_are_refused(tmp_path, part, message):
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    write_safetensors(tmp_path / "a" / "x.safetensors", TENSORS)
    write_safetensors(tmp_path / "a" / "a" / "x.safetensors", TENSORS)
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, part)}))
    with pytest.raises(WeightFileError, match=message):
        read_state_dict(index)


def test_a_folder_says_what_it_holds(tmp_path):
    def refused(message, path=tmp_path):
        with pytest.raises(WeightFileError, match=message):
            read_state_dict(path)

    refused("a folder without .* nor has it other weights: download them into it")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    refused("a folder without .* nor has it other weights: download them into it")
    (tmp_path / "model.safetensors").unlink()
    write_safetensors(tmp_path / "other.safetensors", TENSORS)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    refused(r"it has other.safetensors, pytorch_model.bin.index.json: pass the path of the one")
    refused("unknown kind of file; known are .safetens", tmp_path / "config.json")
    write_parts(tmp_path, TENSORS)
    same(read_state_dict(tmp_path), TENSORS)
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    refused("holds both model.safetensors and .*; pass the path of the one")
