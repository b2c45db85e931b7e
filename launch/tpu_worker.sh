#!/usr/bin/env bash
# Runs on each VM of a TPU pod; launch/tpu_pod.sh calls it there.
#
# usage: bash launch/tpu_worker.sh setup --bucket=B --commit=C
#        bash launch/tpu_worker.sh start --attempt=ID -- COMMAND [ARGUMENT ...]
#        bash launch/tpu_worker.sh watch [--folder=DIR] -- COMMAND [ARGUMENT ...]
#        bash launch/tpu_worker.sh stop
#
#   setup                 make .venv and mount the bucket at /gcs
#   start                 stop what an earlier attempt left, start the command so that it outlives
#                         this connection, show its log and end with its exit status. If this
#                         attempt was started before, only the rest: gcloud calls a command again
#                         when the connection breaks, and no host may run a second copy
#   watch                 run the command here; send it SIGTERM when the metadata server tells of
#                         maintenance or preemption; end with its exit status
#   stop                  SIGTERM to what runs, SIGKILL after a minute
#   --help                this text
#
# Environment: GAE_JAX_METADATA (the metadata server's URL of this instance), GAE_JAX_RUNS (where
# attempts keep log, pid and status; default ~/gae_jax-runs), GAE_JAX_POLL_SECONDS (default 5),
# GAE_JAX_STOP_SECONDS (default 60), GAE_JAX_MOUNT (default /gcs).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh

metadata=${GAE_JAX_METADATA:-http://metadata.google.internal/computeMetadata/v1/instance}
runs=${GAE_JAX_RUNS:-$HOME/gae_jax-runs}
poll=${GAE_JAX_POLL_SECONDS:-5}
mount=${GAE_JAX_MOUNT:-/gcs}

say() {
  echo "tpu_worker: $(hostname) $*"
}

mount_bucket() {
  local apt=(sudo apt-get -o DPkg::Lock::Timeout=600 --quiet=2) # a fresh VM updates itself first
  if ! command -v gcsfuse >/dev/null; then
    curl --silent --fail https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt" \
      "gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    "${apt[@]}" update
    "${apt[@]}" install gcsfuse
  fi
  mountpoint --quiet "$mount" && return
  sudo mkdir -p "$mount"
  sudo chown "$(id -u)" "$mount"
  # without these, a host goes on for a minute with what it knew of a file that another one wrote
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$mount"
}

setup() {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv # for Python 3.12
  make_environment requirements.txt tpu
  mount_bucket "$1"
  say "is ready with $2"
}

# told KEY: waits for a value of the metadata server that says this host goes away.
told() {
  local key=$1 etag=0 headers value
  headers=$(mktemp)
  trap 'rm -f "$headers"; exit' TERM
  while :; do
    value=$(curl --silent --fail --max-time 90 --header 'Metadata-Flavor: Google' \
      --dump-header "$headers" \
      "$metadata/$key?wait_for_change=true&timeout_sec=60&last_etag=$etag") || value=
    case "$value" in
      TERMINATE* | TRUE) break ;;
    esac
    etag=$(sed -n 's/^etag: *\([^[:space:]]*\).*/\1/Ip' "$headers")
    [ -n "$etag" ] || sleep "$poll" # no answer: not at once again
    etag=${etag:-0}
  done
  rm -f "$headers"
  say "was told $key=$value; SIGTERM to the program"
  kill -TERM "$2" 2>/dev/null || true
}

watch() {
  local folder=$1 watchers=()
  shift
  begin "$@"
  [ -z "$folder" ] || echo "$started" >"$folder/program"
  set -m # groups of their own, to end them with the curl that waits in them
  told maintenance-event "$started" &
  watchers+=("$!")
  told preempted "$started" &
  watchers+=("$!")
  set +m
  finish
  kill -- "${watchers[@]/#/-}" 2>/dev/null || true
  if [ -n "$folder" ]; then
    echo "$status" >"$folder/status.new"
    mv "$folder/status.new" "$folder/status"
  fi
  exit "$status"
}

# alive FOLDER: does its attempt still run? After a reboot its pid may be another's.
alive() {
  [ ! -e "$1/status" ] && [ -e "$1/pid" ] && grep -qas tpu_worker "/proc/$(cat "$1/pid")/cmdline"
}

stop() {
  local folder second
  for folder in "$runs"/*/; do
    [ ! -L "${folder%/}" ] || continue # latest
    alive "$folder" || continue
    say "stops attempt $(basename "$folder")"
    kill -TERM "$(cat "$folder/pid")" 2>/dev/null || true
    for ((second = 0; second < ${GAE_JAX_STOP_SECONDS:-60}; second++)); do
      alive "$folder" || break
      sleep 1
    done
    alive "$folder" || continue
    kill -KILL -- "-$(cat "$folder/program")" "$(cat "$folder/pid")" 2>/dev/null || true
  done
}

start() {
  local folder=$runs/$1 lines=+1 status
  shift
  mkdir -p "$runs"
  if mkdir "$folder" 2>/dev/null; then
    stop
    rm -f "$runs/latest"
    ln -s "$folder" "$runs/latest"
    : >"$folder/log" # is there before it is shown
    setsid bash launch/tpu_worker.sh watch --folder="$folder" -- "$@" \
      >>"$folder/log" 2>&1 </dev/null &
    echo "$!" >"$folder/pid"
  else
    lines=20
    say "goes on to show attempt $(basename "$folder")"
  fi
  tail -s 1 -n "$lines" -f --pid="$(cat "$folder/pid")" "$folder/log" || true
  status=$(cat "$folder/status" 2>/dev/null) || status=70 # killed with all that it had started
  say "ended with status $status"
  exit "$status"
}

mode=${1:---help} bucket='' commit='' attempt='' folder=''
shift || true
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) mode=--help ;;
    --bucket=*) bucket=${1#*=} ;;
    --commit=*) commit=${1#*=} ;;
    --attempt=*) attempt=${1#*=} ;;
    --folder=*) folder=${1#*=} ;;
    --) shift && break ;;
    *) die "$1 is not understood; see: bash launch/tpu_worker.sh --help" ;;
  esac
  shift
done
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu} # without it, JAX goes on with the CPU
# on the bucket: the next pod need not compile again what this one did
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$mount/gae_jax-compiled}
case "$mode" in
  --help | -h) usage_of launch/tpu_worker.sh ;;
  setup)
    need --bucket "$bucket" "a bucket with a hierarchical namespace"
    need --commit "$commit" "the name of the code that is here"
    setup "$bucket" "$commit"
    ;;
  start | watch)
    [ $# -gt 0 ] || die "the command is missing: give it behind --"
    if [ "$mode" = watch ]; then watch "$folder" "$@"; fi
    need --attempt "$attempt" "a name of this start, the same on all hosts"
    start "$attempt" "$@"
    ;;
  stop) stop ;;
  *) die "$mode is none of setup, start, watch, stop; see: bash launch/tpu_worker.sh --help" ;;
esac
