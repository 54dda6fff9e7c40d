#!/usr/bin/env bash
# Write a trained checkpoint as a Hugging Face directory, adapters merged; one process, no GPU.
#
#   sbatch slurm/export.sh runs/qwen3_8b/checkpoints/final /models/Qwen3-8B-purified
#
# sbatch runs a copy of this file from its spool directory; the directory it came from is in the job's record. POPSD_HOME
# overrides it. Partition, account, time and NCCL's settings: env.example.sh.
#SBATCH --job-name=popsd-export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --mem=64G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=popsd-export-%j.out
set -euo pipefail
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "submit it: sbatch slurm/export.sh ..." >&2; exit 2; }
job=$(scontrol show job "$SLURM_JOB_ID")
job=${job#*Command=}
POPSD_HOME=${POPSD_HOME:-${job%%/slurm/export.sh*}}
# shellcheck source=common.sh
source "$POPSD_HOME/slurm/common.sh"

(($# == 2)) || die "$USER_ERROR" "usage: sbatch slurm/export.sh CHECKPOINT OUTPUT"
popsd_job export "$@"
