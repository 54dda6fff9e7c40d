#!/usr/bin/env bash
# Runs one rank, started by srun on its node, in the container if there is one: popsd with the variables of torchrun. The
# exit status is written to a file, because srun reports the status of ranks that it killed, and 0 after losing a node.
set -euo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export PYTHONPATH=$POPSD_HOME${PYTHONPATH:+:$PYTHONPATH}

# Ignored until Python installs its handler, because it would kill a rank that is still importing.
trap '' USR1
# Python also receives TERM and handles it; this shell waits for its status.
trap : TERM

((SLURM_LOCALID)) || echo "node $SLURM_NODEID is $SLURMD_NODENAME"
status=0
"$POPSD_PYTHON" -m nemo_popsd "$@" || status=$?
echo "$status $SLURM_NODEID $SLURMD_NODENAME" >"$POPSD_RUN_DIR/rank-$RANK.exit" ||
  echo "popsd: error: logs: got POPSD_LOGS=$POPSD_LOGS, which cannot be written; need space there; set POPSD_LOGS" >&2
# Saved and stopped on a signal: the other ranks are about to end as well, and must not be killed because of this one.
((status != 85)) || exit 0
exit "$status"
