#!/usr/bin/env bash
# Submit a sweep: one job array per point of a grid, with one task per seed, and print the ids of the arrays.
#
#   slurm/sweep.sh --seeds=1,2,3 [--grid=key=a,b ...] [sbatch options of a run] CONF [key=value ...]
#
# Each run has the output OUTPUT/POINT/seed_N and the name NAME-POINT-seed_N, like those of `popsd train --seeds --grid`;
# OUTPUT and NAME are those of CONF. Each saves, requeues and resumes independently. --array is not supported: set
# --throttle=N to run at most N tasks of an array at a time. The last line is the command that reports means over the seeds.
# Run it where you run sbatch; neither Python nor a container is needed there.
set -euo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
source "$home/slurm/common.sh"
# shellcheck source=configuration.sh
source "$home/slurm/configuration.sh"
settings=${POPSD_ENV:-$home/slurm/env.sh}
[[ ! -e $settings && -z ${POPSD_ENV:-} ]] || read_settings "$settings"

seeds="" grid=() options=() throttle=""
while (($#)) && [[ $1 == -* ]]; do
  case $1 in
  --seeds=*) seeds=${1#*=} ;;
  --grid=*=*) grid+=("${1#*=}") ;;
  --throttle=*) throttle=%${1#*=} ;;
  -a* | --array*) die "$USER_ERROR" "sweep: got $1; need --seeds=N,N: the array has a task for each seed; give --throttle=N for its limit" ;;
  *) options+=("$1") ;;
  esac
  shift
done
(($#)) && [[ -r $1 ]] || {
  echo "usage: slurm/sweep.sh --seeds=N,N [--grid=key=a,b] CONF [key=value ...]; got ${1:+an unreadable }${1:-no configuration}" >&2
  exit 2
}
[[ $seeds =~ ^[0-9]+(,[0-9]+)*$ ]] || die "$USER_ERROR" "sweep: got --seeds=$seeds; need whole numbers, as in 1,2,3; set --seeds"
conf=$1
shift
overrides=("$@")
output=$(output_setting)
name=$(name_setting)

# The points of the grid, one per line: the overrides and the label of the output, separated by tabs.
points=$'\t'
for axis in "${grid[@]}"; do
  key=${axis%%=*} next=""
  IFS=, read -r -a values <<<"${axis#*=}"
  while IFS=$'\t' read -r label words; do
    for value in "${values[@]}"; do
      [[ -n $value && $value != *[$' \t']* ]] || die "$USER_ERROR" "sweep: got --grid=$axis; need key=a,b without blanks; correct it"
      part=${key##*.}_${value//[^[:alnum:]_.+-]/-}
      next+="${label:+${label}_}$part"$'\t'"${words:+$words }$key=$value"$'\n'
    done
  done <<<"$points"
  points=${next%$'\n'}
done

runs=()
while IFS=$'\t' read -r label words; do
  read -r -a point <<<"$words"
  place=${label:+$label/}seed_
  job=$(sbatch --parsable --array="$seeds$throttle" "${options[@]}" "$home/slurm/train.sh" "$conf" "${overrides[@]}" \
    "${point[@]}" seed=%a "output=$output/$place%a" "name=$name-${label:+$label-}seed_%a")
  echo "${label:-seeds} ${job%%;*}"
  for seed in ${seeds//,/ }; do
    runs+=("$output/$place$seed")
  done
done <<<"$points"
printf 'when all are done: popsd report'
printf ' %q' "${runs[@]}"
printf ' --output %q\n' "$output/report.html"
