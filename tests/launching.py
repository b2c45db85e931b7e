"""What the tests of the launch scripts share: arguments, calls, fakes of tools and a checkout.

A test module that imports the fixtures below has them under their names.
"""

import os
import shutil
import subprocess
import time

import pytest
from conftest import ROOT

POD = ("--project=my-project", "--zone=us-west4-a", "--name=pod")
SLICE = ("--bucket=my-bucket", "--accelerator-type=v5litepod-64", "--runtime-version=v2-tpu")
NODES = ("--nodes=2", "--gpus-per-node=h100:8", "--partition=gpu", "--account=lab", "--time=9:00")
SLURM = (*NODES, "--accelerator=cuda13")
SHARED = ("diffusion", "--config=configs/demo.py", "--workdir=/shared/mine")
SWEEP = ("launch/sweep.py", "configs/sweeps/lambda_sp.py", "--workdir=/shared/sweep")
JOB = ("submit", "--context=cluster", "--namespace=lab", "--name=job", "--image=my-image")
TPU = ("--tpu=tpu-v5-lite-podslice", "--topology=8x8", "--chips-per-host=4")
GPU = ("--gpu=nvidia-h100-80gb", "--nodes=3", "--gpus-per-node=8")
STORE = ("--bucket=my-bucket", "--service-account=writer")
STORED = ("diffusion", "--config=configs/demo.py", "--workdir=/store/mine")
COMMAND = ("diffusion", "--config=configs/demo.py", "--workdir=/gcs/runs/mine")
PROGRAM = ".venv/bin/python launch/program.py"


def launch(script, *arguments, cwd=ROOT, **environment):
    """The finished process of ``bash launch/SCRIPT.sh ARGUMENT ...``."""
    return subprocess.run(
        ["bash", "launch/" + script + ".sh", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(script, *arguments, **more):
    """The lines that ``--dry-run`` prints."""
    done = launch(script, *arguments, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(name="fake")
def fake_tools(tmp_path, monkeypatch):
    """fake(name, body) puts a bash script on PATH; it can write its calls to $CALLS."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("STATE", str(tmp_path))

    def write(name, body):
        path = folder / name
        path.write_text("#!/usr/bin/env bash\n" + body)
        path.chmod(0o755)
        return path

    return write


@pytest.fixture(name="checkout", scope="module")
def small_checkout(tmp_path_factory):
    """The launch scripts and a config in a git repository of their own, all committed."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "requirements.txt", folder)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture(name="commit", scope="module")
def its_commit(checkout):
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True)
    return found.stdout.decode().strip()


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come to be")
