#!/usr/bin/env bash
# Check whether the nodes meet the needs of a run: versions, devices, disk; in the container if there is one.
#
#   sbatch --wait slurm/doctor.sh --imports --strict
#
# sbatch runs a copy of this file from its spool directory; the directory it came from is in the job's record. POPSD_HOME
# overrides it. Partition, account, time and NCCL's settings: env.example.sh.
#SBATCH --job-name=popsd-doctor
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=popsd-doctor-%j.out
set -euo pipefail
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "submit it: sbatch slurm/doctor.sh ..." >&2; exit 2; }
job=$(scontrol show job "$SLURM_JOB_ID")
job=${job#*Command=}
POPSD_HOME=${POPSD_HOME:-${job%%/slurm/doctor.sh*}}
# shellcheck source=common.sh
source "$POPSD_HOME/slurm/common.sh"

popsd_doctor "$@"
