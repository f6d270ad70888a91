#!/usr/bin/env bash
# Runs one command on this worker of a pod, once at a time, whatever becomes of the connection. pod_run.sh calls it.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
Usage: worker.sh --attempt=ID --logs=DIR -- COMMAND …
       worker.sh --attempt=ID --stop=SIGNAL

  --attempt=ID    names this start of the run, the same on all workers
  --logs=DIR      the output goes to DIR/worker-W.log, appended to, where W is this worker's number in the pod
  --stop=SIGNAL   send it to what is at work here, and start nothing more under this ID

The command goes on when the connection is lost; the same command given again shows what it says and waits for it, and
another one is refused. The last line says: "echo_jax: worker W ended with status S (ID)", which is what pod_run.sh
reads, for gcloud passes on the status of one worker only. What is at work stands in ~/echo_jax/state.
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
finish() { # A blank line first: ssh may have left half a line of another worker.
  printf '\necho_jax: worker %s ended with status %s (%s)\n' "$worker" "$1" "$attempt"
  exit "$1"
}
# Shows the log from byte $1 on until the run is over, then says how it ended.
follow() {
  tail -s "$POLL_SECONDS" -c "+$(($1 + 1))" -f --pid="$(noted runner)" "$(noted log)" | sed -u "s/^/[$worker] /" || :
  local code
  code=$(noted status)
  finish "${code:-137}" # none: what should have written it was killed
}

# Starts the command and writes down how it ends. It holds the lock, and so does the command.
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
  if [[ $signal == KILL ]]; then group=-; else group=''; fi # its children are the program's to end
  say "worker $worker: sending SIG$signal"
  kill "-$signal" -- "$group$(noted pid)" || :
  exit 0
fi
command="$PWD: $(quoted "$@")"
if ! flock -n 9; then
  exec 9>&-
  if [[ $(noted command) == "$command" ]]; then
    printf '[%s] this run is at work here already; its log from now on:\n' "$worker"
    follow "$(wc -c <"$(noted log)")"
  fi
  say "worker $worker is at work on another run: $(noted command)"
  say "to stop it, on all workers: $0 --attempt=none --stop=TERM"
  finish 1
fi
# gcloud gives the command again when the connection was lost: the run may be over by now, or was to be stopped.
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
