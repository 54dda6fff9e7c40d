#!/usr/bin/env bash
# One rank, started by srun on its node, in the container if there is one: popsd with the variables that torchrun would
# set. Its exit status goes to a file: srun reports that of ranks which it has killed itself, and 0 when a node was lost.
set -euo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export PYTHONPATH=$POPSD_HOME${PYTHONPATH:+:$PYTHONPATH}

# Ignored until Python installs its handler: it would end a rank that still imports.
trap '' USR1
# Python gets it, too, and decides; this shell waits for its status.
trap : TERM

((SLURM_LOCALID)) || echo "node $SLURM_NODEID is $SLURMD_NODENAME"
status=0
"$POPSD_PYTHON" -m nemo_popsd "$@" || status=$?
echo "$status $SLURM_NODEID $SLURMD_NODENAME" >"$POPSD_RUN_DIR/rank-$RANK.exit" ||
  echo "popsd: error: logs: got POPSD_LOGS=$POPSD_LOGS, which cannot be written; need room there; set POPSD_LOGS" >&2
# Asked to stop, and saved: the other ranks are about to end as well and must not be killed for this one.
((status != 85)) || exit 0
exit "$status"
