#!/usr/bin/env bash
# Train on a TPU pod slice by a queued resource, and start again when the slice is taken away.
#
#   launch/tpu_pod.sh --name=mix --zone=us-east5-a --type=v5p-64 --spot --config=configs/flux_dev_mixgrpo.py \
#       --workdir=gs://bucket/flux
#   launch/tpu_pod.sh --name=mix --zone=us-east5-a --log
#   launch/tpu_pod.sh --name=mix --zone=us-east5-a --delete
#
# Requests the slice, waits until it is ACTIVE, installs and starts on every worker, and watches. A slice that is FAILED,
# SUSPENDED or gone is deleted and requested again, and the run goes on from its last checkpoint; so the workdir must be
# where all workers, and those of the next slice, find it. A run that SIGTERM stopped has saved what was finished, and is
# started again on a slice that stays. One that fails on a healthy slice is not: the end of its log is shown, and the
# slice stays. Run this where it can stay (tmux); started again, it goes on watching.
#
#   --name=NAME --zone=ZONE   of the queued resource and of its node
#   --project=PROJECT         by default gcloud's own
#   --type=TYPE               accelerator, e.g. v5p-64
#   --slices=N                of that type, by default 1: with mesh.data a multiple of N, they train together over the
#                             data-centre network. One that is lost takes the others along
#   --version=VERSION         runtime image, by default the type's
#   --spot                    ask for spot capacity
#   --config=FILE --workdir=DIRECTORY   of the run
#   --source=SOURCE           git URL, or a checkout whose HEAD is copied; by default this one
#   --retries=N               slices asked for again before giving up, by default 20
#   --poll=SECONDS            between looks at the state, by default 60. The wait for another slice begins with it and
#                             doubles up to half an hour
#   --keep                    keep the slice when the run is finished
#   --log                     follow the first worker's log
#   --delete                  delete the queued resource and its node
#   --dry-run                 print the commands of one round, and run none
#   -- FLAGS                  for the training command: -- --config.iterations=10
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

retries=20 poll=60 keep=''
options "name zone project type version config workdir source retries poll slices" "spot keep log delete" "$@"
need name zone
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices is no count"

describe() { tpu queued-resources describe --format='value(state.state)'; }

state() { describe 2>/dev/null || true; } # empty where there is none

request() {
  local ids=(--node-id="$name")
  ((slices == 1)) || ids=(--node-count="$slices" --node-prefix="$name")
  tpu queued-resources create "${ids[@]}" --accelerator-type="$type" \
    --runtime-version="${version:-$(runtime_version)}" ${spot:+--spot}
}

release() { tpu queued-resources delete --force --quiet; }

say() { echo "$(date +%T) $name: $*" >&2; }

# The slice is ready (0), or will not be (1).
await_slice() {
  local now last=none
  while now=$(state); do
    [[ $now == "$last" ]] || say "${now:-gone}"
    last=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPEND* | DELETING | '') return 1 ;;
    esac
    sleep "$poll"
  done
}

# The run is finished (0), or the slice is lost (1). Where the run failed by itself, the script ends.
watch() {
  local status
  while sleep "$poll"; do
    [[ $(state) == ACTIVE ]] || return 1
    # An ssh that fails tells nothing; the slice's state will.
    status=$(on_workers 0 'cat train.exit 2>/dev/null || echo running') || continue
    case $status in
      0) return 0 ;;
      running) continue ;;
      143) # SIGTERM: the run is saved
        sleep "$poll"
        [[ $(state) == ACTIVE ]] || return 1
        say "the run was stopped by SIGTERM on a slice that stays; it goes on"
        start || return 1
        continue
        ;;
    esac
    sleep "$poll" # a lost worker stops the others before the slice's state says so
    [[ $(state) == ACTIVE ]] || return 1
    on_workers 0 'tail -n 50 train.log' || true
    die "the run failed with status $status on a healthy slice, which is kept: --delete releases it"
  done
}

one_slice() {
  [[ $(state) ]] || request || return
  await_slice && install && start && watch
}

relaunch() {
  local wait=$poll again
  for ((again = 0; again <= retries; again++)); do
    one_slice && return
    [[ -z $(state) ]] || release || say "could not be deleted"
    ((again < retries)) || break
    say "no slice; asking again in $wait s"
    sleep "$wait"
    wait=$((wait * 2 < 1800 ? wait * 2 : 1800))
  done
  die "gave up after $retries retries; the same command goes on from the last checkpoint"
}

if [[ $delete ]]; then
  release
elif [[ $log ]]; then
  follow
else
  need type config workdir
  if [[ $dry_run ]]; then
    request
    describe
    install
    start
  else
    relaunch
  fi
  [[ $keep ]] || release
fi
