# shellcheck shell=bash
# The end of a job: evaluates the status of its steps, shows errors, and decides about a requeue. Sourced by common.sh.

# conclude STATUS: writes DONE, requeues or fails, after srun has ended with STATUS.
conclude() {
  local status=$1 problem
  if ended_with 0; then
    printf 'job %s, start %s, %(%F %T)T\n' "$JOB" "$RESTART" -1 >"$JOB_DIR/DONE" ||
      say "error: POPSD_LOGS=$POPSD_LOGS cannot be written: a restart of this job checks the run itself"
    say "done: $JOB_DIR/DONE"
    exit 0
  fi
  # The statuses of the ranks may be missing if the disk is full.
  problem=$(write_to_logs 2>&1) || refuse_logs "$problem" "space for the logs of a running job"
  if ended_with 0 "$SAVED_AND_STOPPED"; then
    echo 0 >"$JOB_DIR/crashes"
    start_again "saved and stopped" "$SAVED_AND_STOPPED"
  fi
  show_failure "$status"
  ((status)) || status=1
  if some_ended_with rank "$USER_ERROR"; then die "$USER_ERROR" "a restart would not change this"; fi
  # The loss of a node or a preemption is not a failure of the run.
  if ended_from_outside; then start_again "ended with $status" "$status"; fi
  count_crash "$status" "failed"
}

# conclude_check STATUS: fails if a node found an error that only the user can fix; otherwise acts as after a crash.
conclude_check() {
  local status
  show_check
  # 1: the check found a problem. 2: its arguments are wrong, or Python is missing.
  for status in 1 "$USER_ERROR"; do
    if some_ended_with check "$status"; then
      die "$USER_ERROR" "the checks before the start found the problems above; full output: $RUN_DIR/check-*.log"
    fi
  done
  count_crash "$1" "the checks could not run"
}

# count_crash STATUS WHAT: restarts the job at most POPSD_MAX_CRASHES times in a row, then exits with STATUS.
count_crash() {
  local crashes=0
  [[ ! -e $JOB_DIR/crashes ]] || crashes=$(<"$JOB_DIR/crashes")
  echo $((++crashes)) >"$JOB_DIR/crashes"
  ((crashes <= POPSD_MAX_CRASHES)) ||
    die "$1" "$2 $crashes times in a row; the limit is POPSD_MAX_CRASHES=$POPSD_MAX_CRASHES"
  start_again "$2 ($crashes in a row)" "$1"
}

# start_again WHY STATUS: requeues the job, or exits with STATUS if it is being cancelled.
start_again() {
  # The ranks of a cancelled job also save; a requeue would restart the job.
  exit_if_ended_from_outside "$1" "$2"
  ((RESTART < POPSD_MAX_RESTARTS)) || die "$2" "$1; not requeued: POPSD_MAX_RESTARTS=$POPSD_MAX_RESTARTS is reached"
  say "$1; requeueing"
  scontrol requeue "$JOB" || die "$2" "$1; Slurm refuses the requeue; submit the same command again to resume"
  # Slurm ends this shell. If it exited earlier, its status could become that of the job.
  sleep 600
  exit "$2"
}

# exit_if_ended_from_outside WHAT STATUS
exit_if_ended_from_outside() {
  ended_from_outside || return 0
  say "$1; ended from outside, not requeued by itself"
  exit "$2"
}

# Whether Slurm is ending the job: cancelled, preempted without grace time, or a node lost.
ended_from_outside() {
  local try record
  [[ -z ${TERMINATED:-} ]] || return 0
  # A controller that does not answer for a moment must not end the chain of restarts.
  for ((try = 0; try < 6; try++)); do
    if record=$(scontrol show job "$JOB" 2>/dev/null); then
      [[ $record != *JobState=RUNNING* ]]
      return
    fi
    sleep 10
  done
}

# ended_with STATUS...: whether every rank has written one of these statuses. The status of srun is not reliable: it may be
# that of ranks that srun killed, or 0 after the loss of a node.
ended_with() {
  local rank status
  for ((rank = 0; rank < RANKS; rank++)); do
    status=$(status_in "$RUN_DIR/rank-$rank.exit")
    [[ $status && " $* " == *" $status "* ]] || return 1
  done
}

# some_ended_with rank|check STATUS
some_ended_with() {
  local file
  for file in "$RUN_DIR/$1"-*.exit; do
    [[ $(status_in "$file") != "$2" ]] || return 0
  done
  return 1
}

# status_in FILE: the status that a rank or a check has written to the file; empty if it could not write it.
status_in() {
  local status=""
  [[ ! -e $1 ]] || read -r status _ <"$1" || true
  printf '%s' "$status"
}

# Shows the problems that the checks found, only the lines with a fix; nodes with the same problems are shown together.
show_check() {
  local log text node lines=() found=()
  local -A nodes=()
  for log in "$RUN_DIR"/check-*.log; do
    [[ -e $log ]] || continue
    node=$(sed --quiet '1s/^node [0-9]* is //p' "$log")
    # From the table of `popsd doctor`, whose columns are padded, the problems that stop a run.
    text=$(grep --extended-regexp '^popsd: error|: error: |^ +(failed|missing) ' "$log" | sed -E 's/ {2,}/  /g') ||
      text=$(tail --lines=5 "$log")
    text=${text:-(nothing)}
    [[ ${nodes[$text]:-} ]] || found+=("$text")
    nodes[$text]+=" ${node:-?} ($(basename "$log"))"
  done
  ((${#found[@]})) || say "error: no node could start its check; the lines of srun above state the reason" >&2
  for text in "${found[@]}"; do
    say "error: found on${nodes[$text]}:" >&2
    mapfile -t lines <<<"$text"
    printf '  %s\n' "${lines[@]}" >&2
  done
}

# Shows the errors that ranks reported, the rank that ended first, and the last lines of its node.
show_failure() {
  local first node status host
  # The report about dead ranks, or about a reached limit, may be in the log of any node.
  grep --no-filename 'popsd: error' "$RUN_DIR"/node-*.log 2>/dev/null |
    awk '{ line = $0; sub(/^ *[0-9]+: /, "", line) } !seen[line]++' | head --lines=10 >&2 || true
  first=$(grep --files-without-match --extended-regexp "^(0|$SAVED_AND_STOPPED) " "$RUN_DIR"/rank-*.exit 2>/dev/null | xargs --no-run-if-empty --delimiter='\n' \
    ls -tr | sed --quiet 1p) || true
  if [[ -z $first ]]; then
    say "error: srun ended with $1 and no rank reported a reason; see $RUN_DIR/node-*.log" >&2
    return 0
  fi
  read -r status node host <"$first" || true
  say "error: $(basename "$first" .exit) on $host ended first, with $status; the last lines of its node:" >&2
  tail --lines=20 "$RUN_DIR/node-$node.log" >&2 || true
}
