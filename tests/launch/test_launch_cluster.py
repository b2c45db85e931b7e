"""Slurm and GKE: batch script and JobSet, and what a fake Slurm makes of exit statuses."""

import shutil
import subprocess

import pytest
import yaml
from launching import (  # noqa: F401 (fixtures)
    GPU,
    JOB,
    NODES,
    SHARED,
    SLURM,
    STORE,
    STORED,
    SWEEP,
    TPU,
    dry,
    fake_tools,
    its_commit,
    launch,
    small_checkout,
)


def batch_script(*arguments, cwd, **environment):
    """The script that ``slurm.sh --dry-run`` prints, as lines."""
    lines = dry("slurm", "--dry-run", *arguments, cwd=cwd, **environment)
    first = lines.index("+ sbatch <<'END'")
    assert lines[-1] == "END"
    return lines[first + 1 : -1]


def test_slurm_says_what_it_would_do(checkout, commit):
    lines = dry("slurm", "--dry-run", *SLURM, "--", *SHARED, cwd=checkout, XDG_CACHE_HOME="/home/c")
    code = f"/home/c/gae_jax/code/{commit}"
    assert lines[:2] == [
        f"+ git archive {commit} | tar -x -C {code}",
        "make_environment requirements.txt cuda13",
    ]
    options = ("--cpus-per-task=12", "--sbatch=--qos=long", "--sbatch=--exclusive")
    script = batch_script(*SLURM, *options, "--", *SHARED, cwd=checkout, XDG_CACHE_HOME="/home/c")
    assert script[0] == "#!/usr/bin/env bash"
    assert [line[8:] for line in script if line.startswith("#SBATCH ")] == [
        *("--job-name=gae_jax", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=h100:8"),
        *("--partition=gpu", "--account=lab", "--time=9:00", "--signal=TERM@120", "--requeue"),
        *("--open-mode=append", f"--output={checkout}/runs/launch/%x-%j.out"),
        *("--cpus-per-task=12", "--qos=long", "--exclusive"),
    ]
    # sbatch reads its options before the first command
    assert all(line.startswith("#") for line in script[:15])
    step = "srun --mpi=none --kill-on-bad-exit=0 --wait=0 --cpus-per-task=12 "
    step += f"{checkout}/.venv/bin/python launch/program.py"
    flags = "--config=configs/demo.py --workdir=/shared/mine --distributed"
    steps = [line for line in script if line.startswith("srun")]
    assert steps == [f"{step} doctor {flags}", f"{step} diffusion {flags}"]
    assert f"cd {code} || exit 1" in script
    assert f"export GAE_JAX_COMMIT={commit} JAX_PLATFORMS=cuda PYTHONUNBUFFERED=1" in script
    text = "\n".join(script)
    assert "--gpus-per-task" not in text
    assert "gpu-bind" not in text


def test_slurm_runs_in_a_container(checkout, commit):
    image = ("--container=org/image:1", "--skip-doctor")
    script = batch_script(
        *NODES, *image, "--", *SHARED, cwd=checkout, XDG_CACHE_HOME="/c", HOME="/h"
    )
    (step,) = [line for line in script if line.startswith("srun")]
    code = f"/c/gae_jax/code/{commit}"
    assert f"--container-image=org/image:1 --container-workdir={code} " in step
    assert f"--container-mounts={code}:{code},/shared:/shared,/h:/h python launch/" in step


def test_slurm_splits_a_sweep_over_an_array(checkout):
    options = (*NODES[1:], "--nodes=1", "--accelerator=cuda12", "--array=0-7%2")
    script = batch_script(*options, "--", *SWEEP, cwd=checkout)
    assert "#SBATCH --array=0-7%2" in script
    assert "#SBATCH --ntasks-per-node=1" in script
    (step,) = [line for line in script if line.startswith("srun")]
    assert step.endswith(
        f"python launch/program.py {' '.join(SWEEP)} --task=$SLURM_ARRAY_TASK_ID --tasks=8"
    )


SRUN = """
echo "srun ${*: -4:1} $GAE_JAX_COMMIT $XLA_FLAGS ${https_proxy-none}" >>"$CALLS"
case "$*" in *doctor*) exit "${DOCTOR-0}" ;; esac
read -r status <"$STATE/steps"
sed -i 1d "$STATE/steps"
exit "$status"
"""


@pytest.fixture
def submitted(fake, checkout, tmp_path, monkeypatch):
    """run(statuses): (status at the end, calls) of a submitted job, run as often as is asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests' own
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("https_proxy", "http://proxy")
    fake("sbatch", 'cat >"$STATE/script"')
    fake("srun", SRUN)
    fake("scontrol", 'case "$1" in show) echo "JobState=$JOB" ;; *) echo "$*" >>"$CALLS" ;; esac')
    monkeypatch.setenv("JOB", "RUNNING")
    folder = shutil.copytree(checkout, tmp_path / "folder")
    options = (*NODES, "--container=image", "--max-restarts=1")
    done = launch("slurm", *options, "--", *SHARED, cwd=folder)
    assert done.returncode == 0, done.stderr
    calls = tmp_path / "calls"

    def run(*statuses):
        (tmp_path / "steps").write_text("".join(f"{status}\n" for status in statuses))
        for _ in range(10):
            done = subprocess.run(["bash", tmp_path / "script"], capture_output=True, text=True)
            lines = calls.read_text().splitlines()
            if lines[-1] != "requeue 77":
                break
            calls.write_text("\n".join(lines) + "\nagain\n")
        return done.returncode, [line.split()[0] for line in lines], done.stdout + done.stderr

    return run


JOB_ONCE = ["srun", "srun"]  # doctor, command
AGAIN = ["requeue", "again"]


def test_slurm_queues_the_job_again_until_the_command_has_finished(submitted, tmp_path, commit):
    status, calls, text = submitted(143, 143, 134, 0)
    assert status == 0, text
    assert calls == [*JOB_ONCE, *AGAIN] * 3 + JOB_ONCE
    line = f"srun --workdir=/shared/mine {commit} --xla_gpu_enable_triton_gemm=false none"
    found = (tmp_path / "calls").read_text().splitlines()[1]
    assert found.split()[2:] == line.split()[2:]
    code = tmp_path / "cache" / "gae_jax" / "code" / commit
    assert (code / "configs" / "demo.py").exists()
    assert not list((tmp_path / "folder" / "runs" / "launch").glob("*.crashes"))


def test_slurm_does_not_run_bad_input_again(submitted, monkeypatch):
    assert submitted(1)[:2] == (1, JOB_ONCE)
    monkeypatch.setenv("DOCTOR", "1")
    assert submitted(0)[:2] == (1, [*JOB_ONCE, "srun"])


def test_slurm_counts_crashes(submitted):
    status, calls, text = submitted(134, 143, 139)
    assert status == 139
    assert calls == [*JOB_ONCE, *AGAIN] * 2 + JOB_ONCE
    assert "has been queued again 1 times" in text


def test_slurm_leaves_a_cancelled_job_alone(submitted, monkeypatch):
    monkeypatch.setenv("JOB", "CANCELLED")
    assert submitted(143)[:2] == (143, JOB_ONCE)


def jobset(*arguments, cwd):
    return yaml.safe_load(
        "\n".join(dry("gke", *JOB, *arguments, "--dry-run", "--", *STORED, cwd=cwd))
    )


def test_gke_makes_a_jobset_of_tpu_slices(checkout):
    made = jobset(*TPU, *STORE, "--num-slices=2", "--spot", "--grace=25", cwd=checkout)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    failure = made["spec"]["failurePolicy"]
    assert failure["maxRestarts"] == 5
    (rule,) = failure["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (workers,) = made["spec"]["replicatedJobs"]
    assert (workers["name"], workers["replicas"]) == ("workers", 2)
    job = workers["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (16, 16, 0)
    assert job["completionMode"] == "Indexed"
    assert job["podFailurePolicy"]["rules"] == [
        {
            "action": "FailJob",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "gae-jax", "operator": "In", "values": [143]},
        },
    ]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 25
    assert pod["serviceAccountName"] == "writer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["name"] == "gae-jax"
    assert container["image"] == "my-image"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    flags = "--config=configs/demo.py --workdir=/store/mine --distributed"
    assert container["args"][0].splitlines() == [
        "set -e",
        f"python launch/program.py doctor {flags}",
        f"exec python launch/program.py diffusion {flags}",
    ]
    assert {"name": "JAX_PLATFORMS", "value": "tpu"} in container["env"]
    volume = pod["volumes"][0]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert container["volumeMounts"][0] == {"name": volume["name"], "mountPath": "/store"}


def test_gke_makes_a_jobset_of_gpu_nodes(checkout):
    made = jobset(*GPU, "--claim=disk", "--queue=lab", "--skip-doctor", cwd=checkout)
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "lab"}
    assert "annotations" not in made["metadata"]
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (3, 3)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert pod["terminationGracePeriodSeconds"] == 120
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "doctor" not in container["args"][0]
    environment = {entry["name"]: entry for entry in container["env"]}
    told = {name: entry.get("value") for name, entry in environment.items()}
    assert told["JAX_COORDINATOR_ADDRESS"] == "job-workers-0-0.job:8476"
    assert told["JAX_NUM_PROCESSES"] == "3"
    assert told["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=false"
    field = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert "job-completion-index" in field


def test_gke_builds_submits_and_looks(checkout, commit, fake, tmp_path):
    lines = dry(
        *("gke", "build", "--image=my-image", "--accelerator=tpu", "--dry-run"), cwd=checkout
    )
    assert lines == [
        (
            f"+ git archive {commit} | docker build --build-arg ACCELERATOR=tpu "
            f"--build-arg COMMIT={commit} --file launch/Dockerfile --tag my-image -"
        ),
        "+ docker push my-image",
    ]
    fake("kubectl", 'echo "$*" >>"$CALLS"; [ "$3" != create ] || cat >"$STATE/yaml"')
    fake("gcloud", 'echo "${FLAT-True}"')
    done = launch("gke", *JOB, *TPU, *STORE, "--", *STORED, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "yaml").read_text())["metadata"]["name"] == "job"
    for verb in ("status", "logs", "delete"):
        assert launch("gke", verb, *JOB[1:4], cwd=checkout).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.startswith("--context=cluster --namespace=lab ") for call in calls)
    assert [call.split()[2] for call in calls] == ["create", "get", "get", "logs", "delete"]
    done = launch("gke", *JOB, *TPU, *STORE, "--", *STORED, cwd=checkout, FLAT="False")
    assert done.returncode == 1
    assert "my-bucket has no hierarchical namespace" in done.stderr
