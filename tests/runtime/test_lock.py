"""One process at a time makes a stage; a dead one's lock is taken over."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from gae_jax.run.run import StageFolder
from gae_jax.runtime import lock

HOLD = """
import sys, time
from pathlib import Path
from gae_jax.run.run import StageFolder
print(StageFolder(Path(sys.argv[1])).open({"a": 1}, {}, fresh=False), flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def released():
    yield
    lock.release_all()


def hold(folder):
    """Another process that makes the stage; it has the lock when this returns."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


def lock_of(folder):
    return folder.parent / f".{folder.name}.lock"


def test_another_process_is_refused_until_the_first_is_killed(tmp_path, caplog):
    folder = StageFolder(tmp_path / "run" / "tokenizer")
    process = hold(folder.path)
    try:
        for fresh in (False, True):
            with pytest.raises(lock.LockedError) as error:
                folder.open({"a": 1}, {}, fresh=fresh)
        text = str(error.value)
        assert (
            f"process {process.pid} on {os.uname()[1]} has been writing {folder.path} since" in text
        )
        assert f"remove {lock_of(folder.path)}" in text
        assert f"since {time.strftime('%Y-')}" in text
        # another stage of the run is free
        assert StageFolder(tmp_path / "run" / "teacher").open({"a": 1}, {}, fresh=False)
        # killed, and not yet waited for by its parent: at once
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert folder.open({"a": 1}, {}, fresh=False)
        assert any(
            f"process {process.pid} on" in line and "is gone; its lock is taken over" in line
            for line in caplog.messages
        )
    finally:
        process.kill()
        process.communicate()
    # the remedy of the error, without such a process
    lock_of(folder.path).unlink()
    assert folder.open({"a": 1}, {}, fresh=False)


def test_a_finished_stage_is_read_by_many_and_has_no_lock(tmp_path):
    folder = StageFolder(tmp_path / "run" / "tokenizer")
    assert folder.open({"a": 1}, {}, fresh=False)
    assert lock_of(folder.path).exists()
    folder.finish(fingerprint="f")
    assert not lock_of(folder.path).exists()
    lock_of(folder.path).write_text(json.dumps({**lock.myself(), "pid": 1, "started": ""}))
    assert not folder.open({"a": 1}, {}, fresh=False)


def test_a_process_may_open_its_stage_again(tmp_path):
    folder = StageFolder(tmp_path / "run" / "tokenizer")
    for _ in range(2):
        assert folder.open({"a": 1}, {}, fresh=False)
    lock.release_all()
    assert not lock_of(folder.path).exists()


def test_a_number_that_another_process_has_by_now_is_stale(tmp_path):
    path = lock_of(tmp_path / "tokenizer")
    path.write_text(json.dumps({**lock.myself(), "pid": os.getppid(), "started": "1"}))
    lock.acquire(tmp_path / "tokenizer")
    assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": "x", "machine": 3}'])
def test_a_damaged_lock_is_stale(content, tmp_path):
    lock_of(tmp_path / "tokenizer").write_text(content)
    lock.acquire(tmp_path / "tokenizer", silence=0.2, poll=0.05)
    assert json.loads(lock_of(tmp_path / "tokenizer").read_text())["pid"] == os.getpid()


def elsewhere(**changes):
    return {**lock.myself(), "host": "node7", "machine": "node7 abc", "pid": 12, **changes}


def test_another_machine_that_gives_no_sign_of_life_is_gone(tmp_path, caplog):
    path = lock_of(tmp_path / "tokenizer")
    path.write_text(json.dumps(elsewhere(beats=3)))
    with caplog.at_level(logging.INFO):
        lock.acquire(tmp_path / "tokenizer", silence=0.3, poll=0.05)
    assert any("watching for 0 s whether that is alive" in line for line in caplog.messages)
    assert any("process 12 on node7" in line and "taken over" in line for line in caplog.messages)


def test_another_machine_that_lives_is_respected(tmp_path):
    path = lock_of(tmp_path / "tokenizer")
    path.write_text(json.dumps(elsewhere(beats=3)))
    beat = threading.Timer(0.2, lambda: path.write_text(json.dumps(elsewhere(beats=4))))
    beat.start()
    with pytest.raises(lock.LockedError, match="process 12 on node7"):
        lock.acquire(tmp_path / "tokenizer", silence=5.0, poll=0.05)
    beat.join()


def test_a_lock_gives_signs_of_life_and_notices_that_it_was_lost(tmp_path, caplog):
    folder = tmp_path / "tokenizer"
    lock.acquire(folder, beat=0.05)
    deadline = time.monotonic() + 10
    while not json.loads(lock_of(folder).read_text())["beats"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads(lock_of(folder).read_text())["beats"] >= 1
    lock_of(folder).write_text(json.dumps(elsewhere()))
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "process 12 on node7 took the lock over" in caplog.messages[0]
    lock.release(folder)
    assert json.loads(lock_of(folder).read_text())["host"] == "node7"  # it is theirs


def test_of_several_that_come_at_once_one_takes_a_stale_lock_over(tmp_path):
    path = lock_of(tmp_path / "run" / "tokenizer")
    path.parent.mkdir()
    path.write_text(json.dumps({**lock.myself(), "pid": 2**22 + 1}))
    program = (
        "import sys; from pathlib import Path; from gae_jax.runtime import lock\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: lock.acquire(Path(sys.argv[1])); print('mine', flush=True)\n"
        "except lock.LockedError: print('theirs', flush=True)\n"
        "sys.stdin.readline()"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", program, str(tmp_path / "run" / "tokenizer")]
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.stdout.readline().strip() for process in processes]
    for process in processes:
        process.communicate("\n", timeout=60)
    assert sorted(said) == ["mine", "theirs", "theirs", "theirs"]
