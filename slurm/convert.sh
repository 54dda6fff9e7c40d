#!/usr/bin/env bash
# Convert between a Hugging Face directory and a NeMo checkpoint; one process, no GPU.
#
#   sbatch slurm/convert.sh hf-to-nemo /models/Qwen3-8B /models/Qwen3-8B.nemo.d
#
# sbatch runs a copy of this file from its spool directory; the directory it came from is in the job's record. POPSD_HOME
# overrides it. Partition, account, time and NCCL's settings: env.example.sh.
#SBATCH --job-name=popsd-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --mem=64G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=popsd-convert-%j.out
set -euo pipefail
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "submit it: sbatch slurm/convert.sh ..." >&2; exit 2; }
job=$(scontrol show job "$SLURM_JOB_ID")
job=${job#*Command=}
POPSD_HOME=${POPSD_HOME:-${job%%/slurm/convert.sh*}}
# shellcheck source=common.sh
source "$POPSD_HOME/slurm/common.sh"

(($# >= 3)) || die "$USER_ERROR" "usage: sbatch slurm/convert.sh hf-to-nemo|nemo-to-hf SRC OUT [OPTION ...]"
popsd_job convert "$@"
