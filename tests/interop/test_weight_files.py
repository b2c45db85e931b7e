"""State dicts on disk: safetensors and torch's own files."""

import argparse
import json
import shutil
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from in_parts import write_parts
from safetensors.numpy import load_file, save_file
from torch_zip import STORAGES, Call, Global, View, half, instance, module_of, write_torch

from gae_jax.interop import convert
from gae_jax.interop.files import read_checkpoint, read_state_dict, weight_files, write_safetensors
from gae_jax.interop.signatures import WeightFileError

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
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07\x12")
    with pytest.raises(WeightFileError, match="unknown kind of file"):
        read_state_dict(tmp_path / "x.onnx")
    path = tmp_path / "cut.safetensors"
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightFileError, match="is not a complete safetensors file"):
        read_state_dict(path)
    plain = tmp_path / "plain.safetensors"
    write_safetensors(plain, TENSORS)
    assert read_checkpoint(plain, "ema")[1] == "", "a plain state dict has no entries"
    clash = tmp_path / "clash.safetensors"
    write_safetensors(clash, {"module.a": TENSORS["b"], "a": TENSORS["b"]})
    with pytest.raises(WeightFileError, match="names clash"):
        read_state_dict(clash)


FORMS = {"zip": False, "before torch 1.6": True}
MIXED = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": View(np.arange(12.0).reshape(3, 4), (slice(1, None), slice(None, None, 2))),
    "half": half([1.5, -2.0], "float16"),
    "brain": half([1.5, -2.0]),
    "count": np.array(7),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
}
STRANGE = {
    "args": instance("argparse", "Namespace", lr=1e-4, path=Call(Global("pathlib", "Path"), "/x")),
    "callbacks": {Global("lightning.callbacks", "ModelCheckpoint"): {"best": 1}},
    "epoch": 3,
    "optimizer": {"state": {0: {"step": np.array(1.0)}}, "param_groups": []},
    "sum": Call(Global("builtins", "eval"), "1 / 0"),
    "inner": Call(
        Call(Global("__builtin__", "getattr"), Global("a", "B"), "C"), 1, state=(None, {})
    ),
}


@pytest.fixture(params=FORMS)
def save(request, tmp_path):
    """Function of a torch file's content -> its path, in either form."""
    return lambda content, name="x.pt": write_torch(
        tmp_path / name, content, legacy=FORMS[request.param]
    )


def test_tensors_of_torch_come_without_torch(save, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    whole = MIXED["transposed"]
    expected = MIXED | {"transposed": whole.array[whole.part], "tied": MIXED["weight"]}
    same(read_state_dict(save(MIXED | {"tied": MIXED["weight"]})), expected)


def test_entries_are_read_whatever_lies_beside_them(save):
    raw = {f"module.{name}": x for name, x in TENSORS.items()}
    path = save(
        {"ema": {f"module.{name}": np.asarray(x + 1) for name, x in TENSORS.items()}} | STRANGE
    )
    found = read_checkpoint(path, "ema")
    same(found.tensors, {name: np.asarray(x + 1) for name, x in TENSORS.items()})
    assert (found.entry, found.remarks) == ("ema", ())
    with pytest.raises(WeightFileError, match=r"'args' \(a argparse.Namespace\).* are no tensors"):
        read_state_dict(path)
    with pytest.raises(WeightFileError, match=r"no entry 'model' and .*args.*pass --config.*=ema"):
        read_checkpoint(path, "model", rivals=("ema", "model"))
    found = read_checkpoint(path, "state_dict")
    assert found.entry == "ema"
    assert found.remarks == ("there is no entry 'state_dict'; 'ema', its only one, was taken",)
    path = save({"ema": raw, "model": raw} | STRANGE)
    with pytest.raises(WeightFileError, match=r"pass --config.import_torch.entry=ema or --config"):
        read_checkpoint(path, "state_dict")
    found = read_checkpoint(path, "model")
    assert found.remarks[0].startswith("its entry 'model' was taken; for the others pass --config")
    assert read_checkpoint(save(raw), "model")[1:] == ("", ())
    found = read_checkpoint(save(raw | STRANGE), "model")
    assert "optimizer" in found.remarks[0]
    same(found.tensors, TENSORS)
    with pytest.raises(WeightFileError, match=r"entry 'ema' holds no tensors; .*model.*=model"):
        read_checkpoint(save({"ema": None, "model": raw}), "ema")
    with pytest.raises(WeightFileError, match="in none of which a state dict is"):
        read_checkpoint(save(STRANGE), "ema")


def test_a_whole_module_is_its_tensors(save):
    inner = module_of({"weight": TENSORS["a.weight"], "bias": None})
    net = module_of({}, modules={"a": inner})
    net.state["_buffers"] = {"b": TENSORS["b"], "cache": TENSORS["b"]}
    names = Call(Global("__builtin__", "set"), ["cache"])
    net.state["_non_persistent_buffers_set"] = names
    expected = {"b": TENSORS["b"], "a.weight": TENSORS["a.weight"]}
    same(read_state_dict(save(net)), expected)
    same(read_checkpoint(save({"ema": net, "epoch": 1}), "ema").tensors, expected)


def test_pickled_code_is_not_run(save, tmp_path):
    """Neither by calling a name, nor by building an object, nor by its state."""
    mark = tmp_path / "ran"
    touch = Call(Global("os", "system"), f"touch {mark}")
    again = Call(Call(Global("builtins", "getattr"), Global("os", "system"), "__call__"), "x")
    path = save({"model": TENSORS, "x": touch, "y": again, "z": Call(Global("shutil", "rmtree"),
                str(tmp_path))})  # fmt: skip
    same(read_checkpoint(path, "model").tensors, TENSORS)
    assert not mark.exists()
    assert path.exists()


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module.", "model._orig_mod.",
     "_fsdp_wrapped_module.", "module.model.", "_orig_mod.module."],
)  # fmt: skip
def test_prefixes_of_training_come_off(tmp_path, prefix):
    named = {f"{prefix}{name}": x for name, x in TENSORS.items()}
    losses = {"loss.logvar": np.zeros(1)} if prefix == "model." else {}
    path = write_torch(tmp_path / "x.pt", named | losses)
    same(read_state_dict(path), TENSORS | losses)
    one = {"model.a": TENSORS["b"], "b": TENSORS["b"]}
    assert set(read_state_dict(write_torch(path, one))) == set(one), "the name of a part"


def test_the_content_decides_not_the_suffix(tmp_path):
    write_torch(tmp_path / "torch.safetensors", TENSORS)
    same(read_state_dict(tmp_path / "torch.safetensors"), TENSORS)
    write_safetensors(tmp_path / "safe.pt", TENSORS)
    same(read_state_dict(tmp_path / "safe.pt"), TENSORS)
    write_safetensors(tmp_path / "no_suffix", TENSORS)
    same(read_state_dict(tmp_path / "no_suffix"), TENSORS)
    header = json.dumps({"b": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}).encode()
    for low in (b"\x80\1", b"PK", b"\x1f\x8b", b"<h"):  # as the length of a header may look
        length = low.ljust(8, b"\0")
        filled = header.ljust(int.from_bytes(low, "little"))
        (tmp_path / "x.pt").write_bytes(length + filled + TENSORS["b"].tobytes())
        same(read_state_dict(tmp_path / "x.pt"), {"b": TENSORS["b"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download or write it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page, not weights"),
        (b"<html>404</html>", "is a web page, not weights"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip; unpack it"),
        (b"\x93NUMPY\x01", "is one array of numpy"),
        (b"\0" * 4096, "begins with zeros"),
        (b"\0" * 257 + b"ustar\0", "is a tar archive"),
        (b"\x80\x02}q\x00.", "is a pickle that torch.save did not write"),
        (b"\x80\x02", "is cut or damaged, or torch.save did not write it"),
        (b"PK\x03\x04", "is cut or damaged, or torch.save did not write it"),
        (b'{"a": 1}', "unknown kind of file"),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "model.safetensors"])
def test_what_people_have_in_the_place_of_weights(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    if name.endswith("safetensors") and message.startswith("unknown"):
        message = "is not a complete safetensors file"
    with pytest.raises(WeightFileError, match=message) as error:
        read_state_dict(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_other_zips(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(WeightFileError, match="is an npz of numpy arrays, no file of weights"):
        read_state_dict(tmp_path / "x.npz")
    path = write_torch(tmp_path / "script.pt", TENSORS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/code/__torch__.py", "")
    with pytest.raises(WeightFileError, match=r"is a TorchScript archive .*state_dict"):
        read_state_dict(path)
    with pytest.raises(WeightFileError, match=r"holds one tensor \[2, 3\], no state dict"):
        read_state_dict(write_torch(path, TENSORS["a.weight"]))
    with pytest.raises(WeightFileError, match=r"holds a torch.optim.Adam, no state dict"):
        read_state_dict(write_torch(path, instance("torch.optim", "Adam", lr=1)))


def test_damage_at_any_place_is_an_error_that_names_the_file(save):
    """Cut at any length, and one byte changed at any place."""
    path = save({"model": TENSORS, "args": STRANGE["args"]})
    whole, wrong = path.read_bytes(), []
    for place in range(0, len(whole), 3):
        for content in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :],
        ):
            path.write_bytes(content)
            try:
                read_checkpoint(path, "model")
            except WeightFileError as error:
                wrong += [] if str(path) in str(error) else [str(error)]
    assert not wrong


def test_torch_itself_wrote_it(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "columns": base.t(),
        "part": base[1:, ::2],
        "repeated": torch.ones(1).expand(5),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "count": torch.tensor(3),
        "mask": torch.tensor([True]),
        "none": torch.zeros(0, 3),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
    }
    args = argparse.Namespace(device=torch.device("cpu"), dtype=torch.bfloat16, size=base.shape)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    adam = torch.optim.AdamW(module.parameters()).state_dict()
    content = {"model": tensors, "args": args, "opt": adam, "net": module, "x": np.ones(3)}
    for zipped, protocol in ((True, 2), (True, 4), (False, 2), (False, 4)):
        path = tmp_path / "x.pt"
        how = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
        torch.save(content, path, **how)
        found = read_checkpoint(path, "model")
        for name, tensor in tensors.items():
            want = tensor.detach()
            if name in ("brain", "eight"):
                want = want.float()
            got = found.tensors[name]
            got = got.astype(np.float32) if name in ("brain", "eight") else got
            np.testing.assert_array_equal(got, want.numpy(), err_msg=name, strict=True)
        torch.save(module, path, **how)
        want = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        same(read_state_dict(path), want)


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
    found = read_checkpoint(index.parent, "ema")
    assert (found.entry, found.remarks) == ("", ())
    same(found.tensors, whole)
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
            rf"names 3 parts, of which 1 are not next to it: {PARTS[1]}; download them into",
        ),
        (cut_part, rf"{PARTS[1]} is not a complete safetensors file \(.*\); download"),
        (pointer_of_git_lfs, rf"{PARTS[1]} is a pointer of Git LFS, .*git lfs pull"),
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


def test_a_dictionary_of_a_class_of_its_own_is_one(tmp_path):
    def odd(items):
        return Call(Global("somewhere", "Odd"), items=items)

    alone = write_torch(tmp_path / "alone.pt", odd(TENSORS))
    inside = write_torch(tmp_path / "inside.pt", {"ema": odd(TENSORS), "args": odd({"lr": 1})})
    for path, entry in ((alone, ""), (inside, "ema")):
        found = read_checkpoint(path, "ema")
        assert found.entry == entry
        same(found.tensors, TENSORS)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (Call(Global("torch._utils", "_rebuild_sparse_tensor"), 0), r"a.weight \(sparse\)"),
        (Call(Global("torch._utils", "_rebuild_meta_tensor_no_storage")), "device 'meta'"),
    ],
)
def test_weights_that_are_no_plain_tensors_are_named_and_not_called_missing(weight, says, tmp_path):
    tensors = TENSORS | {"a.weight": weight}
    for content in (tensors, {"ema": tensors}):
        path = write_torch(tmp_path / "x.pt", content)
        with pytest.raises(WeightFileError, match=says):
            read_checkpoint(path, "ema")


def test_arrays_of_numpy_are_named_and_left_aside_beside_tensors(tmp_path):
    array = Call(Global("numpy._core.multiarray", "_reconstruct"), 0)
    path = write_torch(tmp_path / "x.pt", {"a.weight": array, "b": array})
    with pytest.raises(WeightFileError, match="numpy arrays instead of tensors: a"):
        read_checkpoint(path, "ema")
    path = write_torch(tmp_path / "y.pt", {"ema": TENSORS, "random_state": array})
    same(read_checkpoint(path, "ema").tensors, TENSORS)


def test_quantised_storages_are_not_called_damage(tmp_path, monkeypatch):
    monkeypatch.setitem(STORAGES, "uint8", "QInt8Storage")
    path = write_torch(tmp_path / "x.pt", {"a": np.zeros(3, np.uint8)})
    with pytest.raises(
        WeightFileError, match=r"x\.pt: it has numbers of torch\.QInt8Storage"
    ) as error:
        read_checkpoint(path, "ema")
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_computed_buffer_may_be_rounded_to_the_files_precision(name):
    value = np.concatenate([np.sin(np.linspace(0, 7, 999)), [1e-3, 5e-4]]).astype(np.float32)
    error, rounding = convert._off(half(value, name), value)
    assert (error <= rounding + 1e-4).all()
    error, rounding = convert._off(half(value * 1.5, name), value)
    assert (error > rounding + 1e-4).any()
