"""Launch scripts: style, help, errors that name the flag; one machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from launching import (
    COMMAND,
    GPU,
    JOB,
    NODES,
    POD,
    PROGRAM,
    SHARED,
    SLICE,
    SLURM,
    STORE,
    STORED,
    SWEEP,
    TPU,
    dry,
    launch,
    small_checkout,  # noqa: F401 (fixtures)
    wait_for,
)

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
WITH_HELP = ("local", "tpu_pod", "tpu_worker", "slurm", "gke")


def test_scripts_pass_shellcheck():
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", WITH_HELP)
def test_help_costs_nothing(script, tmp_path):
    # neither gcloud nor python nor git is to be had
    for tool in ("bash", "sed", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    for arguments in (["--help"], ["-h"]):
        done = launch(script, *arguments, PATH=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert f"usage: bash launch/{script}.sh" in done.stdout
        assert "--help" in done.stdout
        assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("local", ["--", "demo"], "--accelerator is missing: cpu, cuda12, cuda13 or tpu"),
        ("local", ["--accelerator=gpu", "--", "demo"], "--accelerator=gpu is none of"),
        ("local", ["--accelerator=cpu"], "the command is missing"),
        ("local", ["--accelerator=cpu", "demo"], "demo is not understood"),
        ("local", ["--accelerator=cpu", "--restarts=x", "--", "demo"], "--restarts=x is no whole"),
        ("local", ["--accelerator=cpu", "--restarts=1", "--", "demo", "--fresh"], "--fresh would"),
        (
            "local",
            ["--accelerator=cpu", "--restarts=1", "--", "tokenizer", "--from-step=3"],
            "--from-step would",
        ),
        ("tpu_pod", ["train", *POD[1:], *SLICE], "--project is missing"),
        ("tpu_pod", ["down", POD[0], POD[2]], "--zone is missing"),
        ("tpu_pod", ["status", *POD[:2]], "--name is missing"),
        ("tpu_pod", ["up", *POD, *SLICE[1:]], "--bucket is missing"),
        ("tpu_pod", ["up", *POD, SLICE[0], SLICE[2]], "--accelerator-type is missing"),
        ("tpu_pod", ["up", *POD, *SLICE[:2]], "--runtime-version is missing"),
        ("tpu_pod", ["train", *POD, *SLICE], "the command is missing"),
        ("tpu_pod", ["train", *POD, *SLICE, "--", *COMMAND[:2]], "--workdir is missing"),
        ("tpu_pod", ["train", *POD, *SLICE, "--", "demo", "--workdir=runs/a"], "not lie in /gcs"),
        ("tpu_pod", ["train", *POD, *SLICE, "--", *COMMAND, "--fresh"], "--fresh would throw"),
        ("tpu_pod", ["train", *POD, *SLICE, "--", *COMMAND, "--from-step=3"], "--from-step would"),
        ("tpu_pod", ["start", *POD], "start is none of train, up"),
        ("tpu_pod", ["train", *POD, "--speed=9"], "--speed=9 is not understood"),
        ("tpu_worker", ["setup", "--commit=a"], "--bucket is missing"),
        *(
            ("slurm", [*SLURM[:i], *SLURM[i + 1 :], "--", *SHARED], f"{flag} is missing")
            for i, flag in enumerate(option.split("=")[0] for option in SLURM)
        ),
        ("slurm", [*NODES, "--accelerator=tpu", "--", *SHARED], "there are cuda12 and cuda13"),
        ("slurm", [*SLURM, "--container=x", "--", *SHARED], "--accelerator=cuda13 is for .venv"),
        (
            "slurm",
            [*SLURM, "--", "demo", "--workdir=runs/a"],
            "--workdir=runs/a: give the whole path",
        ),
        ("slurm", [*SLURM, "--array=0-7", "--", *SHARED], "would write into one run directory"),
        ("slurm", ["--array=1-7", *SLURM, "--", *SWEEP], "--array=1-7: a script is run as"),
        ("slurm", ["--array=0-7", *SLURM, "--", *SWEEP], "--nodes=2: each job of an array"),
        ("gke", [JOB[0], *JOB[2:], *TPU, *STORE, "--", *STORED], "--context is missing"),
        ("gke", [*JOB[:2], *JOB[3:], *TPU, *STORE, "--", *STORED], "--namespace is missing"),
        ("gke", [*JOB[:3], JOB[4], *TPU, *STORE, "--", *STORED], "--name is missing"),
        ("gke", [*JOB[:4], *TPU, *STORE, "--", *STORED], "--image is missing"),
        ("gke", [*JOB, *STORE, "--", *STORED], "--tpu or --gpu is missing"),
        ("gke", [*JOB, *TPU, *GPU, *STORE, "--", *STORED], "give one of them"),
        ("gke", [*JOB, TPU[0], TPU[2], *STORE, "--", *STORED], "--topology is missing"),
        ("gke", [*JOB, *TPU[:2], *STORE, "--", *STORED], "--chips-per-host is missing"),
        ("gke", [*JOB, *TPU[:2], "--chips-per-host=5", *STORE, "--", *STORED], "has 64 chips"),
        ("gke", [*JOB, *GPU[:2], *STORE, "--", *STORED], "--gpus-per-node is missing"),
        ("gke", [*JOB, *TPU, "--dry-run", "--", *STORED], "--bucket or --claim is missing"),
        ("gke", [*JOB, *TPU, STORE[0], "--", *STORED], "--service-account is missing"),
        ("gke", [*JOB, *TPU, *STORE, "--", *COMMAND], "does not lie in /store"),
        ("gke", ["build", "--image=i"], "--accelerator is missing"),
        ("tpu_worker", ["start", "--", "true"], "--attempt is missing"),
        ("tpu_worker", ["start", "--attempt=a"], "the command is missing"),
    ],
)
def test_what_is_missing_or_wrong_is_named(script, arguments, says, checkout):
    done = launch(script, *arguments, cwd=checkout)
    assert done.returncode == 1
    assert re.match("error: .*" + re.escape(says), done.stderr), done.stderr


def test_program_tells_a_crash_from_bad_input(tmp_path):
    crash, fine = tmp_path / "crash.py", tmp_path / "fine.py"
    crash.write_text("raise ValueError('broken')")
    fine.write_text("import sys; print(sys.argv[1:]); sys.exit(143)")

    def program(*arguments):
        command = [sys.executable, "launch/program.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    crashed = program(str(crash))
    assert crashed.returncode == 70
    assert "ValueError: broken" in crashed.stderr
    saved = program(str(fine), "a", "b c")
    assert (saved.returncode, saved.stdout) == (143, "['a', 'b c']\n")
    refused = program("tokenizer", "--config=configs/none.py")
    assert refused.returncode == 1
    assert "error: " in refused.stderr
    assert "Traceback" not in refused.stderr


def test_local_says_what_it_would_do(tmp_path):
    lines = dry(
        *("local", "--accelerator=cuda13", "--restarts=2", "--dry-run", "--"),
        *("diffusion", "--config=configs/demo.py", "--config.data.root=/my data"),
        XLA_FLAGS="--mine",
        JAX_COMPILATION_CACHE_DIR="/cache",
    )
    assert lines == [
        "make_environment requirements.txt cuda13",
        "export JAX_PLATFORMS=cuda",
        "export JAX_COMPILATION_CACHE_DIR=/cache",
        "export XLA_FLAGS='--xla_gpu_enable_triton_gemm=false --mine'",
        f"+ {PROGRAM} diffusion --config=configs/demo.py '--config.data.root=/my data'",
        "# again after a crash, up to 2 times, 30 s later",
    ]
    lines = dry("local", "--accelerator=cpu", "--dry-run", "--", "demo", XLA_FLAGS="")
    assert "export XLA_FLAGS=''" in lines
    assert lines[-1] == f"+ {PROGRAM} demo"


@pytest.fixture
def installed(checkout, tmp_path):
    """A checkout whose .venv looks installed and has a fake python; (folder, write the fake)."""
    folder = tmp_path / "installed"
    shutil.copytree(checkout, folder)
    (folder / "requirements.txt").write_text("")
    (folder / ".venv" / "bin").mkdir(parents=True)
    make = "source launch/environment.sh; PYTHON=true make_environment requirements.txt"
    python = folder / ".venv" / "bin" / "python"

    def write(body):
        python.write_text("#!/usr/bin/env bash\n" + body)
        python.chmod(0o755)

    write("echo install $* >>installed")  # what pip would be told
    for accelerator in ("cpu", "tpu"):
        command = ["bash", "-c", f"{make} {accelerator}"]
        environment = os.environ | {"PATH": "/usr/bin:/bin"}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder, write


def test_the_environment_has_the_build_for_the_accelerator(installed):
    folder, _ = installed
    told = (folder / "installed").read_text().splitlines()
    pip = "install -m pip install --quiet --disable-pip-version-check -r requirements.txt"
    assert told == [pip, pip + " jax[tpu]"]
    environment = os.environ | {"PATH": "/usr/bin:/bin", "PYTHON": "true"}
    source = "source launch/environment.sh; make_environment requirements.txt "
    for accelerator, status in (("tpu", 0), ("cuda12", 0), ("cuda12", 0), ("cuda13", 1)):
        command = ["bash", "-c", source + accelerator]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == status
    assert "remove .venv" in done.stderr
    told = (folder / "installed").read_text().splitlines()
    assert told[2:] == [pip + " jax[cuda12]"]


@pytest.mark.parametrize(
    ("statuses", "ends", "calls"),
    [
        ([139, 70, 0], 0, 3),  # crashes, then done
        ([70, 70, 70, 70], 70, 3),  # as often as was allowed
        ([1, 0], 1, 1),  # bad input
        ([143, 0], 143, 1),  # told to stop
    ],
)
def test_local_runs_again_after_a_crash_only(installed, statuses, ends, calls):
    folder, write = installed
    write('read -r s <statuses; sed -i 1d statuses; echo "$*" >>calls; exit "$s"')
    (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    options = ("--accelerator=cpu", "--restarts=2", "--pause=0")
    done = launch("local", *options, "--", "diffusion", "--x=a b", cwd=folder)
    assert done.returncode == ends, done.stderr
    assert (folder / "calls").read_text() == "launch/program.py diffusion --x=a b\n" * calls


def test_local_hands_sigterm_on(installed):
    folder, write = installed
    write("trap 'echo saved >saved; exit 143' TERM; touch began; while :; do sleep 0.05; done")
    options = ("--accelerator=cpu", "--restarts=2", "--pause=0")
    command = ["bash", "launch/local.sh", *options, "--", "diffusion"]
    with subprocess.Popen(command, cwd=folder) as process:
        wait_for(folder / "began")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert (folder / "saved").exists()
