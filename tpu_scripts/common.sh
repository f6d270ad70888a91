# shellcheck shell=bash
# Shared functions of the scripts; sourced, not run.

# Seconds between checks whether a process is still running.
export POLL_SECONDS=${POLL_SECONDS:-1}

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

# Sets the variable NAME for an option --NAME=VALUE.
set_option() {
  local option=${1%%=*}
  printf -v "${option#--}" '%s' "${1#*=}"
}

quoted() {
  local line
  printf -v line ' %q' "$@"
  printf '%s' "${line# }"
}

# Runs a command in a new session; call it in the background. A terminal's Ctrl-C does not reach it, so it gets one
# signal, from the script's handler, and not two. It resets SIGINT, which bash makes background commands ignore, and
# the command dies with the script.
in_new_session() { exec setsid env --default-signal=INT,QUIT setpriv --pdeathsig TERM "$@" </dev/null; }

# Runs a line of shell in the background, so that the script handles signals meanwhile; or prints it.
dry_run=0 child=''
step() {
  if ((dry_run)); then printf '%s\n' "$1" && return; fi
  in_new_session bash -euo pipefail -c "$1" &
  child=$!
  await "$child"
}

# Prints the line of shell that runs $2 on worker $1 of the pod; the other arguments name the pod. ssh notices a lost
# pod after two minutes.
on_worker() {
  # shellcheck disable=SC2086 # several flags
  quoted gcloud compute tpus tpu-vm ssh "${@:3}" "--worker=$1" --quiet --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oConnectTimeout=20 ${GCLOUD_SSH_FLAGS:-} "--command=$2"
}

# Waits until process $1 has ended, whatever signals come meanwhile, and returns its status.
await() {
  while kill -0 "$1" 2>/dev/null; do wait "$1" || :; done
  wait "$1"
}

# Whether the same command would resume after status $1: the run was stopped from outside, or killed.
again() { (($1 == 75 || ($1 >= 128 && $1 != 130))); }

# Prints the most telling of several statuses: first an error that the user must fix, then 75, then a kill.
most_telling() {
  local status rank best=0 best_rank=0
  for status; do
    if ((status == 0)); then rank=0; elif ((status == 75)); then rank=2; elif again "$status"; then rank=1; else rank=3; fi
    if ((rank > best_rank)); then best=$status best_rank=$rank; fi
  done
  printf '%s' "$best"
}

reason() {
  case $1 in
    75) printf 'status 75: it was stopped, or another process of the run was lost' ;;
    255) printf 'the connection was lost' ;;
    *) if (($1 > 128)); then printf 'status %s: killed by signal %s' "$1" $(($1 - 128)); else printf 'status %s' "$1"; fi ;;
  esac
}
