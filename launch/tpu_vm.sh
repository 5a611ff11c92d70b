#!/usr/bin/env bash
# Train on one TPU VM. It is made if it is not there, and the run outlives this command.
#
#   launch/tpu_vm.sh --name=mix --zone=us-central2-b --config=configs/quickstart.py --workdir=runs/quickstart
#   launch/tpu_vm.sh --name=mix --zone=us-central2-b --log
#   launch/tpu_vm.sh --name=mix --zone=us-central2-b --workdir=runs/quickstart --fetch=runs
#   launch/tpu_vm.sh --name=mix --zone=us-central2-b --delete
#
#   --name=NAME --zone=ZONE   of the VM
#   --project=PROJECT         by default gcloud's own
#   --type=TYPE               accelerator of one host, by default v4-8
#   --version=VERSION         runtime image, by default the type's
#   --spot                    make it a spot VM
#   --config=FILE --workdir=DIRECTORY   of the run; relative ones are of the checkout on the VM
#   --source=SOURCE           git URL, or a checkout whose HEAD is copied; by default this one
#   --log                     follow the run's log
#   --fetch=DIRECTORY         copy the workdir there
#   --delete                  delete the VM and what is on it
#   --dry-run                 print the commands, as if the VM were absent, and run none
#   -- FLAGS                  for the training command: -- --config.iterations=10
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

type=v4-8 fetch=''
options "name zone project type version config workdir source fetch" "spot log delete" "$@"
need name zone

is_there() {
  tpu tpu-vm describe --format='value(state)' || return
  [[ ! $dry_run ]]
}

if [[ $delete ]]; then
  tpu tpu-vm delete --quiet
elif [[ $log ]]; then
  follow
elif [[ $fetch ]]; then
  need workdir
  if [[ $workdir == gs://* ]]; then
    run gcloud storage cp --recursive "$workdir" "$fetch"
  else
    scp_tpu --recurse "$name:mixgrpo_jax/$workdir" "$fetch"
  fi
else
  need config workdir
  is_there || tpu tpu-vm create --accelerator-type="$type" --version="${version:-$(runtime_version)}" ${spot:+--spot}
  install
  start
fi
