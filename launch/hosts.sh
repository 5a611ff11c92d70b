#!/usr/bin/env bash
# Train on bare hosts with GPUs, by ssh: one process a host, with all of its GPUs.
#
#   launch/hosts.sh --hosts=gpu1,gpu2 --folder=/shared/mixgrpo_jax --python=/shared/venv/bin/python \
#       --config=configs/flux_dev_mixgrpo.py --workdir=/shared/flux
#
# The first host is the coordinator; the others must reach its port. Lines of the log begin with their host. When one
# process fails, or this command is interrupted, all are stopped; the same command goes on from the last checkpoint.
#
#   --hosts=HOST,HOST...      as ssh takes them, without a password
#   --address=HOST            the first host as the others reach it, by default its name in --hosts
#   --port=PORT               of the coordinator, by default 1234
#   --folder=DIRECTORY        the checkout on every host
#   --python=FILE             interpreter in which the package is installed, by default python
#   --config=FILE --workdir=DIRECTORY   of the run; the workdir must be where all hosts find it
#   --dry-run                 print the commands, and run none
#   -- FLAGS                  for the training command: -- --config.iterations=10
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

hosts='' address='' port=1234 folder='' python=python
options "hosts address port folder python config workdir" "" "$@"
need hosts folder config workdir
IFS=, read -ra host <<<"$hosts"
address=${address:-${host[0]#*@}}

command_of() { # command_of INDEX: what process INDEX runs on its host
  local told=(JAX_COORDINATOR_ADDRESS="$address:$port" JAX_NUM_PROCESSES="${#host[@]}" JAX_PROCESS_ID="$1")
  echo "cd $(quoted "$folder") && exec env $(quoted "${told[@]}" \
    "$python" -m mixgrpo_jax.train --config="$config" --workdir="$workdir" "${extra[@]}")"
}

# With a terminal (-tt) the process ends when its ssh does.
if [[ $dry_run ]]; then
  for i in "${!host[@]}"; do run ssh -tt "${host[i]}" "$(command_of "$i")"; done
  exit
fi

pids=()
stop() { kill "${pids[@]}" 2>/dev/null || true; }
trap stop EXIT
trap 'exit 130' INT TERM
for i in "${!host[@]}"; do
  ssh -tt "${host[i]}" "$(command_of "$i")" </dev/null > >(sed -u "s/^/${host[i]//\//\\/}: /") 2>&1 &
  pids+=($!)
done
for _ in "${pids[@]}"; do
  wait -n || die "a process ended with status $?; the others are stopped"
done
