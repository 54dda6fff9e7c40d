#!/usr/bin/env bash
# Evaluate student.source, or a checkpoint, on data.validation.
#
#   sbatch slurm/evaluate.sh conf/qwen3_8b.yaml key=value ... [--checkpoint PATH]
#
# sbatch runs a copy of this file from its spool directory; the directory it came from is in the job's record. POPSD_HOME
# overrides it. Partition, account, time and NCCL's settings: env.example.sh.
#SBATCH --job-name=popsd-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=popsd-evaluate-%j.out
set -euo pipefail
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "submit it: sbatch slurm/evaluate.sh ..." >&2; exit 2; }
job=$(scontrol show job "$SLURM_JOB_ID")
job=${job#*Command=}
POPSD_HOME=${POPSD_HOME:-${job%%/slurm/evaluate.sh*}}
# shellcheck source=common.sh
source "$POPSD_HOME/slurm/common.sh"

(($#)) || die "$USER_ERROR" "usage: sbatch slurm/evaluate.sh CONF [key=value ...] [--checkpoint PATH]"
popsd_job evaluate "$@"
