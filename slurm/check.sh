#!/usr/bin/env bash
# What a run needs, looked at on one node, in the container if there is one.
set -euo pipefail

export WORLD_SIZE=$POPSD_WORLD_SIZE PYTHONPATH=$POPSD_HOME${PYTHONPATH:+:$PYTHONPATH}
mark=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
echo "node $SLURM_NODEID is $SLURMD_NODENAME"
exec "$POPSD_PYTHON" -m nemo_popsd doctor "$@" --sharing "$SLURM_NODEID" "$SLURM_NNODES" "$mark"
