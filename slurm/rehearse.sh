# shellcheck shell=bash
# A rehearsal before the submission. Sourced by train.sh if it is run with POPSD_REHEARSE=1 instead of being submitted.

# rehearse_and_submit [SBATCH OPTION...] CONF [key=value ...]: submits the training if its rehearsal ends without an error.
rehearse_and_submit() {
  local options=() nodes=1 ranks=8 code=0 settings=${POPSD_ENV:-$POPSD_HOME/slurm/env.sh}
  [[ ! -e $settings && -z ${POPSD_ENV:-} ]] || read_settings "$settings"
  : "${POPSD_PYTHON:=python}"
  while (($#)) && [[ $1 == -* ]]; do
    case $1 in
    --nodes=*) nodes=${1#*=} ;;
    -N?*) nodes=${1#-N} ;;
    --ntasks-per-node=*) ranks=${1#*=} ;;
    -N | --nodes | --ntasks-per-node) die "$USER_ERROR" "rehearsal: got $1 and a word; need one word; write --nodes=N" ;;
    esac
    options+=("$1")
    shift
  done
  (($#)) || die "$USER_ERROR" "usage: POPSD_REHEARSE=1 slurm/train.sh [--nodes=N] CONF [key=value ...]"
  [[ $nodes =~ ^[1-9][0-9]*$ && $ranks =~ ^[1-9][0-9]*$ ]] ||
    die "$USER_ERROR" "rehearsal: got --nodes=$nodes and --ntasks-per-node=$ranks; need one number each; set --nodes=N"
  # In a job array, `%a` is the index of a task; the settings of a model do not depend on it.
  PYTHONPATH=$POPSD_HOME${PYTHONPATH:+:$PYTHONPATH} "$POPSD_PYTHON" -m nemo_popsd rehearse "${@//%a/1}" "nodes=$nodes" \
    "gpus_per_node=$ranks" || code=$?
  ((!code)) || die "$code" "rehearsal: ended with $code; no job was submitted"
  exec sbatch "${options[@]}" "$POPSD_HOME/slurm/train.sh" "$@"
}
