#!/usr/bin/env bash
# Runs gae_jax on a TPU pod of VMs, through queued resources of gcloud.
#
# usage: bash launch/tpu_pod.sh train  POD SLICE [OPTION ...] -- COMMAND [ARGUMENT ...]
#        bash launch/tpu_pod.sh up     POD SLICE [OPTION ...]
#        bash launch/tpu_pod.sh run    POD --bucket=B [OPTION ...] -- COMMAND [ARGUMENT ...]
#        bash launch/tpu_pod.sh status | stop | down  POD
#        bash launch/tpu_pod.sh logs | ssh  POD [--worker=W] [--slice=I]
#
#   train                 up and run; when the pod is preempted: delete it, queue it again and go
#                         on, until the command has finished; then delete the pod
#   up                    queue the pod, wait until it is there, bring code and bucket to all hosts
#   run                   doctor, then the command, on all hosts of a pod that is up; once
#   stop                  SIGTERM to the command on all hosts: it saves a checkpoint and ends
#   status, logs, ssh     what the pod is; the log of one host; a shell on one host
#   down                  delete the pod
#
#   COMMAND               of gae_jax, with --config=FILE and --workdir=/gcs/...; --distributed is
#                         added. Its options must do for being run again and again
# POD, needed by all:
#   --project=P           the Google Cloud project
#   --zone=Z              its zone, e.g. where you have quota
#   --name=N              name of the queued resource
# SLICE:
#   --bucket=B            mounted at /gcs on all hosts; with a hierarchical namespace
#   --accelerator-type=T  e.g. v5litepod-64
#   --runtime-version=R   of the VMs, e.g. v2-alpha-tpuv5-lite
# options:
#   --num-slices=N        so many slices of this type, joined over the network (default: 1)
#   --spot                preemptible, at a lower price; else on demand
#   --service-account=S   of the VMs, which must be allowed to write to the bucket
#   --network=N --subnetwork=S  of the VMs
#   --allow-dirty         run uncommitted changes of tracked files too
#   --skip-doctor         do not check the hosts first
#   --max-restarts=N      give up after so many crashes on a healthy pod (default: 5); preemptions
#                         do not count
#   --keep                leave the pod when the command has ended; it costs money until `down`
#   --log=FILE            what the hosts print (default: runs/launch/NAME.log)
#   --worker=W --slice=I  for logs and ssh (default: 0 and 0)
#   --dry-run             print the commands in order, as if each went well
#   --help                this text
#
# The code is that of the commit that is checked out. Before it runs, gcloud's ssh key must be in
# the ssh agent: ssh-add ~/.ssh/google_compute_engine.
# Environment: GAE_JAX_POLL_SECONDS, between two questions about the pod (default: 30).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

poll=${GAE_JAX_POLL_SECONDS:-30}
mount=/gcs
project='' zone='' name='' bucket='' type='' runtime='' slices=1 spot='' account='' network=''
subnetwork='' dirty='' skip_doctor='' max_restarts=5 keep='' log='' worker=0 slice=0
mode=${1:---help}
shift || true
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) mode=--help ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --accelerator-type=*) type=${1#*=} ;;
    --runtime-version=*) runtime=${1#*=} ;;
    --num-slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --service-account=*) account=${1#*=} ;;
    --network=*) network=${1#*=} ;;
    --subnetwork=*) subnetwork=${1#*=} ;;
    --allow-dirty) dirty=1 ;;
    --skip-doctor) skip_doctor=1 ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --keep) keep=1 ;;
    --log=*) log=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --slice=*) slice=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "$1 is not understood; the command goes behind --; see: bash launch/tpu_pod.sh --help" ;;
  esac
  shift
done

say() {
  echo "tpu_pod: $(date +%H:%M:%S) $*" >&2
}

queued() { # VERB [FLAG ...]
  do_it gcloud compute tpus queued-resources "$1" "$name" --project="$project" --zone="$zone" "${@:2}"
}

vm() { # VERB NODE [FLAG ...]
  do_it gcloud compute tpus tpu-vm "$1" "$2" --project="$project" --zone="$zone" "${@:3}"
}

nodes() {
  local index
  if [ "$slices" = 1 ]; then
    echo "$name"
  else
    for ((index = 0; index < slices; index++)); do echo "$name-$index"; done
  fi
}

# answer COMMAND...: its last line; NONE for what is not there, UNKNOWN if gcloud cannot tell.
answer() {
  local said
  if said=$("$@" 2>"$scratch/error"); then
    echo "$said" | tail -n 1
  elif grep -q NOT_FOUND "$scratch/error"; then
    echo NONE
  else
    cat "$scratch/error" >&2
    echo UNKNOWN
  fi
}

state() {
  answer queued describe --format='value(state.state)'
}

# healthy: are the queued resource and all its nodes there? Asks until there is an answer, as a
# pod that is only out of reach must not be deleted.
healthy() {
  local node now
  while now=$(state) && [ "$now" = UNKNOWN ]; do sleep "$poll"; done
  [ "$now" = ACTIVE ] || return 1
  for node in $(nodes); do # the node of a preempted pod may tell so before its queued resource
    while now=$(answer vm describe "$node" --format='value(state)') && [ "$now" = UNKNOWN ]; do
      sleep "$poll"
    done
    [ "$now" = READY ] || return 1
  done
}

create() {
  local flags=(--accelerator-type="$type" --runtime-version="$runtime")
  if [ "$slices" = 1 ]; then
    flags+=(--node-id="$name")
  else
    flags+=(--node-count="$slices" --node-prefix="$name")
  fi
  [ -z "$spot" ] || flags+=(--spot)
  [ -z "$network" ] || flags+=(--network="$network")
  [ -z "$subnetwork" ] || flags+=(--subnetwork="$subnetwork")
  [ -z "$account" ] || flags+=(--service-account="$account")
  # the bucket is written with the VM's own account
  flags+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  queued create "${flags[@]}" || die "gcloud did not take the request, see above"
}

down() {
  queued delete --force --quiet || true # asked below
  [ -z "$dry_run" ] || return 0
  while :; do
    case "$(state)" in
      NONE) return ;;
      UNKNOWN | DELETING | SUSPENDING) ;;
      *) queued delete --force --quiet || true ;;
    esac
    sleep "$poll"
  done
}

# wait_for_pod: queues the pod unless it is there, and waits until it is ACTIVE. Ends with 1 where
# it fails or is suspended.
wait_for_pod() {
  local now before=
  if [ -n "$dry_run" ]; then
    create
    queued describe --format='value(state.state)'
    echo "# again every $poll s until it says ACTIVE"
    return
  fi
  while :; do
    now=$(state)
    [ "$now" = "$before" ] || say "$name: $now"
    case "$now" in
      NONE) create ;;
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) return 1 ;;
    esac
    before=$now
    sleep "$poll"
  done
}

# on_all_hosts COMMAND: the status of the first slice on which it failed.
on_all_hosts() {
  local node pids=() pid status=0
  for node in $(nodes); do
    if [ -n "$dry_run" ] || [ "$slices" = 1 ]; then
      vm ssh "$node" --worker=all --command="$1" || status=$?
    else
      vm ssh "$node" --worker=all --command="$1" &
      pids+=("$!")
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || status=$?
  done
  return "$status"
}

# in_code COMMAND...: what a host runs, in the folder of this commit.
in_code() {
  echo "cd gae_jax-$commit && GAE_JAX_COMMIT=$commit $(quoted "$@")"
}

# prepare: code, environment and bucket on all hosts; ends with 1 unless all of them say so.
prepare() {
  local node archive=gae_jax-$commit.tar.gz hosts=0 ready unpack
  if [ -n "$dry_run" ]; then
    echo "+ git archive --format=tar.gz --output=$archive $tree"
  else
    git archive --format=tar.gz --output="$scratch/$archive" "$tree" || die "git archive failed, see above"
    archive=$scratch/$archive
  fi
  for node in $(nodes); do
    vm scp "$archive" "$node:" --worker=all || return 1
    ready=$(vm describe "$node" --format='value(networkEndpoints.len())') || return 1
    if [ -n "$dry_run" ]; then echo "$ready"; else hosts=$((hosts + ready)); fi
  done
  unpack="mkdir -p gae_jax-$commit && tar -xzf gae_jax-$commit.tar.gz -C gae_jax-$commit"
  on_all_hosts "$unpack && $(in_code bash launch/tpu_worker.sh setup --bucket="$bucket" --commit="$commit")" \
    >"$scratch/setup" 2>&1 || { cat "$scratch/setup" >&2 && return 1; }
  cat "$scratch/setup"
  [ -z "$dry_run" ] || return 0
  ready=$(grep -c "tpu_worker: .* is ready with $commit" "$scratch/setup") || true
  if [ "$ready" != "$hosts" ]; then
    say "$ready of $hosts hosts are ready with $commit"
    return 1
  fi
  say "$hosts hosts are ready with $commit"
}

# on_hosts ID COMMAND...: starts a program on all hosts, or shows the rest of its output if it was
# started under this name before.
on_hosts() {
  on_all_hosts "$(in_code bash launch/tpu_worker.sh start --attempt="$1" -- \
    .venv/bin/python launch/program.py "${@:2}")"
}

# attempt ID COMMAND...: the same with a log. Ends with 1 if any host ended with 1, with 143 if any
# ended with 143, else as gcloud did: 255 where the connection broke.
attempt() {
  local status=0 output=$scratch/output hosts
  set -m # a group of its own, to end with all that it started
  on_hosts "$@" 2>&1 | tee -a "$log" "$output.new" &
  hosts=$(jobs -p %%)
  set +m
  trap 'kill -- "-$hosts"; say "stopped to look on; the pod and the command on it go on: bash launch/tpu_pod.sh stop, down"; exit 130' INT TERM
  wait %% || status=$?
  trap - INT TERM
  mv "$output.new" "$output"
  [ "$status" = 0 ] || ! grep -q 'tpu_worker: .* ended with status 143$' "$output" || status=143
  [ "$status" = 0 ] || ! grep -q 'tpu_worker: .* ended with status 1$' "$output" || status=1
  return "$status"
}

# run_once ID: doctor and command.
run_once() {
  if [ -n "$dry_run" ]; then
    [ -n "$skip_doctor" ] || on_hosts "$1-doctor" "${doctor[@]}"
    on_hosts "$1" "${program[@]}"
    return
  fi
  [ -n "$skip_doctor" ] || attempt "$1-doctor" "${doctor[@]}" || return
  attempt "$1" "${program[@]}"
}

# new_id: a name that no host has had an attempt of.
new_id() {
  if [ -n "$dry_run" ]; then echo TIME; else date +%Y%m%d-%H%M%S; fi
}

train() {
  local crashes=0 status id
  id=$(new_id)
  while :; do
    status=lost
    if wait_for_pod && prepare; then
      status=0
      run_once "$id" || status=$?
    fi
    case "$status" in
      0 | 1 | 2 | 130) break ;; # finished, bad input, stopped
    esac
    sleep "$poll"
    if healthy; then
      case "$status" in
        255) say "the connection broke; goes on to look on" && continue ;; # under the same id
        143) say "the hosts were told to stop, and the pod is still there; goes on" ;;
        *)
          crashes=$((crashes + 1))
          say "ended with status $status on a healthy pod, $crashes of at most $max_restarts"
          ;;
      esac
    else
      say "$name is gone; queued again"
      if [ "$(state)" = FAILED ]; then # a request that cannot be met would fail for ever
        queued describe >&2
        crashes=$((crashes + 1))
      fi
      down
    fi
    if [ "$crashes" -gt "$max_restarts" ]; then
      say "gives up after $max_restarts restarts"
      break
    fi
    id=$(new_id)
  done
  if [ -n "$keep" ]; then
    say "$name is still up and costs money; bash launch/tpu_pod.sh down deletes it"
  else
    down
  fi
  case "$status" in lost) return 70 ;; *) return "$status" ;; esac
}

need_slice() {
  need --accelerator-type "$type" "which TPU, e.g. v5litepod-64; see: gcloud compute tpus accelerator-types list"
  need --runtime-version "$runtime" "the software of the VMs, e.g. v2-alpha-tpuv5-lite"
}

if [ "$mode" = --help ] || [ "$mode" = -h ]; then
  usage_of launch/tpu_pod.sh
  exit
fi
need --project "$project" "the Google Cloud project"
need --zone "$zone" "the zone of the TPUs"
need --name "$name" "a name for the queued resource"
need_number --num-slices "$slices" 1
need_number --max-restarts "$max_restarts"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
case "$mode" in
  train | run)
    check_program "$@"
    is_script "$@" && die "$1: only commands of gae_jax run on a pod"
    check_workdir "$mount" "$@"
    distribute "$@"
    ;;
esac
case "$mode" in
  train | up | run)
    find_commit "$dirty"
    check_config "$@"
    [ "$mode" = run ] || need_slice
    need --bucket "$bucket" "a bucket for runs, with a hierarchical namespace"
    bucket=${bucket#gs://}
    check_bucket "$bucket" --project="$project"
    log=${log:-runs/launch/$name.log}
    [ -n "$dry_run" ] || mkdir -p "$(dirname "$log")"
    ;;
esac
node=$name
[ "$slices" = 1 ] || node=$name-$slice
case "$mode" in
  train) train ;;
  up) wait_for_pod && prepare ;;
  run) prepare && run_once "$(new_id)" ;;
  status) queued describe ;;
  stop) on_all_hosts "for code in gae_jax-*/; do bash \"\$code/launch/tpu_worker.sh\" stop; done" ;;
  logs) vm ssh "$node" --worker="$worker" --command='tail -n 100 -F gae_jax-runs/latest/log' ;;
  ssh) vm ssh "$node" --worker="$worker" ;;
  down) down ;;
  *) die "$mode is none of train, up, run, status, stop, logs, ssh, down; see: bash launch/tpu_pod.sh --help" ;;
esac
