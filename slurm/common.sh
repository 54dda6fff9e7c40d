# shellcheck shell=bash
# What the jobs of this directory have in common. Sourced; defines functions and sets nothing but shell options.
#
#   popsd_job COMMAND ARGUMENT...     one rank of `popsd COMMAND ARGUMENT...` for each task of the job
#
# Settings come from one file, see env.example.sh. What happens, in order: settings, a directory of logs for this start,
# the rendezvous, checks on every node, the ranks, and a conclusion: DONE, a requeue, or an end.

set -euo pipefail

readonly SAVED_AND_STOPPED=85 # exit status of a rank that was asked to stop, and has saved
readonly USER_ERROR=2         # exit status of what starting again cannot mend

say() { printf '[popsd %(%F %T)T +%ds] %s\n' -1 "$SECONDS" "$*"; }

# die STATUS MESSAGE
die() {
  say "error: $2" >&2
  exit "$1"
}

popsd_job() {
  STOP_ASKED="" TERMINATED="" INTERRUPTED="" SRUN_PID="" REPEATER=""
  trap ask_to_stop USR1
  trap 'INTERRUPTED=1; TERMINATED=1' TERM
  load_settings
  set_up_logs
  say "job $SLURM_JOB_ID ($SLURM_JOB_NAME), start $RESTART: $SLURM_NNODES nodes ($SLURM_JOB_NODELIST), $RANKS ranks"
  if [[ -e $JOB_DIR/DONE ]]; then
    say "done already: $JOB_DIR/DONE"
    exit 0
  fi
  ((RESTART <= POPSD_MAX_RESTARTS)) || die 1 "started $RESTART times again; the bound is POPSD_MAX_RESTARTS=$POPSD_MAX_RESTARTS"
  choose_container
  choose_rendezvous
  show_environment
  local words=("$@")
  # What the first start was allowed to overwrite, the next one resumes.
  if [[ $1 == train ]] && run_has_begun; then words+=(overwrite=false); fi
  check_nodes "${words[@]}"
  run_ranks "${words[@]}"
}

# Settings: the file, then defaults. Secrets go into the environment and nowhere else.
load_settings() {
  local file=${POPSD_ENV:-$POPSD_HOME/slurm/env.sh}
  if [[ -e $file ]]; then
    # shellcheck source=env.example.sh
    source "$file"
  elif [[ -n ${POPSD_ENV:-} ]]; then
    die $USER_ERROR "settings: got POPSD_ENV=$file, which does not exist; need a file like slurm/env.example.sh"
  fi
  : "${POPSD_PYTHON:=python}" "${POPSD_LOGS:=$SLURM_SUBMIT_DIR/logs}" "${POPSD_MIN_FREE_GIB:=50}"
  : "${POPSD_MAX_RESTARTS:=20}" "${POPSD_MAX_CRASHES:=3}" "${CONTAINER_IMAGE:=}" "${CONTAINER_MOUNTS:=}"
  RESTART=${SLURM_RESTART_COUNT:-0}
  RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-$SLURM_NNODES} / SLURM_NNODES))}
  RANKS=$((SLURM_NNODES * RANKS_PER_NODE))
  # What was asked for: an exclusive job is given all GPUs of its nodes. With a kind in front: h100:8.
  GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
  GPUS_PER_NODE=${GPUS_PER_NODE##*:}
  if ((GPUS_PER_NODE && RANKS_PER_NODE > GPUS_PER_NODE)); then
    die $USER_ERROR "layout: got $RANKS_PER_NODE ranks and $GPUS_PER_NODE GPUs a node; need a GPU for each rank; set sbatch's --ntasks-per-node and --gpus-per-node"
  fi
  if [[ -n ${POPSD_SECRETS:-} ]]; then
    [[ $(stat --format=%a "$POPSD_SECRETS" 2>&1) == *00 ]] ||
      die $USER_ERROR "POPSD_SECRETS: got $POPSD_SECRETS, which is missing or which others can read; need a file of yours alone; chmod 600 it"
    set -a
    # shellcheck source=/dev/null
    source "$POPSD_SECRETS"
    set +a
  fi
  # After `sbatch --export=NONE` srun would pass nothing on; and srun does not inherit sbatch's --cpus-per-task.
  export SLURM_EXPORT_ENV=ALL
  export SRUN_CPUS_PER_TASK=${POPSD_CPUS_PER_RANK:-$(((SLURM_CPUS_ON_NODE + RANKS_PER_NODE - 1) / RANKS_PER_NODE))}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
  export POPSD_HOME POPSD_PYTHON PYTHONUNBUFFERED=1
}

set_up_logs() {
  JOB_DIR=$POPSD_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID
  RUN_DIR=$JOB_DIR/start-$RESTART
  mkdir -p "$RUN_DIR" || die $USER_ERROR "logs: cannot make $RUN_DIR; set POPSD_LOGS to storage that all nodes share"
  export POPSD_RUN_DIR=$RUN_DIR
}

# Whether an earlier start of this job came as far as its first step or its checkpoint.
run_has_begun() {
  local log
  for log in "$JOB_DIR"/start-*/node-*.log; do
    if [[ -e $log ]] && grep -qE 'beginning at step|resuming after step' "$log"; then return 0; fi
  done
  return 1
}

# CONTAINER: srun's flags for pyxis, or nothing.
choose_container() {
  CONTAINER=()
  [[ -n $CONTAINER_IMAGE ]] || return 0
  [[ $(srun --help 2>&1) == *--container-image* ]] ||
    die $USER_ERROR "container: got CONTAINER_IMAGE=$CONTAINER_IMAGE and an srun without --container-image; need Slurm's plugin pyxis on this cluster; install it, or unset CONTAINER_IMAGE to run bare"
  if [[ $CONTAINER_IMAGE == *.sqsh && ! -r $CONTAINER_IMAGE ]]; then
    die $USER_ERROR "container: got CONTAINER_IMAGE=$CONTAINER_IMAGE, which cannot be read; import it with enroot (docs/slurm.md)"
  fi
  local mounts="$POPSD_HOME:$POPSD_HOME,$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,$POPSD_LOGS:$POPSD_LOGS"
  CONTAINER=(
    --container-image="$CONTAINER_IMAGE"
    --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    --container-workdir="$SLURM_SUBMIT_DIR"
    --no-container-mount-home
  )
}

# The first node, by a name or an address that the others can resolve, and a port that no other job of it takes.
choose_rendezvous() {
  local hosts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${hosts[0]}
  if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    local node
    node=$(scontrol show node --oneliner "$MASTER_ADDR")
    node=${node#* NodeAddr=}
    MASTER_ADDR=${node%% *}
  fi
  # Below 32768, where the kernel takes ports for outgoing connections.
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + RESTART) % 12000))
  export MASTER_ADDR MASTER_PORT
}

# Variables that explain a run, without those that may hold a secret.
show_environment() {
  local name
  for name in $(compgen -e | sort); do
    case $name in
    *TOKEN* | *SECRET* | *KEY* | *PASSWORD* | *PASSWD* | *CREDENTIAL*) continue ;;
    SLURM_JOB_* | SLURM_N* | SLURM_RESTART_COUNT | SLURM_GPUS* | SLURM_TASKS_PER_NODE) ;;
    CONTAINER_* | CUDA_* | FI_* | GLOO_* | MASTER_* | NCCL_* | NVTE_* | OMP_* | POPSD_* | TORCH_* | UCX_*) ;;
    *) continue ;;
    esac
    printf '%s=%q\n' "$name" "${!name}"
  done | sed 's|://[^/@]*@|://...@|g' >"$RUN_DIR/environment" # user:password@host
  say "rendezvous $MASTER_ADDR:$MASTER_PORT; logs and environment: $RUN_DIR"
}

# check_nodes COMMAND ARGUMENT...: devices, room, paths, and an output that all nodes share.
check_nodes() {
  local command=$1 asked=(--gpus "$GPUS_PER_NODE" --free-gib "$POPSD_MIN_FREE_GIB")
  shift
  case $command in
  train) asked+=("$@") ;;
  evaluate) asked+=(--evaluate "$@") ;;
  esac
  POPSD_WORLD_SIZE=$RANKS srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
    --job-name=check --output="$RUN_DIR/check-%n.log" "${CONTAINER[@]}" \
    bash "$POPSD_HOME/slurm/check.sh" "${asked[@]}" || {
    tail --verbose --lines=5 "$RUN_DIR"/check-*.log >&2
    die $USER_ERROR "the checks before the start found the above; the rest is in $RUN_DIR/check-*.log"
  }
  say "checks passed on $SLURM_NNODES nodes"
}

# run_ranks COMMAND ARGUMENT...
run_ranks() {
  local code status=127
  say "starting $RANKS ranks of popsd $1; their output: $RUN_DIR/node-*.log"
  # --wait: the last rank may write a checkpoint long after the others have ended.
  srun --ntasks="$RANKS" --ntasks-per-node="$RANKS_PER_NODE" --kill-on-bad-exit=1 --wait=1800 --label \
    --job-name="$1" --output="$RUN_DIR/node-%n.log" "${CONTAINER[@]}" bash "$POPSD_HOME/slurm/rank.sh" "$@" &
  SRUN_PID=$!
  [[ ! $STOP_ASKED ]] || ask_to_stop
  while :; do
    INTERRUPTED=""
    code=0
    wait "$SRUN_PID" || code=$?
    ((code == 127)) || status=$code # 127: it was waited for already
    [[ $INTERRUPTED ]] || break
  done
  [[ ! $REPEATER ]] || kill "$REPEATER" 2>/dev/null || true
  conclude "$status"
}

# Slurm sends USR1 to this shell alone, before the time limit. Each rank must hear it; one that is still importing cannot,
# so all are told again until they have ended.
ask_to_stop() {
  INTERRUPTED=1 STOP_ASKED=1
  if [[ $SRUN_PID && ! $REPEATER ]]; then
    say "asking all ranks to save and stop"
    repeat_usr1 "$SRUN_PID" &
    REPEATER=$!
  fi
}

repeat_usr1() {
  while kill -USR1 "$1" 2>/dev/null; do sleep 5; done
}

# conclude STATUS: DONE, a requeue, or an end.
conclude() {
  local status=$1
  if ended_with 0 $SAVED_AND_STOPPED && ! ended_with 0; then
    echo 0 >"$JOB_DIR/crashes"
    start_again "saved and stopped" $SAVED_AND_STOPPED
  fi
  if ended_with 0; then
    printf 'job %s, start %s, %(%F %T)T\n' "$SLURM_JOB_ID" "$RESTART" -1 >"$JOB_DIR/DONE"
    say "done: $JOB_DIR/DONE"
    exit 0
  fi
  show_failure "$status"
  ((status)) || status=1
  if some_ended_with $USER_ERROR; then die $USER_ERROR "starting again would not mend this"; fi
  # The loss of a node, a preemption: no failure of the run's own.
  if ended_from_outside; then start_again "ended with $status" "$status"; fi
  local crashes=0
  [[ ! -e $JOB_DIR/crashes ]] || crashes=$(<"$JOB_DIR/crashes")
  echo $((++crashes)) >"$JOB_DIR/crashes"
  if ((crashes > POPSD_MAX_CRASHES)); then
    die "$status" "failed $crashes times in a row; the bound is POPSD_MAX_CRASHES=$POPSD_MAX_CRASHES"
  fi
  start_again "failed ($crashes in a row)" "$status"
}

# start_again WHY STATUS: requeue, unless the job is being cancelled; STATUS is for the end.
start_again() {
  # A cancelled job's ranks save, too; a requeue would bring the job back.
  if ended_from_outside; then
    say "$1; ended from outside, not requeued by itself"
    exit "$2"
  fi
  ((RESTART < POPSD_MAX_RESTARTS)) || die "$2" "$1; not requeued: POPSD_MAX_RESTARTS=$POPSD_MAX_RESTARTS is reached"
  say "$1; requeueing"
  scontrol requeue "$SLURM_JOB_ID" || die "$2" "$1; Slurm refuses the requeue; submit the same command again to resume"
  # Slurm ends this shell. If it ended by itself its status could count as that of the job.
  sleep 600
  exit "$2"
}

# Whether Slurm is ending the job already: cancelled, preempted without grace, a node lost.
ended_from_outside() {
  [[ $TERMINATED || $(scontrol show job "$SLURM_JOB_ID") != *JobState=RUNNING* ]]
}

# ended_with STATUS...: whether every rank has told one of these. srun's own status is no proof of anything: that of ranks
# which it has killed, or 0 where it has lost a node.
ended_with() {
  local rank status
  for ((rank = 0; rank < RANKS; rank++)); do
    status=$(told_by "$rank")
    [[ $status && " $* " == *" $status "* ]] || return 1
  done
}

# some_ended_with STATUS
some_ended_with() {
  local rank
  for ((rank = 0; rank < RANKS; rank++)); do
    [[ $(told_by "$rank") != "$1" ]] || return 0
  done
  return 1
}

told_by() {
  local status=""
  [[ ! -e $RUN_DIR/rank-$1.exit ]] || read -r status _ <"$RUN_DIR/rank-$1.exit"
  printf '%s' "$status"
}

# The rank that ended first, and the last lines of its node.
show_failure() {
  local first node
  first=$(grep --files-without-match '^0 ' "$RUN_DIR"/rank-*.exit 2>/dev/null | xargs --no-run-if-empty --delimiter='\n' \
    ls -tr | sed --quiet 1p) || true
  if [[ -z $first ]]; then
    say "error: srun ended with $1 and no rank told why; see $RUN_DIR/node-*.log" >&2
    return 0
  fi
  local status host
  read -r status node host <"$first"
  say "error: $(basename "$first" .exit) on $host ended first, with $status; the last lines of its node:" >&2
  tail --lines=20 "$RUN_DIR/node-$node.log" >&2 || true
}
