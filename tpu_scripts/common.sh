# shellcheck shell=bash
# What the scripts share; sourced, not run.

# How often they look whether a process is still there.
export POLL_SECONDS=${POLL_SECONDS:-1}

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

# Sets the variable that an option --NAME=VALUE is named after.
set_option() {
  local option=${1%%=*}
  printf -v "${option#--}" '%s' "${1#*=}"
}

quoted() {
  local line
  printf -v line ' %q' "$@"
  printf '%s' "${line# }"
}

# To be put into the background: a command in a session of its own, which a terminal's Ctrl-C does not reach. It gets
# one signal, from the script's own handler, and not two. bash would also have it ignore SIGINT; and it must not
# outlive the script.
in_own_session() { exec setsid env --default-signal=INT,QUIT setpriv --pdeathsig TERM "$@" </dev/null; }

# Does a line of shell so that a signal to the script need not wait for it, or prints it.
dry_run=0 child=''
step() {
  if ((dry_run)); then printf '%s\n' "$1" && return; fi
  in_own_session bash -euo pipefail -c "$1" &
  child=$!
  await "$child"
}

# Prints the line of shell that does $2 on worker $1 of the pod that the rest names. A pod that is gone is noticed after
# two minutes.
on_worker() {
  # shellcheck disable=SC2086 # several flags
  quoted gcloud compute tpus tpu-vm ssh "${@:3}" "--worker=$1" --quiet --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oConnectTimeout=20 ${GCLOUD_SSH_FLAGS:-} "--command=$2"
}

# Waits until process $1 is gone, whatever signals come meanwhile, and returns its status.
await() {
  while kill -0 "$1" 2>/dev/null; do wait "$1" || :; done
  wait "$1"
}

# Whether status $1 says that the same command, given again, goes on: stopped from outside, or killed.
again() { (($1 == 75 || ($1 >= 128 && $1 != 130))); }

# Of several statuses the one that says most: an error that the user must mend, then 75, then a kill.
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
