#!/usr/bin/env bash
# In place of Python, for jobs whose scripts are tested and not the training: prints what a rank is given, then does what
# a word like act=fail says. POPSD_PYTHON names it.
set -euo pipefail
[[ $1 == -m && $2 == nemo_popsd ]]
echo "asked: ${*:3}"
if [[ $3 == doctor ]]; then
  [[ " $* " != *" act=slow_check "* ]] || sleep 100
  exit 0
fi
for name in RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS SLURM_RESTART_COUNT \
  SEEN_CONTAINER_IMAGE SEEN_CONTAINER_MOUNTS SEEN_CONTAINER_WORKDIR SEEN_NO_CONTAINER_MOUNT_HOME \
  SEEN_CONTAINER_ENV; do
  echo "$name=${!name:-}"
done
secret=${WANDB_API_KEY:-}
echo "secret of ${#secret} letters"
[[ " $* " == *" act=wait "* ]] || echo "beginning at step 1"

# end_first STATUS: rank 0 ends once all have begun, the others when they are ended.
end_first() {
  touch "$POPSD_RUN_DIR/begun-$RANK"
  [[ $RANK == 0 ]] || sleep 100
  until begun=("$POPSD_RUN_DIR"/begun-*) && ((${#begun[@]} == WORLD_SIZE)); do sleep 0.1; done
  exit "$1"
}

case " $* " in
*" act=fail "*) end_first 7 ;;
*" act=user_error "*) end_first 2 ;;
*" act=wait "*) # as the trainer does: saves where it is asked to, and says so by its status
  # A shell could not: it does not hear what was ignored when it began.
  exec "$STAND_IN_PYTHON" -c '
import os, signal, time
def stop(*_):
    os.write(1, b"saved\n")
    os._exit(85)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
print("beginning at step 1", flush=True)
time.sleep(600)'
  ;;
esac
