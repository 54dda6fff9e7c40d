#!/usr/bin/env bash
# Submit convert -> train -> export -> evaluate and print the job ids. Each job starts after the previous one succeeds.
#
#   slurm/pipeline.sh [--nodes=N] [sbatch options of the training] CONF [key=value ...]
#
# All jobs use one configuration: `student.source` is the Hugging Face directory, and everything is written to `output`.
# The conversion is skipped if student.source is a NeMo checkpoint or the embedded model; the evaluation is skipped if
# data.validation.path and evaluation.sets are empty. POPSD_EVALUATE_OPTIONS are the sbatch options of the evaluation. Run
# it where you run sbatch; neither Python nor a container is needed there.
set -euo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
source "$home/slurm/common.sh"
# shellcheck source=configuration.sh
source "$home/slurm/configuration.sh"
settings=${POPSD_ENV:-$home/slurm/env.sh}
[[ ! -e $settings && -z ${POPSD_ENV:-} ]] || read_settings "$settings"

options=()
while (($#)) && [[ $1 == -* ]]; do
  case $1 in
  -a* | --array*) die "$USER_ERROR" "pipeline: got $1; need a single run; start a pipeline for each run" ;;
  esac
  options+=("$1")
  shift
done
(($#)) && [[ -r $1 ]] || {
  echo "usage: slurm/pipeline.sh [--nodes=N] CONF [key=value ...]; got ${1:+an unreadable }${1:-no configuration}" >&2
  exit 2
}
conf=$1
shift

# override KEY VALUE: adds an override, unless the configuration and the overrides already have that value.
override() {
  local word kept=()
  [[ $2 != "$(setting "$1")" ]] || return 0
  for word in "${overrides[@]}"; do
    [[ $word == "$1="* ]] || kept+=("$word")
  done
  overrides=("${kept[@]}" "$1=$2")
}

# submit NAME AFTER SCRIPT ARGUMENT...: prints the id; AFTER is the id of the previous job, or empty.
submit() {
  local name=$1 after=$2 flags=()
  shift 2
  [[ -z $after ]] || flags+=(--dependency="afterok:$after" --kill-on-invalid-dep=yes)
  [[ $name != train ]] || flags+=("${options[@]}")
  [[ $name != evaluate ]] || flags+=("${evaluation[@]}")
  id=$(sbatch --parsable "${flags[@]}" "$@")
  id=${id%%;*}
  submitted+=("$id")
  echo "$name $id"
}

overrides=("$@")
read -r -a evaluation <<<"${POPSD_EVALUATE_OPTIONS:-}"
source=$(path_setting student.source)
output=$(output_setting)
validation=$(setting data.validation.path)
sets=$(setting evaluation.sets)
for word in "${overrides[@]}"; do
  [[ $word != evaluation.sets.*=?* ]] || sets=mapping
done
[[ -n $source ]] || {
  echo "pipeline: got no student.source; need the Hugging Face directory; set it in $conf or as key=value" >&2
  exit 2
}
override student.source "$source"
override output "$output"
something="[^][{} \"']" # neither empty nor an empty list or mapping
[[ $validation != null ]] || validation=
id=
submitted=()
# If one submission fails, the others are cancelled.
trap '((! ${#submitted[@]})) || scancel "${submitted[@]}"; echo "pipeline: all submitted jobs were cancelled" >&2' ERR
set -o errtrace
if [[ -e $source/config.json && ! -e $source/manifest.json ]]; then
  submit convert "" "$home/slurm/convert.sh" hf-to-nemo "$source" "$output/student"
  overrides+=(student.source="$output/student")
fi
submit train "$id" "$home/slurm/train.sh" "$conf" "${overrides[@]}" training.export_huggingface=false
submit export "$id" "$home/slurm/export.sh" "$output/checkpoints/final" "$output/huggingface"
if [[ $validation =~ $something || $sets =~ $something ]]; then
  submit evaluate "$id" "$home/slurm/evaluate.sh" "$conf" "${overrides[@]}" --checkpoint "$output/checkpoints/final"
fi
