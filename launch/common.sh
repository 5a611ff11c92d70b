# shellcheck shell=bash
# What the launch scripts share: options, dry runs, and how a run is installed and started on TPU VMs. Sourced, not run.

# shellcheck disable=SC2034 # the scripts read what `options` sets
name='' zone='' project='' type='' version='' config='' workdir='' slices=1 spot='' log='' delete=''
source=$(dirname "${BASH_SOURCE[0]}")/.. # a checkout, or a git URL
dry_run=''
extra=() # what comes after --: flags for the training command

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# A script's help is the comment that it begins with.
usage() { awk 'NR > 1 { if (!/^#( |$)/) exit; sub(/^# ?/, ""); print }' "$0"; }

# options "VALUED..." "SWITCHES..." "$@": sets a variable for each option, a_b for --a-b=...; a switch's becomes "yes".
options() {
  local valued=" $1 " switches=" $2 dry-run " option value
  shift 2
  while (($#)); do
    option=${1%%=*}
    option=${option#--}
    value=yes
    case $1 in
      -h | --help) usage && exit ;;
      --) extra=("${@:2}") && return ;;
      --*) ;;
      *) die "$1 is no option; flags for the training command come after --" ;;
    esac
    if [[ $valued == *" $option "* ]]; then
      if [[ $1 == *=* ]]; then
        value=${1#*=}
      else
        value=${2-}
        (($# < 2)) || shift
      fi
      [[ $value && $value != --* ]] || die "--$option needs a value: --$option=..."
    elif [[ $switches != *" $option "* ]]; then
      die "--$option is unknown; --help lists the options"
    elif [[ $1 == *=* ]]; then
      die "--$option takes no value"
    fi
    printf -v "${option//-/_}" %s "$value"
    shift
  done
}

# need OPTION...: refuses to go on without them.
need() {
  local option variable
  for option in "$@"; do
    variable=${option//-/_}
    [[ ${!variable} ]] || die "--$option is missing; --help lists the options"
  done
}

quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Runs a command; in a dry run, prints it as a shell would take it.
run() { if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi; }

# tpu KIND VERB ARGUMENT...: a command about the TPU VM or queued resource of this name.
tpu() { run gcloud compute tpus "$1" "$2" "$name" --zone="$zone" ${project:+--project="$project"} "${@:3}"; }

# The nodes of a queued resource: one of its name, or of several slices one each, numbered.
nodes() {
  local slice
  if ((slices == 1)); then
    echo "$name"
  else
    for ((slice = 0; slice < slices; slice++)); do echo "$name-$slice"; done
  fi
}

scp_tpu() { run gcloud compute tpus tpu-vm scp --zone="$zone" ${project:+--project="$project"} "$@"; }

# on_workers WHICH COMMAND: 0 is the first worker of the first node, all are all workers of all nodes.
on_workers() {
  local node
  for node in $(nodes); do
    name=$node tpu tpu-vm ssh --worker="$1" --command="$2" || return
    [[ $1 == all ]] || return 0
  done
}

follow() { on_workers 0 'tail -n 100 -F train.log'; }

runtime_version() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# Puts the package on every worker, in a virtual environment of its own: the images' Python may be too old.
install() {
  local archive=/tmp/mixgrpo_jax.tar.gz unpack node
  if [[ $source == *://* || $source == git@* ]]; then
    unpack="if test -d mixgrpo_jax; then git -C mixgrpo_jax pull --quiet --ff-only
else git clone --quiet --depth 1 $(quoted "$source") mixgrpo_jax; fi"
  else
    run git -C "$source" archive --format=tar.gz --output="$archive" HEAD || return
    for node in $(nodes); do scp_tpu "$archive" "$node:$archive" --worker=all || return; done
    unpack="mkdir -p mixgrpo_jax && tar -xzf $archive -C mixgrpo_jax"
  fi
  on_workers all "set -e
$unpack
python3 -m pip install --quiet --user uv
test -d venv || python3 -m uv venv --quiet --python 3.11 venv
python3 -m uv pip install --quiet --python venv/bin/python --editable './mixgrpo_jax[tpu,gcs]'"
}

# Starts training on every worker, unless it is on. What it says is in ~/train.log, its exit status in ~/train.exit.
start() {
  local train session
  train=$(quoted -m mixgrpo_jax.train --config="$config" --workdir="$workdir" "${extra[@]}")
  session="echo \$\$ > ~/train.pid
cd ~/mixgrpo_jax
~/venv/bin/python $train
echo \$? > ~/train.exit"
  on_workers all "if test -s train.pid && kill -0 \"\$(cat train.pid)\" 2>/dev/null; then echo 'the run is on'; exit; fi
rm -f train.exit
nohup setsid bash -c $(quoted "$session") >> train.log 2>&1 < /dev/null &"
}
