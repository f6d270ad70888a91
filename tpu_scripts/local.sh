#!/usr/bin/env bash
# Runs a program as N processes on this machine, and restarts it if it is lost. launch.sh calls it.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
Usage: local.sh --logs=DIR [--processes=N] [--restarts=R] [--dry-run] -- COMMAND …

  --logs=DIR      process i appends to DIR/worker-i.log; DIR/command.txt holds the command
  --processes=N   number of processes (default 1); they find each other by JAX_COORDINATOR_ADDRESS etc.
  --restarts=R    how often to restart after status 75 or a kill (default 2)
  --dry-run       print the commands and do nothing

The output of process 0 is also shown. If a process fails, the others have GRACE_SECONDS (default 75: they notice within
60) to end before they are killed. SIGINT, SIGTERM and SIGHUP are passed on once; a second one kills. The exit status is
the most telling one: an error that the user must fix before 75 (the same command resumes) before a kill.
EOF
}

processes=1 restarts=2 logs='' dry_run=0
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --processes=*) processes=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "unknown option $1" ;;
  esac
  shift
done
[[ $logs ]] || die '--logs=DIR is missing'
(($#)) || die 'the command is missing; give it after --'

pids=() signalled=''
kill_all() { for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || :; done; }
pass_on() {
  if [[ $signalled ]]; then kill_all; else kill "-$1" "${pids[@]}" 2>/dev/null || :; fi
  signalled=$1
}

start_all() { # or prints the commands
  local i peers=() port
  while port=$((20000 + RANDOM % 12000)) && (: <"/dev/tcp/localhost/$port") 2>/dev/null; do :; done # port in use
  for ((i = 0; i < processes; i++)); do
    if ((processes > 1)); then
      peers=("JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i")
    fi
    if ((dry_run)); then
      quoted ${PYTHONPATH:+"PYTHONPATH=$PYTHONPATH"} "${peers[@]}" "$@" && printf '%b' "$end"
    else
      in_new_session env "${peers[@]}" "$@" >>"$logs/worker-$i.log" 2>&1 &
      pids+=($!)
    fi
  done
}

# Starts all, waits for all, sets `status`.
run_once() {
  local i running shown failed='' codes=()
  shown=$(wc -c <"$logs/worker-0.log")
  pids=()
  start_all "$@"
  # A signal may have come during the start.
  if [[ $signalled ]]; then kill "-$signalled" "${pids[@]}" 2>/dev/null || :; fi
  tail -s "$POLL_SECONDS" -c "+$((shown + 1))" -f --pid="${pids[0]}" "$logs/worker-0.log" &
  while :; do
    running=0
    for i in "${!pids[@]}"; do
      if [[ ${codes[i]:-} ]]; then continue; fi
      if kill -0 "${pids[i]}" 2>/dev/null; then running=1 && continue; fi
      codes[i]=0 && wait "${pids[i]}" || codes[i]=$?
      if ((codes[i])); then failed=${failed:-$SECONDS}; fi
    done
    ((running)) || break
    if [[ $failed && ! $signalled ]] && ((SECONDS - failed >= ${GRACE_SECONDS:-75})); then kill_all; fi
    sleep "$POLL_SECONDS" || :
  done
  kill_all # any processes that they left behind
  await $! || :
  status=$(most_telling "${codes[@]}")
}

if ((dry_run)); then
  if ((processes > 1)); then end=' &\n' && start_all "$@" && printf 'wait\n'; else end='\n' && start_all "$@"; fi
  exit 0
fi
mkdir -p "$logs" && : >>"$logs/worker-0.log"
printf '%s\n' "$(quoted "$@")" >"$logs/command.txt"
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP
for ((restart = 1; ; restart++)); do
  run_once "$@"
  if [[ $signalled ]] || ! again "$status" || ((restart > restarts)); then exit "$status"; fi
  say "restart $restart of $restarts after $(reason "$status")"
done
