#!/usr/bin/env bash
# What a run needs, looked at on one node, in the container if there is one. Its exit status goes to a file: srun reports
# that of checks which were killed as well.
set -euo pipefail

export WORLD_SIZE=$POPSD_WORLD_SIZE PYTHONPATH=$POPSD_HOME${PYTHONPATH:+:$PYTHONPATH}
mark=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
echo "node $SLURM_NODEID is $SLURMD_NODENAME"
status=2
if ! command -v "$POPSD_PYTHON" >/dev/null; then
  echo "popsd: error: settings: got POPSD_PYTHON=$POPSD_PYTHON, which is not there; need an interpreter that every node has at that path, in the container if there is one; set POPSD_PYTHON"
else
  status=0
  "$POPSD_PYTHON" -m nemo_popsd doctor "$@" --sharing "$SLURM_NODEID" "$SLURM_NNODES" "$mark" || status=$?
fi
echo "$status" >"$POPSD_RUN_DIR/check-$SLURM_NODEID.exit"
exit "$status"
