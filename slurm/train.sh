#!/usr/bin/env bash
# Train on several nodes: saves, requeues and resumes after time limits, preemption and failures.
#
#   sbatch --nodes=4 slurm/train.sh conf/qwen3_8b.yaml key=value ...
#   POPSD_REHEARSE=1 slurm/train.sh --nodes=4 conf/qwen3_8b.yaml key=value ...     rehearses here, then submits
#
# sbatch runs a copy of this file from its spool directory; the directory it came from is in the job's record. POPSD_HOME
# overrides it. Partition, account, time and NCCL's settings: env.example.sh.
#SBATCH --job-name=popsd-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=popsd-train-%j.out
set -euo pipefail
if [[ -z ${SLURM_JOB_ID:-} && ${POPSD_REHEARSE:-} == 1 ]]; then
  POPSD_HOME=${POPSD_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
  # shellcheck source=common.sh
  source "$POPSD_HOME/slurm/common.sh"
  # shellcheck source=rehearse.sh
  source "$POPSD_HOME/slurm/rehearse.sh"
  rehearse_and_submit "$@"
fi
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "submit it: sbatch slurm/train.sh ..." >&2; exit 2; }
job=$(scontrol show job "$SLURM_JOB_ID")
job=${job#*Command=}
POPSD_HOME=${POPSD_HOME:-${job%%/slurm/train.sh*}}
# shellcheck source=common.sh
source "$POPSD_HOME/slurm/common.sh"

(($#)) || die "$USER_ERROR" "usage: sbatch --nodes=N slurm/train.sh CONF [key=value ...]"
popsd_job train "$@"
