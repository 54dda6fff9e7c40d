# shellcheck shell=bash
# Functions that the jobs of this directory share. Sourced; sets only shell options.
#
#   popsd_job COMMAND ARGUMENT...     one rank of `popsd COMMAND ARGUMENT...` for each task of the job
#   popsd_doctor ARGUMENT...          `popsd doctor ARGUMENT...` once on each node of the job
#
# Settings come from one file, see env.example.sh. A job sets up its settings, a log directory for this start and the
# rendezvous, checks every node, and starts the ranks. outcome.sh decides how it ends: DONE, a requeue, or an error.

set -euo pipefail

readonly SAVED_AND_STOPPED=85 # exit status of a rank that saved and stopped on a signal
readonly USER_ERROR=2         # exit status of an error that only the user can fix; such a job is not restarted

# shellcheck source=secrets.sh
source "$(dirname "${BASH_SOURCE[0]}")/secrets.sh"
# shellcheck source=outcome.sh
source "$(dirname "${BASH_SOURCE[0]}")/outcome.sh"

say() { printf '[popsd %(%F %T)T +%ds] %s\n' -1 "$SECONDS" "$*"; }

# die STATUS MESSAGE
die() {
  say "error: $2" >&2
  exit "$1"
}

popsd_job() {
  STOP_REQUESTED="" TERMINATED="" INTERRUPTED="" SRUN_PID="" REPEATER=""
  trap request_stop USR1
  trap 'INTERRUPTED=1; TERMINATED=1' TERM
  load_settings
  choose_ranks "$1"
  choose_arguments "$@"
  set_up_logs
  say "job $JOB ($SLURM_JOB_NAME), start $RESTART: $SLURM_NNODES nodes ($SLURM_JOB_NODELIST), $RANKS ranks"
  if [[ -e $JOB_DIR/DONE ]]; then
    say "done already: $JOB_DIR/DONE"
    exit 0
  fi
  ((RESTART <= POPSD_MAX_RESTARTS)) || die 1 "restarted $RESTART times; the limit is POPSD_MAX_RESTARTS=$POPSD_MAX_RESTARTS"
  choose_container
  choose_rendezvous
  show_environment
  # overwrite=true applies to the first start only; later starts resume.
  if [[ $1 == train ]] && run_has_started; then ARGUMENTS+=(overwrite=false); fi
  check_nodes "${ARGUMENTS[@]}"
  run_ranks "${ARGUMENTS[@]}"
}

# popsd_doctor ARGUMENT...: checks every node, in the container if there is one. The output goes to that of the job.
popsd_doctor() {
  load_settings
  RANKS=$SLURM_NNODES
  set_up_logs
  choose_container
  show_environment
  POPSD_WORLD_SIZE=$RANKS run_step doctor --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
    --label "${CONTAINER[@]}" bash "$POPSD_HOME/slurm/check.sh" --gpus "$GPUS_PER_NODE" "$@"
}

# Reads the settings file, then sets defaults.
load_settings() {
  local file=${POPSD_ENV:-$POPSD_HOME/slurm/env.sh} name
  if [[ -e $file || -n ${POPSD_ENV:-} ]]; then read_settings "$file"; fi
  : "${POPSD_PYTHON:=python}" "${POPSD_LOGS:=$SLURM_SUBMIT_DIR/logs}" "${POPSD_MIN_FREE_GIB:=50}"
  : "${POPSD_MAX_RESTARTS:=20}" "${POPSD_MAX_CRASHES:=3}"
  : "${CONTAINER_IMAGE:=}" "${CONTAINER_MOUNTS:=}" "${CONTAINER_ENV:=}"
  for name in POPSD_MAX_RESTARTS POPSD_MAX_CRASHES; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || die "$USER_ERROR" "settings: got $name='${!name}'; need a whole number; set $name"
  done
  RESTART=${SLURM_RESTART_COUNT:-0}
  # A task of a job array has its own id and that of the array. If both are equal, Slurm interprets the plain id as the
  # entire array, so queries and requeues of this task use ARRAY_TASK.
  JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  JOB=${JOB:-$SLURM_JOB_ID}
  # The requested GPUs, because an exclusive job is allocated all GPUs of its nodes. May have a type: h100:8.
  GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
  GPUS_PER_NODE=${GPUS_PER_NODE##*:}
  SECRET_NAMES=() SECRET_VALUES=()
  [[ -z ${POPSD_SECRETS:-} ]] || read_secrets "$POPSD_SECRETS"
  # After `sbatch --export=NONE`, srun would not pass the environment on.
  export SLURM_EXPORT_ENV=ALL
  export POPSD_HOME POPSD_PYTHON PYTHONUNBUFFERED=1
}

# read_settings FILE: sources the file like an interactive shell, in which an unset variable is not an error. A failing
# command in it ends the job.
read_settings() {
  local problem
  SETTINGS=$1
  [[ -f $SETTINGS && -r $SETTINGS ]] ||
    die "$USER_ERROR" "settings: got $SETTINGS, which is not a readable file; need a file like slurm/env.example.sh; set POPSD_ENV"
  problem=$(bash -n "$SETTINGS" 2>&1) ||
    die "$USER_ERROR" "settings: got ${problem%%$'\n'*}; need a file that bash can read; correct $SETTINGS"
  trap 'refuse_settings $? "line $LINENO"' ERR
  trap 'refuse_settings $? "an exit"' EXIT
  set +u
  # shellcheck source=env.example.sh
  source "$SETTINGS"
  set -euo pipefail
  trap - EXIT ERR
}

# refuse_settings STATUS PLACE
refuse_settings() {
  trap - EXIT ERR
  die "$USER_ERROR" "settings: got status $1 at $2 of $SETTINGS; need commands that succeed; correct that line"
}

# choose_ranks COMMAND: one rank per task of the job, with the same number on each node.
choose_ranks() {
  # SLURM_NTASKS is the effective number, even if --ntasks overrides the script's --ntasks-per-node.
  RANKS=${SLURM_NTASKS:-$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}
  RANKS_PER_NODE=$((RANKS / SLURM_NNODES))
  ((RANKS_PER_NODE * SLURM_NNODES == RANKS)) ||
    die "$USER_ERROR" "layout: got $RANKS ranks on $SLURM_NNODES nodes; need the same number on each node; set sbatch's --ntasks-per-node instead of --ntasks"
  if ((GPUS_PER_NODE && RANKS_PER_NODE > GPUS_PER_NODE)); then
    die "$USER_ERROR" "layout: got $RANKS_PER_NODE ranks and $GPUS_PER_NODE GPUs per node; need a GPU for each rank; set sbatch's --ntasks-per-node and --gpus-per-node"
  fi
  case $1 in
  convert | export) ((RANKS == 1)) || die "$USER_ERROR" "layout: got $RANKS ranks for popsd $1; need one; leave out sbatch's --nodes and --ntasks" ;;
  esac
  # srun does not inherit sbatch's --cpus-per-task.
  export SRUN_CPUS_PER_TASK=${POPSD_CPUS_PER_RANK:-$(((SLURM_CPUS_ON_NODE + RANKS_PER_NODE - 1) / RANKS_PER_NODE))}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
}

# choose_arguments COMMAND ARGUMENT...: sets ARGUMENTS. In a job array, `%a` is replaced by the index of the task, as in
# sbatch's options. The output must depend on it, because all tasks have the same command line.
choose_arguments() {
  local word written=""
  ARGUMENTS=("$@")
  [[ -n ${SLURM_ARRAY_JOB_ID:-} ]] || return 0
  for word in "${@:2}"; do
    case $1,$word in
    train,output=*) written=$word ;; # the last one counts
    train,*) ;;
    *%a*) written=$word ;;
    esac
  done
  [[ $written == *%a* ]] ||
    die "$USER_ERROR" "job array: got the same ${written:-arguments} for every task; need a separate output for each task; write %a for the index of the task, as in output=runs/x_%a"
  ARGUMENTS=("${ARGUMENTS[@]//%a/$SLURM_ARRAY_TASK_ID}")
}

# Creates the log directory of this start. All nodes must see it and be able to write there before anything is logged.
set_up_logs() {
  local problem
  JOB_DIR=$POPSD_LOGS/${SLURM_JOB_NAME//[^[:alnum:]._-]/_}-$JOB
  RUN_DIR=$JOB_DIR/start-$RESTART
  # srun interprets both as the start of a pattern, and cannot escape them everywhere.
  [[ $RUN_DIR != *[%\\]* ]] || refuse_logs "% or \\ in the path" "a path without them"
  problem=$(mkdir -p "$RUN_DIR" 2>&1) || refuse_logs "${problem##*: }" "a directory that can be created"
  export POPSD_LOGS POPSD_RUN_DIR=$RUN_DIR
  problem=$(write_to_logs 2>&1) || refuse_logs "$problem" "space on storage that all nodes share"
  ((SLURM_NNODES == 1)) || check_logs
}

# refuse_logs PROBLEM NEED
refuse_logs() {
  die "$USER_ERROR" "logs: got POPSD_LOGS=$POPSD_LOGS, $1; need $2; set POPSD_LOGS"
}

# Checks the log directory on every node, before anything else runs there.
check_logs() {
  local problem
  problem=$(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --job-name=logs \
    bash -c "$(declare -f write_to_logs); write_to_logs" 2>&1) && return 0
  exit_if_ended_from_outside "the check of the logs was interrupted" 1
  grep --quiet '^on ' <<<"$problem" || count_crash 1 "srun could not start a step (${problem//$'\n'/; })"
  problem=$(grep '^on ' <<<"$problem" | sort)
  refuse_logs "${problem//$'\n'/; }" "space on storage that all nodes share"
}

# Whether this node sees POPSD_RUN_DIR and has space there. Runs on every node and prints one line per problem.
write_to_logs() {
  local try problem file=$POPSD_RUN_DIR/.space-${SLURM_NODEID:-0} where="on ${SLURMD_NODENAME:-$HOSTNAME}"
  # A network file system may show a directory created by another node with a delay.
  for ((try = 0; try < 10; try++)); do
    [[ ! -d $POPSD_RUN_DIR ]] || break
    sleep 0.5
  done
  [[ -d $POPSD_RUN_DIR ]] || {
    echo "$where the directory that the first node created is missing"
    return 1
  }
  if problem=$({ head --bytes=65536 /dev/zero >"$file"; } 2>&1); then
    rm -f "$file"
    return 0
  fi
  rm -f "$file"
  echo "$where ${problem##*: }"
  return 1
}

# Whether an earlier start of this job reached its first step or its checkpoint.
run_has_started() {
  local log
  for log in "$JOB_DIR"/start-*/node-*.log; do
    if [[ -e $log ]] && grep -qE 'beginning at step|resuming after step' "$log"; then return 0; fi
  done
  return 1
}

# Sets CONTAINER to srun's flags for pyxis, or to nothing.
choose_container() {
  local help path
  CONTAINER=()
  [[ -n $CONTAINER_IMAGE ]] || return 0
  help=$(srun --help 2>&1)
  [[ $help == *--container-image* ]] ||
    die "$USER_ERROR" "container: got CONTAINER_IMAGE=$CONTAINER_IMAGE and an srun without --container-image; need Slurm's plugin pyxis on this cluster; install it, or unset CONTAINER_IMAGE to run bare"
  if [[ $CONTAINER_IMAGE == *.sqsh && ! -r $CONTAINER_IMAGE ]]; then
    die "$USER_ERROR" "container: got CONTAINER_IMAGE=$CONTAINER_IMAGE, which cannot be read; import it with enroot (docs/slurm.md)"
  fi
  for path in "$POPSD_HOME" "$SLURM_SUBMIT_DIR" "$POPSD_LOGS"; do
    [[ $path != *[,:]* ]] ||
      die "$USER_ERROR" "container: got the path $path, with a comma or a colon; need one that pyxis can mount; move the project, POPSD_LOGS or the directory of submission"
  done
  local mounts="$POPSD_HOME:$POPSD_HOME,$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,$POPSD_LOGS:$POPSD_LOGS"
  CONTAINER=(
    --container-image="$CONTAINER_IMAGE"
    --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    --container-workdir="$SLURM_SUBMIT_DIR"
    --no-container-mount-home
  )
}

# container_environment: prints pyxis' flag for variables whose value in the job takes precedence over that of the image.
# Called when a step starts, after all variables are set.
container_environment() {
  local name names=()
  ((${#CONTAINER[@]})) || return 0
  [[ $(srun --help 2>&1) == *--container-env* ]] || return 0
  for name in $(compgen -e); do
    case $name in
    CUDA_DEVICE_* | FI_* | GLOO_* | HF_* | MASTER_* | MLFLOW_* | NCCL_* | NVTE_* | OMP_* | POPSD_* | PYTHONUNBUFFERED) ;;
    PYTORCH_* | TORCH_NCCL_* | UCX_* | VLLM_* | WANDB_*) ;;
    *) continue ;;
    esac
    names+=("$name")
  done
  names+=("${SECRET_NAMES[@]}" ${CONTAINER_ENV:+"$CONTAINER_ENV"})
  local IFS=,
  echo "--container-env=${names[*]}"
}

# Sets the rendezvous: a name or address of the first node that other nodes can resolve, and a port derived from the job id.
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
  # Below 32768, where the kernel's ports for outgoing connections start. SLURM_JOB_ID differs for the tasks of an array.
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + RESTART % 7) % 12000))
  export MASTER_ADDR MASTER_PORT
  say "rendezvous $MASTER_ADDR:$MASTER_PORT; logs and environment: $RUN_DIR"
}

# Logs the variables that affect a run, except those that may hold a secret.
show_environment() {
  local - name
  set +x # the trace would show the values
  for name in $(compgen -e | sort); do
    case ${name^^} in
    *TOKEN* | *SECRET* | *KEY* | *PASS* | *CREDENTIAL* | *AUTH*) continue ;;
    SLURM_JOB_* | SLURM_N* | SLURM_ARRAY_* | SLURM_RESTART_COUNT | SLURM_GPUS* | SLURM_TASKS_PER_NODE) ;;
    CONTAINER_* | CUDA_* | FI_* | GLOO_* | MASTER_* | NCCL_* | NVTE_* | OMP_* | POPSD_* | TORCH_* | UCX_*) ;;
    *) continue ;;
    esac
    is_secret "$name" "${!name}" || printf '%s=%q\n' "$name" "${!name}"
  done | sed 's|://[^/@]*@|://...@|g' >"$RUN_DIR/environment" # user:password@host
}

# check_nodes COMMAND ARGUMENT...: checks devices, disk space, paths, and that all nodes share the output.
check_nodes() {
  local status=0 command=$1 options=(--gpus "$GPUS_PER_NODE" --free-gib "$POPSD_MIN_FREE_GIB")
  shift
  case $command in
  train) options+=("$@") ;;
  evaluate) options+=(--evaluate "$@") ;;
  esac
  POPSD_WORLD_SIZE=$RANKS run_step check --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
    --output="$RUN_DIR/check-%n.log" "${CONTAINER[@]}" bash "$POPSD_HOME/slurm/check.sh" "${options[@]}" || status=$?
  if ((status)) || [[ $TERMINATED ]]; then
    exit_if_ended_from_outside "the checks were interrupted" $((status ? status : 1))
    conclude_check "$status"
  fi
  say "checks passed on $SLURM_NNODES nodes"
}

# run_step NAME ARGUMENT...: srun with the secrets in its environment.
run_step() {
  local flag
  flag=$(container_environment)
  (srun_with_secrets --job-name="$1" ${flag:+"$flag"} "${@:2}")
}

# run_ranks COMMAND ARGUMENT...
run_ranks() {
  local code flag status=127
  say "starting $RANKS ranks of popsd $1; their output: $RUN_DIR/node-*.log"
  flag=$(container_environment)
  # --wait: the last rank may still write a checkpoint long after the others have ended.
  (srun_with_secrets --ntasks="$RANKS" --ntasks-per-node="$RANKS_PER_NODE" --kill-on-bad-exit=1 --wait=1800 --label \
    --job-name="$1" --output="$RUN_DIR/node-%n.log" ${flag:+"$flag"} "${CONTAINER[@]}" \
    bash "$POPSD_HOME/slurm/rank.sh" "$@") &
  SRUN_PID=$!
  [[ ! $STOP_REQUESTED ]] || request_stop
  while :; do
    INTERRUPTED=""
    code=0
    wait "$SRUN_PID" || code=$?
    ((code == 127)) || status=$code # 127: the process has been waited for
    [[ $INTERRUPTED ]] || break
  done
  [[ ! $REPEATER ]] || kill "$REPEATER" 2>/dev/null || true
  conclude "$status"
}

# Before the time limit, Slurm sends USR1 only to this shell. A rank that is still importing ignores it, so this function
# sends it to all ranks repeatedly until they have ended.
request_stop() {
  INTERRUPTED=1 STOP_REQUESTED=1
  if [[ $SRUN_PID && ! $REPEATER ]]; then
    say "asking all ranks to save and stop"
    repeat_usr1 "$SRUN_PID" &
    REPEATER=$!
  fi
}

repeat_usr1() {
  while kill -USR1 "$1" 2>/dev/null; do sleep 5; done
}
