"""TPU pods: notices of preemption, attempts of a worker, the loop against a fake gcloud."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT
from launching import (  # noqa: F401 (fixtures)
    COMMAND,
    POD,
    PROGRAM,
    SLICE,
    dry,
    fake_tools,
    its_commit,
    launch,
    small_checkout,
    wait_for,
)

# a program that saves and ends with 143 when it is told to; begins with $STATE/began
TRAINING = """
trap 'echo saved >>"$CALLS"; exit 143' TERM
echo step; touch "$STATE/began"
while :; do sleep 0.05; done
"""
# answers the first key after the program has begun, keeps the others waiting
NOTICE = """
url=${!#}
echo "$url" >>"$STATE/urls"
case "$url" in
  *%s\\?*) while [ ! -e "$STATE/began" ]; do sleep 0.05; done; echo %s ;;
  *) sleep 60 ;;
esac
"""


@pytest.mark.parametrize(
    ("key", "value"),
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_notice_becomes_sigterm_and_the_status_is_passed_on(fake, tmp_path, key, value):
    fake("curl", NOTICE % (key, value))
    fake("train", TRAINING)
    done = launch("tpu_worker", "watch", "--", "train", GAE_JAX_METADATA="http://fake")
    assert done.returncode == 143, done.stderr
    assert (tmp_path / "calls").read_text() == "saved\n"
    assert f"was told {key}={value}" in done.stdout
    urls = (tmp_path / "urls").read_text().split()
    assert f"http://fake/{key}?wait_for_change=true&timeout_sec=60&last_etag=0" in urls


def test_nothing_is_sent_without_a_notice(fake, tmp_path):
    fake(
        "curl",
        """
        while [ "$1" != --dump-header ]; do shift; done
        echo "ETag: 7d" >"$2"
        echo "${!#}" >>"$STATE/urls"
        [ $(grep -c maintenance "$STATE/urls") -lt 4 ] || sleep 60
        case "${!#}" in *maintenance*) echo NONE ;; *) sleep 60 ;; esac
        """,
    )
    fake(
        "train", "while [ $(grep -c last_etag=7d $STATE/urls) -lt 2 ]; do sleep 0.05; done; exit 3"
    )
    done = launch("tpu_worker", "watch", "--", "train", GAE_JAX_POLL_SECONDS="0.05")
    assert done.returncode == 3, done.stderr
    assert "was told" not in done.stdout


@pytest.fixture
def worker(fake, tmp_path):
    fake("curl", "exit 7")
    environment = {"GAE_JAX_RUNS": str(tmp_path / "attempts"), "GAE_JAX_POLL_SECONDS": "0.2"}
    return lambda *arguments: launch("tpu_worker", *arguments, **environment)


def test_a_second_call_of_an_attempt_starts_nothing(worker, fake, tmp_path):
    fake("train", 'echo "$*" >>"$CALLS"; echo step; exit 5')
    for _ in range(2):
        done = worker("start", "--attempt=one", "--", "train", "a b")
        assert done.returncode == 5
        assert "step" in done.stdout
        assert re.search(r"tpu_worker: \S+ ended with status 5$", done.stdout.strip())
    assert (tmp_path / "calls").read_text() == "a b\n"


def test_a_new_attempt_stops_what_an_earlier_one_left(worker, fake, tmp_path):
    fake("train", TRAINING)
    fake("next", 'echo next >>"$CALLS"')
    environment = os.environ | {"GAE_JAX_RUNS": str(tmp_path / "attempts")}
    command = ["bash", "launch/tpu_worker.sh", "start", "--attempt=one", "--", "train"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        wait_for(tmp_path / "began")
        process.kill()  # the connection breaks
    done = worker("start", "--attempt=two", "--", "next")
    assert done.returncode == 0, done.stderr
    assert "stops attempt one" in done.stdout
    assert (tmp_path / "calls").read_text() == "saved\nnext\n"
    assert (tmp_path / "attempts" / "one" / "status").read_text() == "143\n"


def test_pod_says_what_it_would_do(checkout, commit):
    lines = dry(
        *("tpu_pod", "train", *POD, *SLICE, "--spot", "--dry-run", "--", *COMMAND),
        *("--config.data.root=/gcs/my data",),
        cwd=checkout,
    )
    where = "--project=my-project --zone=us-west4-a"
    code = f"cd gae_jax-{commit} && GAE_JAX_COMMIT={commit} bash launch/tpu_worker.sh"
    told = "--config=configs/demo.py --workdir=/gcs/runs/mine "
    told += "'\\''--config.data.root=/gcs/my data'\\'' --distributed"
    ssh = f"+ gcloud compute tpus tpu-vm ssh pod {where} --worker=all "
    unpack = f"mkdir -p gae_jax-{commit} && tar -xzf gae_jax-{commit}.tar.gz -C gae_jax-{commit}"
    assert lines == [
        (
            "+ gcloud storage buckets describe gs://my-bucket --project=my-project --raw "
            "'--format=value(hierarchicalNamespace.enabled)'"
        ),
        (
            f"+ gcloud compute tpus queued-resources create pod {where} "
            "--accelerator-type=v5litepod-64 --runtime-version=v2-tpu --node-id=pod --spot "
            "--scopes=https://www.googleapis.com/auth/cloud-platform"
        ),
        (
            f"+ gcloud compute tpus queued-resources describe pod {where} "
            "'--format=value(state.state)'"
        ),
        "# again every 30 s until it says ACTIVE",
        f"+ git archive --format=tar.gz --output=gae_jax-{commit}.tar.gz {commit}",
        f"+ gcloud compute tpus tpu-vm scp gae_jax-{commit}.tar.gz {where} pod: --worker=all",
        (
            f"+ gcloud compute tpus tpu-vm describe pod {where} "
            "'--format=value(networkEndpoints.len())'"
        ),
        f"{ssh}'--command={unpack} && {code} setup --bucket=my-bucket --commit={commit}'",
        f"{ssh}'--command={code} start --attempt=TIME-doctor -- {PROGRAM} doctor {told}'",
        f"{ssh}'--command={code} start --attempt=TIME -- {PROGRAM} diffusion {told}'",
        f"+ gcloud compute tpus queued-resources delete pod {where} --force --quiet",
    ]


def test_several_slices_have_their_nodes(checkout):
    options = ("--num-slices=2", "--keep", "--skip-doctor", "--dry-run")
    text = "\n".join(dry("tpu_pod", "train", *POD, *SLICE, *options, "--", *COMMAND, cwd=checkout))
    assert "--node-count=2 --node-prefix=pod " in text
    assert "--spot" not in text
    assert "delete" not in text
    assert "doctor" not in text
    for verb in ("scp", "describe", "ssh"):
        found = re.findall(rf"tpu-vm {verb} .*?\bpod-(\d)", text)
        assert found == ["0", "1"] * (2 if verb == "ssh" else 1)


def test_only_what_git_knows_is_run(checkout, tmp_path):
    folder = shutil.copytree(checkout, tmp_path / "dirty")
    (folder / "configs" / "mine.py").write_text("")
    mine = ("diffusion", "--config=configs/mine.py:B", "--workdir=/gcs/mine")
    train = ("tpu_pod", "train", *POD, *SLICE, "--dry-run")
    done = launch(*train, "--", *mine, cwd=folder)
    assert done.returncode == 1
    assert "--config=configs/mine.py:B: git does not know this file" in done.stderr
    (folder / "configs" / "demo.py").write_text("changed = True")
    done = launch(*train, "--", *COMMAND, cwd=folder)
    assert done.returncode == 1
    assert "uncommitted changes" in done.stderr
    lines = dry(*train, "--allow-dirty", "--", *COMMAND, cwd=folder)
    tree = next(line for line in lines if "git archive" in line).split()[-1]
    show = ["git", "show", f"{tree}:configs/demo.py"]
    assert subprocess.run(show, cwd=folder, capture_output=True).stdout == b"changed = True"


# gcloud as it answers the loop: the state of the pod is in $STATE/pod; `steps` has a line for each
# run of the command: its exit status, and what becomes of the pod or its node afterwards.
GCLOUD = r"""
echo "$*" >>"$CALLS"
commit=$(git rev-parse HEAD)
case "$*" in
  *buckets*) echo "${FLAT-True}" ;;
  *queued-resources\ create*) echo WAITING_FOR_RESOURCES >"$STATE/pod" ;;
  *queued-resources\ delete*) rm -f "$STATE/pod" ;;
  *queued-resources\ describe*)
    [ ! -e "$STATE/offline" ] || { rm "$STATE/offline"; echo "ERROR: no network" >&2; exit 1; }
    [ -e "$STATE/pod" ] || { echo "ERROR: NOT_FOUND: no pod" >&2; exit 1; }
    cat "$STATE/pod"
    case "$(cat "$STATE/pod")" in
      WAITING*) echo PROVISIONING >"$STATE/pod" ;;
      PROVISIONING) echo ACTIVE >"$STATE/pod" ;;
    esac ;;
  *tpu-vm\ describe*networkEndpoints*) echo 2 ;;
  *tpu-vm\ describe*) cat "$STATE/node" 2>/dev/null || echo READY ;;
  *launch/tpu_worker.sh\ setup*)
    for host in $HOSTS; do echo "tpu_worker: $host is ready with $commit"; done ;;
  *program.py\ doctor*) echo "tpu_worker: w-0 ended with status 0" ;;
  *program.py*)
    read -r status after <"$STATE/steps"
    sed -i 1d "$STATE/steps"
    case "$after" in
      '') ;;
      offline) touch "$STATE/offline" ;;
      PREEMPTED) echo "$after" >"$STATE/node" ;;
      *) echo "$after" >"$STATE/pod" ;;
    esac
    [ "$status" = 255 ] || echo "tpu_worker: w-1 ended with status $status"
    # gcloud ends as the first host that failed, which need not be the one with the cause
    [ "$status" = 1 ] && exit 134
    exit "$status" ;;
esac
"""


@pytest.fixture
def train(fake, checkout, tmp_path, monkeypatch):
    """train(steps, ...): (status, what gcloud was told in short, what was printed)."""
    fake("gcloud", GCLOUD)
    monkeypatch.setenv("GAE_JAX_POLL_SECONDS", "0.01")
    monkeypatch.setenv("HOSTS", "w-0 w-1")
    names = {"queued-resources create": "create", "queued-resources delete": "delete"}
    names |= {"tpu_worker.sh setup": "setup", "program.py doctor": "doctor"}
    names |= {"program.py diffusion": "run"}

    def start(*steps, options=()):
        (tmp_path / "steps").write_text("".join(f"{step}\n" for step in steps))
        log = f"--log={tmp_path}/log/pod.log"
        done = launch("tpu_pod", "train", *POD, *SLICE, log, *options, "--", *COMMAND, cwd=checkout)
        calls = (tmp_path / "calls").read_text().splitlines()
        short = [name for call in calls for part, name in names.items() if part in call]
        return done.returncode, short, done.stdout + done.stderr

    return start


ONCE = ["create", "setup", "doctor", "run"]


def test_a_preempted_pod_is_queued_again_until_the_command_has_finished(train, tmp_path):
    status, calls, text = train("143 SUSPENDED", "255 SUSPENDED", "0")
    assert status == 0, text
    assert calls == [*ONCE, "delete", *ONCE, "delete", *ONCE, "delete"]
    assert "tpu_worker: w-1 ended with status 143" in (tmp_path / "log" / "pod.log").read_text()
    assert "2 hosts are ready" in text


def test_a_preempted_node_is_seen_while_its_request_is_active(train):
    status, calls, text = train("143 PREEMPTED", "0")
    assert status == 0, text
    assert calls == [*ONCE, "delete", *ONCE, "delete"]


@pytest.mark.parametrize("after", ["", "offline"])
def test_a_pod_that_is_there_is_not_given_away(train, after):
    status, calls, text = train(f"143 {after}", "0")
    assert status == 0, text
    assert calls == [*ONCE, "setup", "doctor", "run", "delete"]
    assert ("no network" in text) == bool(after)


def test_a_request_that_always_fails_is_given_up(train, fake):
    failing = "*queued-resources\\ create*) echo FAILED"
    fake(
        "gcloud", GCLOUD.replace("*queued-resources\\ create*) echo WAITING_FOR_RESOURCES", failing)
    )
    status, calls, text = train(options=["--max-restarts=2"])
    assert status == 70, text
    assert calls.count("create") == 3
    assert "run" not in calls


def test_a_broken_connection_only_looks_on_again(train, tmp_path):
    status, calls, text = train("255", "0")
    assert status == 0, text
    assert calls == [*ONCE, "setup", "doctor", "run", "delete"]
    attempts = re.findall(r"--attempt=(\S+) -- \S+ \S+ diffusion", (tmp_path / "calls").read_text())
    assert len(attempts) == 2
    assert len(set(attempts)) == 1


def test_bad_input_is_not_run_again(train):
    status, calls, text = train("1", "0", options=["--keep"])
    assert status == 1
    assert calls == ONCE
    assert "still up and costs money" in text


def test_crashes_on_a_healthy_pod_are_counted(train):
    status, calls, text = train("70", "134", "139", options=["--max-restarts=1"])
    assert status == 134
    assert calls.count("run") == 2
    assert calls[-1] == "delete"
    assert "gives up after 1 restarts" in text


def test_a_missing_host_keeps_the_command_from_running(train, monkeypatch):
    monkeypatch.setenv("HOSTS", "w-0")
    status, calls, text = train("0", options=["--max-restarts=1"])
    assert status == 70
    assert "run" not in calls
    assert "1 of 2 hosts are ready" in text


def test_a_flat_bucket_is_refused(train, monkeypatch):
    monkeypatch.setenv("FLAT", "")
    status, calls, text = train("0")
    assert (status, calls) == (1, [])
    assert "my-bucket has no hierarchical namespace" in text
    assert "--enable-hierarchical-namespace" in text


# Here gcloud runs what it is told on a host that is a folder, with a fake uv, gcsfuse and python.
HOST = r"""
home=$STATE/home command=${!#}
mkdir -p "$home"
case "$*" in
  *tpu-vm\ scp*) cp "$5" "$home" ;;
  *networkEndpoints*) echo 1 && exit ;;
  *tpu-vm\ ssh*) cd "$home" && HOME=$home exec bash -c "${command#--command=}" ;;
esac
"""
# once a run has begun, the host is told to stop; the second run finishes
PYTHON = r"""#!/usr/bin/env bash
echo "$(basename "$PWD") $GAE_JAX_COMMIT $JAX_PLATFORMS ${*@Q}" >>"$CALLS"
[ "$2" = diffusion ] && [ ! -e "$STATE/began" ] || exit 0
trap "exit 143" TERM
touch "$STATE/began"
while :; do sleep 0.05; done
"""
ONE_NOTICE = """
while [ ! -e "$STATE/began" ]; do sleep 0.05; done
mkdir "$STATE/told" || sleep 60
case "${!#}" in *preempted*) echo TRUE ;; *) echo TERMINATE_ON_HOST_MAINTENANCE ;; esac
"""
UV = r"""
[ "$1" != venv ] || { mkdir -p .venv/bin; cp "$STATE/python" .venv/bin/python; }
"""


def test_what_a_host_is_told_works_there(train, fake, tmp_path, commit, monkeypatch):
    fake("gcloud", HOST + GCLOUD)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    fake("uv", UV)
    fake("sudo", "")
    fake("gcsfuse", 'echo "gcsfuse $*" >>"$CALLS"')
    fake("mountpoint", "exit 1")
    fake("curl", ONE_NOTICE)
    monkeypatch.delenv("JAX_PLATFORMS")
    status, _, text = train("", options=["--max-restarts=0"])
    assert status == 0, text
    calls = (tmp_path / "calls").read_text().splitlines()
    mounts = [call for call in calls if call.startswith("gcsfuse")]
    ttl = "--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
    assert set(mounts) == {f"gcsfuse {ttl} my-bucket /gcs"}
    runs = [call for call in calls if call.startswith("gae_jax-")]
    flags = " ".join(f"'{flag}'" for flag in (*COMMAND[1:], "--distributed"))
    line = f"gae_jax-{commit} {commit} tpu 'launch/program.py' "
    assert runs == [f"{line}'{name}' {flags}" for name in ("doctor", "diffusion")] * 2
    assert text.count("SIGTERM to the program") == 1
