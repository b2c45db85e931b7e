"""Several processes on this machine: the same figures as one, and ends that lose nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from processes import BATCH, EXAMPLES, STEPS, count

from gae_jax.train.checkpoint import latest_step

DEVICES = 8


def start(task, folder, count, *, seconds_per_example=0.0):
    """``count`` processes with the fake devices shared among them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
        "TEST_SECONDS_PER_EXAMPLE": str(seconds_per_example),
        "PYTHONPATH": str(ROOT),
    }
    if count > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "processes.py", task, str(folder)],
            env=common | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes, status=0, timeout=200):
    """What they said; all must end with the status."""
    said = [process.communicate(timeout=timeout)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [status] * len(processes), "\n\n".join(said)
    return said


def copy_stages(small_run, to, names):
    for name in names:
        shutil.copytree(small_run / name, to / name)
    return to


def test_all_end_with_their_status_though_the_first_is_done_sooner(tmp_path):
    """JAX's coordinator ends with the first process, and aborts those that still run."""
    finish(start("end", tmp_path, 2), status=143)


def test_processes_agree(tmp_path):
    finish(start("agree", tmp_path, 2))
    for index in range(2):
        found = json.loads((tmp_path / f"process-{index}.json").read_text())
        assert found["gathered"] == [{"index": 0, "text": ""}, {"index": 1, "text": "x"}]
        assert found["agreed"] == {"from": 0}
        assert found["agree"] == "the folder was made by another config"
        assert found["all_well"] == ("process 1: no disk" if index == 0 else "no disk")
        *others, alone = found["attempts"]
        texts = [f"FailedAttempt: ValueError: here ({process})" for process in (0, 1)]
        assert others == [*texts, "done"]
        # the error itself where it happened, and an end for who waits elsewhere
        assert alone == "ValueError: here (1)" if index else "FailedAttempt" not in alone
        mine, machine = found["cores"]
        assert mine == max(1, machine // 2)
        # data is split over the processes first, fsdp lies inside each
        assert found["slices"] == [[0, 0], [0, 0], [1, 1], [1, 1]]
        assert found["doctor"].startswith("doctor: commit failed")
    assert json.loads((tmp_path / "first.json").read_text()) == 0
    checks = json.loads((tmp_path / "doctor" / "doctor.json").read_text())["checks"]
    texts = {check["name"]: check["text"] for check in checks}
    assert "commit0" in texts["commit"]
    assert "commit1" in texts["commit"]
    assert "seen by all 2 processes" in texts["directory"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_step_of_every_stage_is_the_same_as_of_one_process(small_run, tmp_path, count):
    """Also the order of the examples; the mesh has two ways of data, fsdp and tensor each."""
    names = ("backbone", "teacher", "tokenizer", "latents", "diffusion")
    folder = copy_stages(small_run, tmp_path, names)
    for processes in (1, count):
        finish(start("steps", folder, processes))
    for name in ("backbone", "teacher", "tokenizer", "diffusion"):
        one, other = (dict(np.load(folder / f"steps-{n}" / f"{name}.npz")) for n in (1, count))
        assert any(key.startswith("metric/1/") for key in one)
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key.startswith("label"):
                np.testing.assert_array_equal(value, other[key])
            elif key.startswith("weight"):
                np.testing.assert_allclose(other[key], value, rtol=0, atol=1e-6, err_msg=key)
            elif "grad_norm" not in key:  # the cosine term's first gradient is 1e8 long
                np.testing.assert_allclose(other[key], value, rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.slow  # test_processes_agree stays, devices are in test_sample
def test_latents_and_samples_of_two_processes(small_run, tmp_path):
    names = ("backbone", "teacher", "tokenizer", "diffusion")
    folder = copy_stages(small_run, tmp_path, names)
    # the shard of an interrupted session is kept as it is
    (folder / "latents").mkdir()
    for path in [
        "config.json",
        *(f"{k}-00001.npy" for k in ("latents", "labels")),
        "shard-00001.json",
    ]:
        shutil.copy(small_run / "latents" / path, folder / "latents" / path)
    before = (folder / "latents" / "latents-00001.npy").stat().st_mtime_ns
    # that of another number of processes is made again: nothing says that it is whole
    (folder / "latents" / "latents-00000.npy").write_bytes(b"half")
    finish(start("stages", folder, 2))
    assert (folder / "latents" / "latents-00001.npy").stat().st_mtime_ns == before
    one, two = (
        json.loads((run / "latents/manifest.json").read_text()) for run in (small_run, folder)
    )
    assert [shard["count"] for shard in two["shards"]] == [500, 500, 438]
    assert one["tokenizer"] == two["tokenizer"]
    assert one["count"] == two["count"]
    for name in ("mean", "std"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)
    for index in range(3):
        for kind, tolerance in (("latents", 2e-5), ("labels", 0)):
            pair = [np.load(run / f"latents/{kind}-{index:05}.npy") for run in (small_run, folder)]
            np.testing.assert_allclose(*pair, rtol=0, atol=tolerance)
    for name in ("sde", "ode"):
        pair = [np.load(run / f"sample/{name}/samples.npz") for run in (small_run, folder)]
        np.testing.assert_array_equal(pair[0]["arr_1"], pair[1]["arr_1"])
        images = [samples["arr_0"].astype(int) for samples in pair]
        assert np.abs(images[0] - images[1]).max() <= 1


def wait_for_step(folder, step, processes):
    end = time.monotonic() + 120
    while (latest_step(folder) or 0) < step:
        for process in processes:
            assert process.poll() is None, f"ended too early: {process.stderr.read()}"
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.02)


@pytest.mark.parametrize("first", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_without_repeating_an_example(tmp_path, first):
    """All are asked to stop, of two one is killed, this one goes to the end."""
    slow = dict(seconds_per_example=0.01)
    processes = start("count", tmp_path, first, **slow)
    wait_for_step(tmp_path, 5, processes)
    processes[first // 2].send_signal(signal.SIGTERM)  # one is told, all save the same step
    said = finish(processes, status=143)
    stopped = latest_step(tmp_path)
    assert all(f"step {stopped} of {STEPS} is saved" in text for text in said)

    processes = start("count", tmp_path, 2, **slow)
    wait_for_step(tmp_path, stopped + 10, processes)
    processes[1].kill()
    killed = time.monotonic()
    said = processes[0].communicate(timeout=60)[1]
    assert processes[0].returncode not in (0, 143), said
    assert time.monotonic() - killed < 40  # the heartbeat is 10 s
    processes[1].communicate()
    assert latest_step(tmp_path) < STEPS

    undisturbed = tmp_path / "undisturbed"
    for folder in (tmp_path, undisturbed):  # this process has as many devices as those together
        count(folder)
    found, expected = (dict(np.load(path / "state.npz")) for path in (tmp_path, undisturbed))
    # 80 steps of 16 are 26 epochs of 48, and 32 examples of the next
    assert sorted(set(found["count"])) == [26, 27]
    assert found["count"].sum() == STEPS * BATCH
    assert len(found["count"]) == EXAMPLES
    np.testing.assert_array_equal(found["count"], expected["count"])
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=0, atol=1e-6)


@pytest.mark.slow  # in test_interrupts without a process of its own
def test_a_lone_process_saves_when_it_is_asked_to_stop(tmp_path):
    processes = start("count", tmp_path, 1, seconds_per_example=0.01)
    wait_for_step(tmp_path, 5, processes)
    processes[0].send_signal(signal.SIGTERM)
    said = finish(processes, status=143)[0]
    assert f"counting: asked to stop (SIGTERM); step {latest_step(tmp_path)} of {STEPS}" in said
