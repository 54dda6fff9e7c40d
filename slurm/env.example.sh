# shellcheck shell=bash
# Everything that depends on the cluster. Copy it, fill it in, and nothing else needs to change:
#
#   cp slurm/env.example.sh slurm/env.sh          # ignored by git
#   source slurm/env.sh && sbatch --nodes=4 slurm/train.sh conf/qwen3_8b.yaml
#
# It is read twice: by you before sbatch (the SBATCH_* lines), and by the job, which takes slurm/env.sh or the file that
# POPSD_ENV names. What is set in the environment already wins here, since each line says so: ${NAME:-...}.

# For sbatch. Any option of it has such a variable (man sbatch, "INPUT ENVIRONMENT VARIABLES").
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-}
export SBATCH_PARTITION=${SBATCH_PARTITION:-}
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-04:00:00}
[[ $SBATCH_ACCOUNT ]] || unset SBATCH_ACCOUNT
[[ $SBATCH_PARTITION ]] || unset SBATCH_PARTITION

# An image on storage that all nodes share (docs/slurm.md), or docker://... Empty: no container.
export CONTAINER_IMAGE=${CONTAINER_IMAGE:-}
# What the job reads and writes besides this project and the directory of the submission: SRC:DST,SRC:DST
export CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}
# Where the image sets a variable, too, its own value wins under pyxis, except for those that the job names: NCCL_*, GLOO_*,
# HF_*, WANDB_*, what is in POPSD_SECRETS, and others (slurm/common.sh, container_environment). Further ones: NAME,NAME
export CONTAINER_ENV=${CONTAINER_ENV:-}

# The interpreter: in the container, or of a virtual environment that all nodes see.
export POPSD_PYTHON=${POPSD_PYTHON:-python}
# Logs of all jobs, on storage that all nodes share. Default: logs/ where the job was submitted.
# export POPSD_LOGS=/shared/me/popsd-logs
# GiB that must be free at the run's `output`.
export POPSD_MIN_FREE_GIB=${POPSD_MIN_FREE_GIB:-50}
# Bounds: starts after the first one, whatever their cause; failures in a row.
export POPSD_MAX_RESTARTS=${POPSD_MAX_RESTARTS:-20}
export POPSD_MAX_CRASHES=${POPSD_MAX_CRASHES:-3}
# Options of sbatch for the evaluation at the end of slurm/pipeline.sh, whose own options are those of the training.
# export POPSD_EVALUATE_OPTIONS="--ntasks-per-node=4 --gpus-per-node=4"
# Cores of a rank. Default: the node's, divided by its ranks.
# export POPSD_CPUS_PER_RANK=12
# A file of lines WANDB_API_KEY=..., readable by you alone (chmod 600). It is read, not run: no $NAME, no $(command); a value
# with spaces or special characters stands in single quotes. What is in it is in no log, whatever its name.
# export POPSD_SECRETS=$HOME/.config/popsd-secrets

# The network. Nothing is needed where NCCL finds InfiniBand by itself; see what your site says.
# export NCCL_SOCKET_IFNAME=eth0        # interface of the rendezvous
# export GLOO_SOCKET_IFNAME=eth0        # the same for what ranks exchange on the CPU: set both
# export NCCL_IB_HCA=mlx5               # adapters for the data
# export NCCL_DEBUG=WARN

# Modules, where jobs do not find srun or python without.
# module load slurm python/3.11
