# shellcheck shell=bash
# The only file that depends on the cluster. Copy it and fill it in:
#
#   cp slurm/env.example.sh slurm/env.sh          # ignored by git
#   source slurm/env.sh && sbatch --nodes=4 slurm/train.sh conf/qwen3_8b.yaml
#
# It is used twice: you source it before sbatch (for the SBATCH_* lines), and the job reads slurm/env.sh or the file in
# POPSD_ENV. Values from the environment take precedence, because each line has the form ${NAME:-...}.

# For sbatch; each of its options has such a variable (man sbatch, "INPUT ENVIRONMENT VARIABLES").
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-}
export SBATCH_PARTITION=${SBATCH_PARTITION:-}
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-04:00:00}
[[ $SBATCH_ACCOUNT ]] || unset SBATCH_ACCOUNT
[[ $SBATCH_PARTITION ]] || unset SBATCH_PARTITION

# An image on storage that all nodes share (docs/slurm.md), or docker://... Empty: no container.
export CONTAINER_IMAGE=${CONTAINER_IMAGE:-}
# Additional directories to mount, besides this project and the directory of submission: SRC:DST,SRC:DST
export CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}
# Under pyxis, variables that the image sets take precedence, except for NCCL_*, GLOO_*, HF_*, WANDB_*, the variables in
# POPSD_SECRETS, and others (slurm/common.sh, container_environment). Additional exceptions: NAME,NAME
export CONTAINER_ENV=${CONTAINER_ENV:-}

# The Python interpreter: in the container, or in a virtual environment that all nodes see.
export POPSD_PYTHON=${POPSD_PYTHON:-python}
# Logs of all jobs, on storage that all nodes share. Default: logs/ where the job was submitted.
# export POPSD_LOGS=/shared/me/popsd-logs
# Free space in GiB that a run needs at its `output`.
export POPSD_MIN_FREE_GIB=${POPSD_MIN_FREE_GIB:-50}
# Limits: restarts for any reason; consecutive failures.
export POPSD_MAX_RESTARTS=${POPSD_MAX_RESTARTS:-20}
export POPSD_MAX_CRASHES=${POPSD_MAX_CRASHES:-3}
# Options of sbatch for the evaluation of slurm/pipeline.sh; options on its command line apply to the training.
# export POPSD_EVALUATE_OPTIONS="--ntasks-per-node=4 --gpus-per-node=4"
# 1: slurm/train.sh, started instead of submitted, rehearses the run on this host and then submits it (docs/slurm.md).
# export POPSD_REHEARSE=1
# Cores per rank. Default: the node's cores divided by its ranks.
# export POPSD_CPUS_PER_RANK=12
# A file of lines WANDB_API_KEY=..., readable only by you (chmod 600). It is parsed, not executed: no $NAME, no $(command);
# values with spaces or special characters need single quotes. Its values are not logged, whatever their variables are called.
# export POPSD_SECRETS=$HOME/.config/popsd-secrets

# Network settings. Not needed if NCCL finds InfiniBand; see the documentation of your site.
# export NCCL_SOCKET_IFNAME=eth0        # interface of the rendezvous
# export GLOO_SOCKET_IFNAME=eth0        # interface of gloo, which ranks use on the CPU: set both
# export NCCL_IB_HCA=mlx5               # adapters for the data
# export NCCL_DEBUG=WARN

# Modules, if jobs do not find srun or python without them.
# module load slurm python/3.11
