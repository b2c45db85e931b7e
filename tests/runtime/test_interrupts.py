"""Ctrl-C and what the file system refuses: one true line, and the work that is done is kept."""

import dataclasses
import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from test_resume import copy_run, fit_toy, start, toy_stage, whole_state

from gae_jax.commands import cli
from gae_jax.evaluation.archives import write_samples
from gae_jax.runtime.errors import CheckpointError, Preempted, WriteError, refusal
from gae_jax.runtime.files import new_memmap, write_json
from gae_jax.runtime.signals import last_words
from gae_jax.train.checkpoint import latest_step
from gae_jax.train.log import Metrics, read_metrics
from gae_jax.train.preemption import Notice


def stop_at(step, number):
    """An evaluation that the process gets a signal in."""

    def evaluate(state):
        if int(state.step) == step:
            os.kill(os.getpid(), number)
        return {}

    return evaluate


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)],
)
@pytest.mark.parametrize("step", [3, 20])  # of 20: after the last one nothing else may begin
def test_a_signal_saves_the_step_that_is_reached(number, name, status, step, tmp_path, capfd):
    stage = toy_stage(lambda w, step: (w**2).sum())
    broken = dataclasses.replace(stage, evaluate=stop_at(step, number))
    settings = dict(steps=20, save_every=10, eval_every=1)
    with pytest.raises(Preempted) as notice:
        fit_toy(broken, tmp_path / "broken", **settings)
    assert notice.value.status == status
    assert f"toy: asked to stop ({name}); step {step} of 20 is saved, the same" in str(notice.value)
    assert latest_step(tmp_path / "broken") == step
    said = "Ctrl-C: saving and stopping; a second one stops at once without saving"
    assert (said in capfd.readouterr().err) == (number == signal.SIGINT)
    plain = dataclasses.replace(stage, evaluate=lambda state: {})
    ends = [fit_toy(plain, tmp_path / run, **settings).state for run in ("broken", "whole")]
    kernels = [end.params["linear"]["head"]["kernel"] for end in ends]
    np.testing.assert_array_equal(*kernels)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Notice() as notice:
            os.kill(os.getpid(), signal.SIGINT)
            assert not notice.due()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


BUSY = """
import ctypes, sys
from gae_jax.train.preemption import Notice
with Notice():
    print("busy", flush=True)
    ctypes.CDLL(None).usleep(100_000_000)  # as long as it lasts, Python handles no signal
"""


def test_a_second_ctrl_c_ends_at_once_although_the_process_is_busy():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "busy\n"
    # usleep gives up at a signal: it is sent to the thread that listens
    threads = sorted(int(name) for name in os.listdir(f"/proc/{process.pid}/task"))
    other = next(thread for thread in threads if thread != process.pid)
    for text in ("Ctrl-C: saving and stopping", "stopped at once"):
        tgkill(process.pid, other, signal.SIGINT)
        while text not in (line := process.stderr.readline()):
            assert line, f"ended without {text!r}"
    assert process.wait(timeout=20) == 130
    assert "Traceback" not in process.stderr.read()


def tgkill(pid, thread, number):
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.tgkill(pid, thread, number):
        raise OSError(ctypes.get_errno(), "tgkill")


@pytest.mark.slow
def test_a_training_in_a_terminal(small_run, tmp_path):
    """A second process beside it, Ctrl-C, resume, Ctrl-C twice."""
    run = copy_run(small_run, tmp_path / "run", "diffusion")
    checkpoints = run / "diffusion" / "checkpoints"

    def begun(process, step):
        while not (checkpoints / str(step)).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)

    process = start("diffusion", run)
    begun(process, 120)
    process.send_signal(signal.SIGSTOP)
    beside = start("diffusion", run)
    _, says = beside.communicate(timeout=200)
    assert beside.returncode == 1
    assert f"process {process.pid} on" in says
    assert "has been writing" in says
    assert "Traceback" not in says
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, says = process.communicate(timeout=200)
    assert process.returncode == 130, says
    stopped = latest_step(run / "diffusion")
    assert f"asked to stop (Ctrl-C); step {stopped} of 360 is saved" in says
    assert stopped % 120
    assert "Traceback" not in says
    assert not list(run.glob(".*.lock"))

    process = start("diffusion", run)
    begun(process, 240)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, says = process.communicate(timeout=200)
    assert process.returncode == 130, says
    assert f"resumed at step {stopped} of 360" in says
    assert "Traceback" not in says
    whole_state(run / "diffusion")  # the newest that is listed is whole
    assert not list(run.glob(".*.lock"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["tokenizer", "--config=tests/small.py"], "training resumes from the last"),
        (["latents", "runs/demo"], "complete shards are kept"),
        (["sample", "--config=tests/small.py"], "complete batches are kept"),
        (["sample", "runs/demo", "--class=3"], "all are drawn again"),
        (["evaluate", "runs/my demo"], "all else is measured again"),
        (["prepare-data", "--source=x", "--out=y"], "complete shards are kept"),
        (["compare", "a.json", "b.json"], "compare starts over"),
        (["diffusion", "runs/demo", "--fresh", "--from-step", "7"], "training resumes from"),
    ],
)
def test_what_is_said_after_ctrl_c_is_true_of_the_command(argv, says, monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_main", interrupt)
    try:
        assert cli.main(["gae_jax", *argv]) == 130
        # the next one would not wait for threads either
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1
    again = argv[: argv.index("--fresh")] if "--fresh" in argv else argv
    assert shlex.split(err.split("Run again: ")[1]) == ["python", "-m", "gae_jax", *again]


SLOW = """
import sys, time
from gae_jax.commands import cli
def slow(argv):
    print("busy", flush=True)
    time.sleep(100)
cli._main = slow
sys.exit(cli.main(["gae_jax", "evaluate", "runs/demo"]))
"""


def test_sigterm_outside_of_training_ends_at_once_with_a_line():
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    _, says = process.communicate(timeout=20)
    assert process.returncode == 143
    assert says.splitlines() == [cli.interrupted(["gae_jax", "evaluate", "runs/demo"])]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_training_under_nohup_saves_before_it_ends():
    """Ctrl-C is ignored there; the line of the command line is not said, and nothing exits."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with last_words("ended"), Notice() as notice:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert notice.due()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


# --- what the file system refuses


REFUSED = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO]


@pytest.mark.parametrize("number", REFUSED)
def test_whatever_a_command_writes_a_refusal_is_one_line(number, monkeypatch, capsys, tmp_path):
    """An error that names no path, at the end of a file's writing."""

    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    for write in (
        lambda: write_json(tmp_path / "a" / "x.json", {}),
        lambda: write_samples(tmp_path / "a" / "x.json", np.zeros((2, 4, 4, 3), np.uint8)),
    ):
        with pytest.raises(WriteError) as error:
            write()
        text = str(error.value)
        assert text.startswith(f"{tmp_path / 'a' / 'x.json'}: {os.strerror(number)}; ")
        assert "\n" not in text
    assert not list((tmp_path / "a").iterdir())


def test_errors_of_the_program_are_no_refusals(tmp_path):
    assert refusal(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None
    with pytest.raises(ValueError, match="mine"):
        write_json(tmp_path / "x.json", Failing())


class Failing(dict):
    def items(self):
        raise ValueError("mine")

    def __bool__(self):
        return True


@pytest.mark.parametrize("number", REFUSED)
def test_the_command_line_says_where_and_what_to_do(number, monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "somewhere"))

    monkeypatch.setattr(cli, "run_command", refuse)
    arguments = ["gae_jax", "plan", f"--config={ROOT}/tests/small.py", f"--workdir={tmp_path}"]
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"error: {tmp_path / 'somewhere'}: {os.strerror(number)}; ")


@pytest.mark.parametrize("command_", ["backbone", "report", "reference"])
def test_a_run_directory_that_is_a_file(command_, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    arguments = ["gae_jax", command_, f"--config={ROOT}/tests/small.py"]
    assert cli.main([*arguments, f"--workdir={tmp_path / 'run'}"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_in_the_metrics_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    stage = toy_stage(lambda w, step: (w**2).sum())
    write, count = Path.open, []

    def full(self, mode="r", *rest, **more):
        if self.name == "metrics.csv" and mode == "a":
            count.append(1)
            if len(count) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(WriteError, match=r"metrics.csv: No space left on device; make room"):
            fit_toy(stage, tmp_path)
    assert latest_step(tmp_path) == 4
    fitted = fit_toy(stage, tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4, 6, 8, 10]
    assert fitted.step == 10


def test_events_that_cannot_be_written_stop_no_training(tmp_path, caplog):
    """The library's thread ends at an error, and its queue is soon full."""
    metrics = Metrics(tmp_path, 0)
    writer = metrics._events.file_writer.event_writer

    def refuse(event):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer._ev_writer.write_event = refuse
    deadline = time.monotonic() + 20
    metrics.write(1, {"loss": 1.0})
    while writer._worker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    for step in range(2, 40):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    assert len(read_metrics(tmp_path)) == 39
    assert sum("events could not be written" in line for line in caplog.messages) == 1


def test_room_for_a_map_is_taken_at_once(tmp_path, monkeypatch):
    array = new_memmap(tmp_path / "x.npy", np.dtype(np.uint8), (3, 5))
    array[:] = 7
    array.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.full((3, 5), 7))

    def full(handle, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteError, match=r"y.npy: No space left on device"):
        new_memmap(tmp_path / "y.npy", np.dtype(np.uint8), (3, 5))


def test_a_checkpoint_that_cannot_be_written_says_why_in_the_systems_words(tmp_path, monkeypatch):
    stage = toy_stage(lambda w, step: (w**2).sum())
    text = (
        "RESOURCE_EXHAUSTED: Error writing x: Failed: No space left on device [tensorstore]\nmore"
    )

    def full(self, *_, **__):
        raise ValueError(text)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "wait_until_finished", full)
        with pytest.raises(CheckpointError) as error:
            fit_toy(stage, tmp_path, steps=3)
    assert f"written to {tmp_path / 'checkpoints'}: No space left on device\n" in str(error.value)
    assert "make room on the disk and run the same command again" in str(error.value)


def test_a_reader_that_goes_away_ends_no_work(tmp_path):
    work = (
        "import sys; from gae_jax.runtime.outlet import Outlet; sys.stdout = Outlet(sys.stdout)\n"
        "for i in range(3): print(i, flush=True)\n"
        f"open({str(tmp_path / 'result')!r}, 'w').write('saved')\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", work]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "result").read_text() == "saved"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (Path("/proc/nowhere/x.json"), tmp_path / "loop" / "x" / "x.json"):
        with pytest.raises(WriteError, match=f"{path}: .*choose another folder"):
            write_json(path, {})
