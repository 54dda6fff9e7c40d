#!/usr/bin/env bash
# Checks whether one node meets the needs of a run, in the container if there is one. The exit status is written to a file,
# because srun also reports the status of killed checks.
set -euo pipefail

export WORLD_SIZE=$POPSD_WORLD_SIZE PYTHONPATH=$POPSD_HOME${PYTHONPATH:+:$PYTHONPATH}
token=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
echo "node $SLURM_NODEID is $SLURMD_NODENAME"
status=2
if ! command -v "$POPSD_PYTHON" >/dev/null; then
  echo "popsd: error: settings: got POPSD_PYTHON=$POPSD_PYTHON, which is missing; need an interpreter at that path on every node, in the container if there is one; set POPSD_PYTHON"
else
  status=0
  "$POPSD_PYTHON" -m nemo_popsd doctor "$@" --sharing "$SLURM_NODEID" "$SLURM_NNODES" "$token" || status=$?
fi
echo "$status" >"$POPSD_RUN_DIR/check-$SLURM_NODEID.exit"
exit "$status"
