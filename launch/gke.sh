#!/usr/bin/env bash
# Runs gae_jax on a GKE cluster as a JobSet: TPU slices, or nodes with GPUs.
#
# usage: bash launch/gke.sh build   --image=I --accelerator=tpu|cuda12|cuda13 [--allow-dirty]
#        bash launch/gke.sh submit  JOB --image=I TPU|GPU STORE [OPTION ...] -- COMMAND [ARGUMENT ...]
#        bash launch/gke.sh status | logs | delete  JOB
#
#   build                 make the image of the commit that is checked out, and push it
#   submit                doctor, then the command, in every pod
#   COMMAND               of gae_jax, with --config=FILE and --workdir=/store/...; --distributed is
#                         added
# JOB:
#   --context=C           of kubectl, which names the cluster: kubectl config get-contexts
#   --namespace=N         in the cluster
#   --name=N              of the JobSet
#   --image=I             e.g. REGION-docker.pkg.dev/PROJECT/REPOSITORY/gae_jax:TAG
# TPU:
#   --tpu=T               the label gke-tpu-accelerator of the node pool, e.g. tpu-v5-lite-podslice
#   --topology=T          of a slice, e.g. 8x8
#   --chips-per-host=N    of the node pool's machines, e.g. 4
#   --num-slices=N        node pools, joined over the network (default: 1)
# GPU:
#   --gpu=G               the label gke-accelerator of the node pool, e.g. nvidia-h100-80gb
#   --nodes=N             so many nodes, with one pod and one process each
#   --gpus-per-node=N     of the node pool's machines, e.g. 8
# STORE, mounted at /store in every pod:
#   --bucket=B --service-account=S   with gcsfuse; the bucket has a hierarchical namespace, and the
#                         Kubernetes service account S may write to it
#   --claim=C             or a PersistentVolumeClaim, ReadWriteMany: Filestore, Lustre
# options:
#   --spot                on spot nodes
#   --queue=Q             of Kueue, which starts no slice before there is room for all
#   --grace=S             seconds from SIGTERM to SIGKILL (default: 120; spot nodes give 15 to 25)
#   --max-restarts=N      restarts after crashes (default: 5); after a preemption, a disruption or
#                         status 143 a restart does not count
#   --skip-doctor         do not check the pods first
#   --allow-dirty         build with uncommitted changes of tracked files
#   --dry-run             print the YAML, or the commands
#   --help                this text
#
# The cluster needs JobSet 0.6 or newer. Bad input (status 1) counts as a crash here: a pod that has
# waited in vain for the others ends with it too.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

store=/store
context='' namespace='' name='' image='' accelerator='' tpu='' topology='' chips='' slices=1 gpu=''
nodes='' gpus='' bucket='' account='' claim='' spot='' queue='' grace=120 max_restarts=5
skip_doctor='' dirty=''
mode=${1:---help}
shift || true
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) mode=--help ;;
    --context=*) context=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips-per-host=*) chips=${1#*=} ;;
    --num-slices=*) slices=${1#*=} ;;
    --gpu=*) gpu=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --service-account=*) account=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --spot) spot=1 ;;
    --queue=*) queue=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --skip-doctor) skip_doctor=1 ;;
    --allow-dirty) dirty=1 ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "$1 is not understood; the command goes behind --; see: bash launch/gke.sh --help" ;;
  esac
  shift
done

kube() {
  do_it kubectl --context="$context" --namespace="$namespace" "$@"
}

need_job() {
  need --context "$context" "the cluster, by its name for kubectl: kubectl config get-contexts"
  need --namespace "$namespace" "the namespace in the cluster"
  need --name "$name" "a name for the JobSet"
}

# Sets `hosts`, the pods of one slice, and what they ask for.
need_hardware() {
  local part total=1
  if [ -n "$tpu" ] && [ -n "$gpu" ]; then
    die "--tpu=$tpu and --gpu=$gpu: give one of them"
  elif [ -n "$tpu" ]; then
    need --topology "$topology" "of a slice, e.g. 8x8, as the node pool has it"
    need --chips-per-host "$chips" "of the node pool's machines, e.g. 4 for ct5lp-hightpu-4t"
    need_number --chips-per-host "$chips" 1
    need_number --num-slices "$slices" 1
    for part in ${topology//x/ }; do
      need_number --topology "$part" 1
      total=$((total * part))
    done
    [ $((total % chips)) = 0 ] || die "--topology=$topology has $total chips, which is no multiple of --chips-per-host=$chips"
    hosts=$((total / chips)) resource=google.com/tpu count=$chips
    platform_name=tpu
    selector="cloud.google.com/gke-tpu-accelerator: $tpu
                cloud.google.com/gke-tpu-topology: $topology"
  else
    need "--tpu or --gpu" "$gpu" "the label of the node pool, e.g. --tpu=tpu-v5-lite-podslice"
    need --nodes "$nodes" "how many nodes"
    need --gpus-per-node "$gpus" "how many GPUs a node has"
    need_number --nodes "$nodes" 1
    need_number --gpus-per-node "$gpus" 1
    [ "$slices" = 1 ] || die "--num-slices=$slices is for TPUs"
    hosts=$nodes resource=nvidia.com/gpu count=$gpus platform_name=cuda
    selector="cloud.google.com/gke-accelerator: $gpu"
  fi
}

need_store() {
  if [ -n "$bucket" ] && [ -n "$claim" ]; then
    die "--bucket=$bucket and --claim=$claim: give one of them"
  elif [ -n "$bucket" ]; then
    need --service-account "$account" "the Kubernetes service account that may write to the bucket"
    bucket=${bucket#gs://}
    [ -n "$dry_run" ] || check_bucket "$bucket"
  else
    need "--bucket or --claim" "$claim" "what all pods mount at $store, where the run directory lies"
  fi
}

# environment: of the container. JAX finds its peers on TPUs by what GKE sets; on GPUs it is told.
environment() {
  local flags
  cat <<END
                - {name: JAX_PLATFORMS, value: $platform_name}
                - {name: JAX_COMPILATION_CACHE_DIR, value: $store/gae_jax-compiled}
END
  [ "$platform_name" = cuda ] || return 0
  flags=$(xla_flags cuda)
  cat <<END
                - {name: XLA_FLAGS, value: "$flags"}
                - {name: JAX_COORDINATOR_ADDRESS, value: "$name-workers-0-0.$name:8476"}
                - {name: JAX_NUM_PROCESSES, value: "$hosts"}
                - name: JAX_PROCESS_ID
                  valueFrom:
                    fieldRef:
                      fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
END
}

volumes() {
  if [ -n "$claim" ]; then
    cat <<END
              - name: store
                persistentVolumeClaim: {claimName: $claim}
END
  else
    # without these, a pod goes on for a minute with what it knew of a file that another one wrote
    cat <<END
              - name: store
                csi:
                  driver: gcsfuse.csi.storage.gke.io
                  volumeAttributes:
                    bucketName: $bucket
                    mountOptions: "metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
END
  fi
  cat <<END
              - name: shm # NCCL and data workers want more than the 64 MB of a container
                emptyDir: {medium: Memory}
END
}

jobset() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
END
  [ -z "$queue" ] || printf '  labels:\n    kueue.x-k8s.io/queue-name: %s\n' "$queue"
  # a slice must not be spread over the hosts of two
  [ -z "$tpu" ] || printf '  annotations:\n    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool\n'
  cat <<END
spec:
  failurePolicy: # the hosts compute together: all pods are made anew when one fails
    maxRestarts: $max_restarts
    rules:
    - name: toldToStop
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: $slices
    template:
      spec:
        completionMode: Indexed
        completions: $hosts
        parallelism: $hosts
        backoffLimit: 0
        podFailurePolicy: # whatever is not named here is a crash, and counts
          rules:
          - action: FailJob
            onPodConditions:
            - {type: DisruptionTarget, status: "True"} # preempted, evicted, drained
          - action: FailJob
            onExitCodes: {containerName: gae-jax, operator: In, values: [143]} # saved after SIGTERM
        template:
END
  [ -n "$claim" ] || printf '          metadata:\n            annotations:\n              gke-gcsfuse/volumes: "true"\n'
  cat <<END
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
END
  [ -z "$account" ] || echo "            serviceAccountName: $account"
  cat <<END
            nodeSelector:
                $selector
END
  [ -z "$spot" ] || cat <<END
                cloud.google.com/gke-spot: "true"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
END
  cat <<END
            containers:
              - name: gae-jax
                image: $image
                command: [bash, -c]
                args:
                - |
                  set -e
END
  [ -n "$skip_doctor" ] || printf '                  %s\n' "$(quoted python launch/program.py "${doctor[@]}")"
  printf '                  %s\n' "exec $(quoted python launch/program.py "${program[@]}")"
  echo '                env:'
  environment
  [ "$platform_name" = cuda ] || cat <<END
                ports:
                - {containerPort: 8471} # between the hosts of a slice
                - {containerPort: 8080} # between slices
END
  cat <<END
                resources:
                  requests: {$resource: $count}
                  limits: {$resource: $count}
                volumeMounts:
                - {name: store, mountPath: $store}
                - {name: shm, mountPath: /dev/shm}
            volumes:
END
  volumes
}

build() {
  local arguments=(--build-arg ACCELERATOR="$accelerator" --build-arg COMMIT="$commit")
  arguments+=(--file launch/Dockerfile --tag "$image" -)
  if [ -n "$dry_run" ]; then
    echo "+ git archive $tree | $(quoted docker build "${arguments[@]}")"
  else
    git archive "$tree" | docker build "${arguments[@]}"
  fi
  do_it docker push "$image"
}

case "$mode" in
  --help | -h) usage_of launch/gke.sh ;;
  build)
    need --image "$image" "its name in a registry that the cluster reads"
    platform "$accelerator" >/dev/null
    find_commit "$dirty"
    build
    ;;
  submit)
    need_job
    need --image "$image" "what bash launch/gke.sh build pushed"
    need_hardware
    need_number --grace "$grace"
    need_number --max-restarts "$max_restarts"
    check_program "$@"
    is_script "$@" && die "$1: only commands of gae_jax run in a JobSet"
    check_workdir "$store" "$@"
    distribute "$@"
    need_store
    if [ -n "$dry_run" ]; then jobset; else jobset | kube create --filename=-; fi
    ;;
  status)
    need_job
    kube get jobset "$name" --output=wide
    kube get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
    ;;
  logs)
    need_job
    kube logs --follow --container=gae-jax --prefix --max-log-requests=1000 \
      --selector="jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  delete)
    need_job
    kube delete jobset "$name"
    ;;
  *) die "$mode is none of build, submit, status, logs, delete; see: bash launch/gke.sh --help" ;;
esac
