#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster, as a JobSet (which the cluster must have: https://jobset.sigs.k8s.io).
#
#   launch/gke.sh --name=mix --image=REGISTRY/mixgrpo_jax --accelerator=tpu-v5p-slice --topology=4x4x4 \
#       --config=configs/flux_dev_mixgrpo.py --workdir=gs://bucket/flux
#   launch/gke.sh --name=mix --log
#   launch/gke.sh --name=mix --delete
#
# Fills in launch/gke_jobset.yaml and applies it. GKE tells every pod of the others, and Kubernetes' SIGTERM goes to the
# training process itself. A slice that is lost is started again, and the run goes on from its last checkpoint.
#
#   --name=NAME               of the JobSet
#   --namespace=NAMESPACE     by default kubectl's own
#   --image=IMAGE             container image in which mixgrpo_jax[tpu,gcs] is installed, and configs/ is in the working folder
#   --accelerator=LABEL       of the nodes: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology=TOPOLOGY       of the slice, 4x4 or 4x4x4
#   --slices=N                of that topology, by default 1: with mesh.data a multiple of N, they train together over the
#                             data-centre network; each needs a node pool of its own
#   --chips=N                 of one node, by default 4
#   --spot                    use spot nodes
#   --restarts=N              of the whole slice, by default 20
#   --config=FILE --workdir=DIRECTORY   of the run
#   --log                     follow the first slice's first pod's log
#   --delete                  delete the JobSet
#   --dry-run                 print the command with the filled-in manifest, and run nothing
#   -- FLAGS                  for the training command: -- --config.iterations=10
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

namespace='' image='' accelerator='' topology='' chips=4 restarts=20
options "name namespace image accelerator topology slices chips restarts config workdir" "spot log delete" "$@"
need name

kube() { run kubectl ${namespace:+--namespace="$namespace"} "$@"; }

pods() { # of a slice
  local all
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices is no count"
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "--topology=$topology is none: give one like 4x4x4"
  [[ $chips =~ ^[1-9][0-9]*$ ]] || die "--chips=$chips is no count: give the chips of a node"
  all=$((${topology//x/*}))
  ((all % chips == 0)) || die "--topology=$topology has $all chips, which nodes of --chips=$chips do not make up"
  echo $((all / chips))
}

json() { # as a JSON string, which is YAML too
  local text=${1//\\/\\\\}
  echo "\"${text//\"/\\\"}\""
}

manifest() {
  local text arguments argument count
  count=$(pods) || return
  arguments=$(json --config="$config"),
  arguments+=$(json --workdir="$workdir")
  for argument in "${extra[@]}"; do arguments+=,$(json "$argument"); done
  text=$(<"$(dirname "$0")/gke_jobset.yaml")
  text=${text//@NAME@/"$name"}
  text=${text//@IMAGE@/"$(json "$image")"}
  text=${text//@ACCELERATOR@/"$accelerator"}
  text=${text//@TOPOLOGY@/"$topology"}
  text=${text//@CHIPS@/"$chips"}
  text=${text//@NODES@/"$count"}
  text=${text//@SLICES@/"$slices"}
  text=${text//@RESTARTS@/"$restarts"}
  text=${text//@ARGUMENTS@/"$arguments"}
  [[ $spot ]] || text=$(grep -v '# spot$' <<<"$text")
  echo "$text"
}

if [[ $delete ]]; then
  kube delete jobset "$name"
elif [[ $log ]]; then
  kube logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
else
  need image accelerator topology config workdir
  filled=$(manifest)
  if [[ $dry_run ]]; then
    printf "%s <<'EOF'\n%s\nEOF\n" "$(kube apply --filename=-)" "$filled"
  else
    kube apply --filename=- <<<"$filled"
  fi
fi
