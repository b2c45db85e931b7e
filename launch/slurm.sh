#!/usr/bin/env bash
# Runs gae_jax on GPU nodes of a Slurm cluster: makes the batch script and submits it.
#
# usage: bash launch/slurm.sh OPTION ... -- COMMAND [ARGUMENT ...]
#
#   COMMAND               of gae_jax, with --config=FILE and --workdir=/SHARED/...; --distributed is
#                         added. With --array: launch/sweep.py FILE --workdir=/SHARED/...
#   --nodes=N             so many nodes
#   --gpus-per-node=G     GPUs of each, e.g. 8 or h100:8
#   --partition=P         of the cluster
#   --account=A           whose time it is
#   --time=T              of one job, e.g. 12:00:00; a longer run takes several
#   --accelerator=A       cuda12 or cuda13: which build of JAX is installed in .venv
#   --container=IMAGE     run in this image (pyxis and enroot) instead of --accelerator and
#                         .venv; it has the packages of requirements.txt and jax[cuda12] or [cuda13]
# options:
#   --name=N              of the job (default: gae_jax)
#   --cpus-per-task=C     cores of each process
#   --array=0-K           or 0-K%M: a sweep, split over K+1 jobs, M of them at a time
#   --sbatch=OPTION       any other option of sbatch, e.g. --sbatch=--qos=long; may be repeated
#   --allow-dirty         run uncommitted changes of tracked files too
#   --skip-doctor         do not check the nodes first
#   --max-restarts=N      crashes after which the job is not queued again (default: 5)
#   --dry-run             print the batch script
#   --help                this text
#
# One process per GPU: it is what JAX makes of Slurm's variables. Each process takes the GPU of its
# SLURM_LOCALID among all GPUs of the node, so --gpus-per-task and --gpu-bind, which hide the
# others, must stay away. One process per node would see a single GPU unless told otherwise.
#
# Two minutes before the time is over, Slurm sends SIGTERM; the command saves a checkpoint and ends
# with 143, and the job is queued again under its number. A crash is queued again up to N times,
# bad input (status 1) is not. What runs is the code of the commit that is checked out, copied to
# ~/.cache/gae_jax/code, so that the next job runs it too whatever has become of this folder.
# The output is in runs/launch/NAME-JOB.out.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh

nodes='' gpus='' partition='' account='' time='' accelerator='' container='' name=gae_jax cpus=''
array='' more=() dirty='' skip_doctor='' max_restarts=5
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) usage_of launch/slurm.sh && exit ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --container=*) container=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --cpus-per-task=*) cpus=${1#*=} ;;
    --array=*) array=${1#*=} ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --allow-dirty) dirty=1 ;;
    --skip-doctor) skip_doctor=1 ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "$1 is not understood; the command goes behind --; see: bash launch/slurm.sh --help" ;;
  esac
  shift
done
need --nodes "$nodes" "how many nodes"
need_number --nodes "$nodes" 1
need --gpus-per-node "$gpus" "how many GPUs a node has"
need_number --gpus-per-node "${gpus##*:}" 1
need --partition "$partition" "where the job is to run; see: sinfo"
need --account "$account" "whose time is used; see: sacctmgr show associations user=\$USER"
need --time "$time" "how long one job may take"
need_number --max-restarts "$max_restarts"
[ -z "$cpus" ] || need_number --cpus-per-task "$cpus" 1
if [ -z "$container" ]; then
  case "$(platform "$accelerator")" in
    cuda) ;;
    *) die "--accelerator=$accelerator: on Slurm there are cuda12 and cuda13" ;;
  esac
elif [ -n "$accelerator" ]; then
  die "--accelerator=$accelerator is for .venv, which is not used with --container"
fi
check_program "$@"
[[ "$(workdir_of "$@")" = /* ]] || die "--workdir=$(workdir_of "$@"): give the whole path, on a file system of all nodes; the job runs in a copy of this folder"
find_commit "$dirty"
check_config "$@"
if is_script "$@"; then
  [[ "$array" =~ ^0-([0-9]+)(%[0-9]+)?$ ]] || die "--array=$array: a script is run as a job array, 0-K or 0-K%M"
  [ "$nodes" = 1 ] || die "--nodes=$nodes: each job of an array has one node"
  # not from Slurm's count of the tasks, which is another where a part of them is submitted again
  tasks=$((BASH_REMATCH[1] + 1))
  program=("$@") doctor=() per_node=1
else
  [ -z "$array" ] || die "--array=$array: its jobs would write into one run directory; it is for launch/sweep.py"
  distribute "$@"
  per_node=${gpus##*:}
fi

here=$PWD
code=${XDG_CACHE_HOME:-$HOME/.cache}/gae_jax/code/$commit
if [ -n "$container" ]; then python=python; else python=$here/.venv/bin/python; fi

batch_script() {
  local step=(srun --mpi=none --kill-on-bad-exit=0 --wait=0)
  [ -z "$cpus" ] || step+=(--cpus-per-task="$cpus") # srun does not take sbatch's
  if [ -n "$container" ]; then
    step+=(--container-image="$container" --container-workdir="$code")
    step+=(--container-mounts="$code:$code,$(mounted "$@")")
  fi
  step+=("$python" launch/program.py)
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$per_node
#SBATCH --gpus-per-node=$gpus
#SBATCH --partition=$partition
#SBATCH --account=$account
#SBATCH --time=$time
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$here/runs/launch/%x-%j.out
END
  [ -z "$cpus" ] || echo "#SBATCH --cpus-per-task=$cpus"
  [ -z "$array" ] || echo "#SBATCH --array=$array"
  [ ${#more[@]} = 0 ] || printf '#SBATCH %s\n' "${more[@]}"
  cat <<END
set -uo pipefail
trap : TERM # this script waits until the command has saved
cd $(quoted "$code") || exit 1
export GAE_JAX_COMMIT=$commit JAX_PLATFORMS=cuda PYTHONUNBUFFERED=1
export XLA_FLAGS="$(xla_flags cuda) \${XLA_FLAGS:-}"
export JAX_COMPILATION_CACHE_DIR=\${JAX_COMPILATION_CACHE_DIR:-\${XDG_CACHE_HOME:-\$HOME/.cache}/gae_jax/compiled}
# gRPC would look for the other nodes behind the proxy, and the start would hang
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
crashes=$(quoted "$here")/runs/launch/$name-\$SLURM_JOB_ID.crashes

# Queues the job again, unless it was cancelled, which is a SIGTERM as well.
requeue() {
  if scontrol show job "\$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    echo "slurm: ended with status \$1; queued again"
    scontrol requeue "\$SLURM_JOB_ID"
  fi
  exit "\$1"
}

# srun ends with the highest status of its tasks.
ended() {
  case "\$1" in
    0) return ;;
    1 | 2 | 130) echo "slurm: bad input, see above; not queued again" && exit "\$1" ;;
    143) requeue 143 ;;
  esac
  echo "status \$1" >>"\$crashes"
  if [ "\$(wc -l <"\$crashes")" -gt $max_restarts ]; then
    echo "slurm: ended with status \$1 and has been queued again $max_restarts times"
    exit "\$1"
  fi
  requeue "\$1"
}

END
  [ ${#doctor[@]} = 0 ] || [ -n "$skip_doctor" ] || printf '%s\nended $?\n' "$(quoted "${step[@]}" "${doctor[@]}")"
  printf '%s%s\nended $?\n' "$(quoted "${step[@]}" "${program[@]}")" \
    "${array:+ --task=\$SLURM_ARRAY_TASK_ID --tasks=$tasks}"
  # shellcheck disable=SC2016 # expanded in the job
  echo 'rm -f "$crashes"'
}

# mounted COMMAND...: what a container needs besides the code: the folder of the run directory.
mounted() {
  local folder
  folder=$(dirname "$(workdir_of "$@")")
  echo "$folder:$folder,$HOME:$HOME"
}

if [ -n "$dry_run" ]; then
  echo "+ git archive $tree | tar -x -C $(quoted "$code")"
  [ -n "$container" ] || echo "make_environment requirements.txt $accelerator"
  echo "+ sbatch <<'END'"
  batch_script "$@"
  echo END
  exit
fi
command -v sbatch >/dev/null || die "there is no sbatch here; run this where jobs are submitted"
[ -n "$container" ] || make_environment requirements.txt "$accelerator"
mkdir -p runs/launch "$code"
git archive "$tree" | tar -x -C "$code"
batch_script "$@" | sbatch
