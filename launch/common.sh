# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is read by the scripts that source it
# What the launch scripts share; sourced. bash 3.2 suffices, which is what macOS has.

dry_run=${dry_run:-}

die() {
  echo "error: $*" >&2
  exit 1
}

# usage_of FILE: the comment at the head of a script, which is its help.
usage_of() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"
}

# need FLAG VALUE WHAT: stops unless the value is there.
need() {
  [ -n "$2" ] || die "$1 is missing: $3"
}

# need_number FLAG VALUE [LEAST]: LEAST is 0 if it is not given
need_number() {
  case "$2" in
    '' | *[!0-9]*) die "$1=$2 is no whole number" ;;
    ??????????*) die "$1=$2 is too large a number" ;;
  esac
  [ "$2" -ge "${3:-0}" ] || die "$1=$2; it must be at least ${3:-0}"
}

# quoted WORD...: one line that a shell reads as these words again.
quoted() {
  local word line=
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# do_it COMMAND...: shows a command and runs it; with --dry-run only shows it.
do_it() {
  if [ -n "$dry_run" ]; then
    echo "+ $(quoted "$@")"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# workdir_of COMMAND ARGUMENT...: the run directory that a gae_jax command names.
workdir_of() {
  local word
  for word in "$@"; do
    case "$word" in --workdir=*) echo "${word#--workdir=}" && return ;; esac
  done
  is_script "$@" && return
  case "${2:--}" in -*) ;; *) echo "$2" ;; esac # COMMAND RUN
}

# is_script COMMAND...: is it FILE.py and not a gae_jax command?
is_script() {
  case "$1" in *.py) true ;; *) false ;; esac
}

# check_program COMMAND...: refuses what cannot be run again and again on several hosts.
check_program() {
  local word
  [ $# -gt 0 ] || die "the command is missing: give it behind --, e.g. -- diffusion --config=FILE --workdir=DIR"
  for word in "$@"; do
    [ "$word" != --fresh ] || die "--fresh would throw the run away at every restart; take it away, or remove the run's directory once by hand"
    case "$word" in
      --from-step* | --from_step*) die "--from-step would go back to that step at every restart; go back once by hand, and leave it out here" ;;
    esac
  done
  is_script "$@" || [ -n "$(workdir_of "$@")" ] ||
    die "--workdir is missing in the command: all hosts and all restarts need the same run directory"
}

# check_workdir FOLDER COMMAND...: refuses a run directory that lies elsewhere.
check_workdir() {
  local folder=$1 workdir
  shift
  workdir=$(workdir_of "$@")
  case "$workdir" in
    "$folder"/*) ;;
    *) die "--workdir=$workdir does not lie in $folder, which all hosts share; give e.g. --workdir=$folder/runs/mine" ;;
  esac
}

# check_bucket BUCKET [FLAG ...]: refuses one in which a checkpoint is not renamed as a whole.
check_bucket() {
  local tree_like
  tree_like=$(do_it gcloud storage buckets describe "gs://$1" "${@:2}" --raw \
    --format='value(hierarchicalNamespace.enabled)') || die "--bucket=$1: gcloud cannot read it, see above"
  if [ -n "$dry_run" ]; then
    echo "$tree_like"
  elif [ "$tree_like" != True ]; then
    die "--bucket=$1 has no hierarchical namespace, so that a checkpoint is not renamed as a whole; make one with: gcloud storage buckets create gs://NAME --location=REGION --uniform-bucket-level-access --enable-hierarchical-namespace"
  fi
}

# Sets `program` (with --distributed) and `doctor` from a gae_jax command. `doctor` is the check of
# every host that goes before it: the same config and run directory.
distribute() {
  program=("$@")
  doctor=(doctor "${@:2}")
  case " $* " in
    *" --distributed "*) ;;
    *)
      program+=(--distributed)
      doctor+=(--distributed)
      ;;
  esac
}

# Sets `commit` (its name) and `tree` (what git can archive) of what is to be run. With
# --allow-dirty that has the uncommitted changes of tracked files; else there must be none.
find_commit() {
  local allow_dirty=$1
  commit=$(git rev-parse HEAD) || die "the code to run is that of a git commit, and there is none"
  tree=$commit
  if [ -n "$(git status --porcelain --untracked-files=no)" ]; then
    [ -n "$allow_dirty" ] || die "there are uncommitted changes; commit them, or pass --allow-dirty to run them under the name COMMIT-dirty-..."
    tree=$(git stash create)
    commit="$commit-dirty-$(git rev-parse --short "$tree")"
  fi
}

# check_config COMMAND...: refuses a config or script that would not be there, as git does not know
# it.
check_config() {
  local word file
  for word in "$@"; do
    case "$word" in
      --config=*) file=${word#--config=} ;;
      -*) continue ;;
      *.py) file=$word ;;
      *) continue ;;
    esac
    git cat-file -e "$tree:./${file%%:*}" 2>/dev/null ||
      die "$word: git does not know this file, so the hosts would not get it; add it to git"
  done
}

# xla_flags ACCELERATOR: for all programs; those of the user go behind and win.
xla_flags() {
  case "$1" in
    # cuBLAS instead of Triton for matmuls: 584 -> 614 images/s in training DiT-XL on
    # one H200
    cuda*) echo --xla_gpu_enable_triton_gemm=false ;;
  esac
}

# platform ACCELERATOR: for JAX_PLATFORMS; without it, JAX goes on with the CPU where it does not
# find the accelerator.
platform() {
  case "$1" in
    cpu | tpu) echo "$1" ;;
    cuda12 | cuda13) echo cuda ;;
    '') die "--accelerator is missing: cpu, cuda12, cuda13 or tpu" ;;
    *) die "--accelerator=$1 is none of cpu, cuda12, cuda13, tpu" ;;
  esac
}

# begin COMMAND...: starts it in a process group of its own, so that Ctrl-C comes to this shell
# alone; SIGTERM and SIGINT are handed on. finish: waits for it and sets `status`.
begin() {
  set -m
  "$@" &
  started=$!
  set +m
  trap 'interrupted=1; kill -TERM "$started" 2>/dev/null || true' TERM
  trap 'interrupted=1; kill -INT "$started" 2>/dev/null || true' INT
}

finish() {
  while :; do
    interrupted=
    wait "$started" && status=0 || status=$?
    [ -n "$interrupted" ] || break # a signal ends `wait` before the program
  done
  trap - TERM INT
}
