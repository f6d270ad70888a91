#!/usr/bin/env bash
# Runs one command at a time on this worker of a pod, and survives a lost connection. pod_run.sh calls it.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
Usage: worker.sh --attempt=ID --logs=DIR -- COMMAND …
       worker.sh --attempt=ID --stop=SIGNAL

  --attempt=ID    names this start of the run; the same on all workers
  --logs=DIR      append the output to DIR/worker-W.log, where W is this worker's number in the pod
  --stop=SIGNAL   send SIGNAL to the active run, and start nothing more under this ID

The command continues if the connection is lost; the same command again shows its output and waits for it, and a
different one is refused. The last line is "echo_jax: worker W ended with status S (ID)"; pod_run.sh reads it, because
gcloud passes on the status of only one worker. ~/echo_jax/state describes the active run.
EOF
}

attempt='' logs='' signal=''
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --attempt=*) attempt=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --stop=*) signal=${1#*=} ;;
    --) shift && break ;;
    *) die "unknown option $1" ;;
  esac
  shift
done
[[ $attempt ]] || die '--attempt=ID is missing'
if [[ ! $signal ]]; then [[ $logs && $# != 0 ]] || die '--logs=DIR or the command after -- is missing'; fi

state=$HOME/echo_jax/state
mkdir -p "$state"
metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
worker=${TPU_WORKER_ID:-$(curl -sf -m 10 -H 'Metadata-Flavor: Google' "$metadata/agent-worker-number" || echo 0)}
noted() { cat "$state/$1" 2>/dev/null || :; }
finish() { # A newline first: ssh may have left half a line of another worker.
  printf '\necho_jax: worker %s ended with status %s (%s)\n' "$worker" "$1" "$attempt"
  exit "$1"
}
# Shows the log from byte $1 on until the run ends, then prints how it ended.
follow() {
  tail -s "$POLL_SECONDS" -c "+$(($1 + 1))" -f --pid="$(noted runner)" "$(noted log)" | sed -u "s/^/[$worker] /" || :
  local code
  code=$(noted status)
  finish "${code:-137}" # no status: the runner was killed before it wrote one
}

# Starts the command and records its exit status. Both hold the lock.
runner() {
  trap '' HUP
  local code=0
  (exec setsid env --default-signal=INT,QUIT "$@" </dev/null >>"$log" 2>&1) &
  printf '%s' $! >"$state/pid"
  wait $! || code=$?
  printf '%s' "$code" >"$state/status"
}

exec 9>>"$state/lock"
if [[ $signal ]]; then
  printf '%s' "$attempt" >"$state/stopped"
  if flock -n 9; then exit 0; fi
  if [[ $signal == KILL ]]; then group=-; else group=''; fi # for other signals the program ends its children itself
  say "worker $worker: sending SIG$signal"
  kill "-$signal" -- "$group$(noted pid)" || :
  exit 0
fi
command="$PWD: $(quoted "$@")"
if ! flock -n 9; then
  exec 9>&-
  if [[ $(noted command) == "$command" ]]; then
    printf '[%s] this run is already active here; its log from now on:\n' "$worker"
    follow "$(wc -c <"$(noted log)")"
  fi
  say "another run is active on worker $worker: $(noted command)"
  say "to stop it, run on all workers: $0 --attempt=none --stop=TERM"
  finish 1
fi
# gcloud repeats the command after a lost connection: by then the run may have ended, or been asked to stop.
if [[ $(noted attempt) == "$attempt" && $(noted status) ]]; then finish "$(noted status)"; fi
if [[ $(noted stopped) == "$attempt" ]]; then finish 75; fi
mkdir -p "$logs"
log=$logs/worker-$worker.log
rm -f "$state/status" "$state/pid"
for name in command attempt log; do printf '%s' "${!name}" >"$state/$name"; done
if ((worker == 0)); then printf '%s\n' "$(quoted "$@")" >"$logs/command.txt"; fi
: >>"$log"
shown=$(wc -c <"$log")
runner "$@" </dev/null >/dev/null 2>&1 &
printf '%s' $! >"$state/runner"
exec 9>&-
follow "$shown"
