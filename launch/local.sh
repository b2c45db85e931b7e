#!/usr/bin/env bash
# Runs gae_jax on one machine: makes .venv with the accelerator's build of JAX, sets what JAX
# should know, runs a command, and runs it again after a crash.
#
# usage: bash launch/local.sh --accelerator=A [OPTION ...] -- COMMAND [ARGUMENT ...]
#
#   COMMAND               of gae_jax (python -m gae_jax --help), or a script, e.g. launch/sweep.py
#   --accelerator=A       cpu, cuda12, cuda13 or tpu: which build of JAX is installed
#   --restarts=N          run the command again up to N times if it crashed (default: 0). Not after
#                         bad input (status 1) nor after it was told to stop (130, 143)
#   --pause=S             seconds before it is run again (default: 30)
#   --dry-run             print what would be done
#   --help                this text
#
# Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR (default: ~/.cache/gae_jax/compiled),
# so that the second start of the same training need not compile. XLA_FLAGS of yours are kept.
# Exit status: that of the command; 70 for an exception that nobody caught.
#
# example:
#   bash launch/local.sh --accelerator=cuda13 --restarts=10 -- \
#       diffusion --config=configs/dit_xl_d32_80ep.py --workdir=runs/xl
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh

accelerator='' restarts=0 pause=30
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) usage_of launch/local.sh && exit ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "$1 is not understood; the command goes behind --; see: bash launch/local.sh --help" ;;
  esac
  shift
done
platforms=$(platform "$accelerator")
need_number --restarts "$restarts"
need_number --pause "$pause"
[ $# -gt 0 ] || die "the command is missing: give it behind --, e.g. -- demo --config=configs/demo.py"
[ "$restarts" = 0 ] || case " $* " in
  *" --fresh "*) die "--fresh would throw the run away at every restart; leave out --restarts or --fresh" ;;
  *" --from-step"*) die "--from-step would go back to that step at every restart; leave out --restarts or --from-step" ;;
esac

JAX_PLATFORMS=$platforms
JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/gae_jax/compiled}
flags=$(xla_flags "$accelerator")
XLA_FLAGS="$flags${flags:+${XLA_FLAGS:+ }}${XLA_FLAGS:-}"
export JAX_PLATFORMS JAX_COMPILATION_CACHE_DIR XLA_FLAGS
command=(.venv/bin/python launch/program.py "$@")
if [ -n "$dry_run" ]; then
  echo "make_environment requirements.txt $accelerator"
  for name in JAX_PLATFORMS JAX_COMPILATION_CACHE_DIR XLA_FLAGS; do
    echo "export $name=$(quoted "${!name}")"
  done
  do_it "${command[@]}"
  [ "$restarts" = 0 ] || echo "# again after a crash, up to $restarts times, $pause s later"
  exit
fi

make_environment requirements.txt "$accelerator"
[ "$restarts" != 0 ] || exec "${command[@]}"
for ((run = 0; ; run++)); do
  begin "${command[@]}"
  finish
  case "$status" in
    0 | 1 | 2 | 130 | 143) exit "$status" ;; # finished, bad input, told to stop
  esac
  if [ "$run" -ge "$restarts" ]; then
    echo "error: the command ended with status $status and has been run again $restarts times" >&2
    exit "$status"
  fi
  echo "the command ended with status $status; run again in $pause s ($((run + 1)) of $restarts)" >&2
  sleep "$pause"
done
