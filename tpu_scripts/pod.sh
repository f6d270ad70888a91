#!/usr/bin/env bash
# Creates, restores and deletes TPU pods: queued resources with one node each, of the same name.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
Usage: pod.sh create|status|restore|delete NAME --zone ZONE [--project PROJECT] … [-- FLAGS OF gcloud … create]
       pod.sh list --zone ZONE [--project PROJECT]

  create    request the pod, unless it exists, and wait until it is ready
  status    print its state in one word: READY, MISSING, PREEMPTED, SUSPENDED, WAITING_FOR_RESOURCES …
  restore   wait if it is being created or repaired; recreate it, as it was, if it was preempted, failed or is missing
  delete    delete it; does nothing if it does not exist

  --type TYPE         for example v5litepod-64 (the default), v5p-128, v6e-32
  --version VERSION   of the TPU's software (default: the one meant for JAX on this type)
  --spot              cheaper, but may be preempted
  --timeout SECONDS   stop waiting, with status 75 (default: wait as long as it takes)
  --dry-run           print the commands and do nothing

~/.config/echo_jax/pods records how each pod was requested. The state is checked every WAIT_SECONDS (default 30).
EOF
}

action='' pod='' zone='' project='' type='' version='' spot=() timeout='' dry_run=0
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --zone | --project | --type | --version | --timeout)
      (($# > 1)) || die "$1 needs a value"
      set -- "$1=$2" "${@:3}" && continue
      ;;
    --zone=* | --project=* | --type=* | --version=* | --timeout=*) set_option "$1" ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    -*) die "unknown option $1" ;;
    *) if [[ ! $action ]]; then action=$1; elif [[ ! $pod ]]; then pod=$1; else die "unexpected $1"; fi ;;
  esac
  shift
done
[[ $action =~ ^(create|status|restore|delete|list)$ ]] || die 'the action must be create, status, restore, delete or list'
[[ $pod || $action == list ]] || die 'the NAME of the pod is missing'
[[ $zone ]] || die '--zone ZONE is missing'
declare -A images=([v5litepod]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e [v4]=tpu-ubuntu2204-base)
kind=${type:-v5litepod-64} && version=${version:-${images[${kind%%-*}]:-}}
[[ $version ]] || die "no default software version for $kind; set --version"
flags=("--accelerator-type=$kind" "--runtime-version=$version" "${spot[@]}" "$@")
place=("--zone=$zone" ${project:+"--project=$project"})
queue=(gcloud compute tpus queued-resources)
request=${XDG_CONFIG_HOME:-$HOME/.config}/echo_jax/pods/${project:-default}.$zone.$pod
step() { if ((dry_run)); then quoted "$@" && printf '\n'; else "$@"; fi; }

# Runs a command on the pod. If the pod does not exist, it prints nothing and succeeds.
unless_missing() {
  local error
  if ((dry_run)); then step "$@" "$pod" "${place[@]}" && return; fi
  { error=$("$@" "$pod" "${place[@]}" 2>&1 >&3); } 3>&1 && return
  [[ $error == *NOT_FOUND* ]] || { printf '%s\n' "$error" >&2 && return 1; }
}

# Sets `state` to that of the queued resource or, once it is ACTIVE, of the TPU. Fails if gcloud does not tell it.
look() {
  local text
  text=$(unless_missing "${queue[@]}" describe --format=yaml) || return
  state=$(awk '$1 == "state:" && NF == 2 { print $2; exit }' <<<"$text")
  if [[ $state && ! -e $request ]]; then # requested elsewhere
    sed -En 's/^ *acceleratorType: /--accelerator-type=/p; s/^ *runtimeVersion: /--runtime-version=/p; s/^spot:.*/--spot/p' \
      <<<"$text" >"$request"
  fi
  [[ $state != ACTIVE ]] || state=$(unless_missing gcloud compute tpus tpu-vm describe --format='value(state)') || return
  state=${state:-MISSING}
}
await_ready() {
  local before='' began=$SECONDS waits=1
  until look && [[ $state == READY ]]; do
    if [[ $state != "$before" ]] || ((waits % 20 == 0)); then say "$pod is $state after $((SECONDS - began)) s"; fi
    if [[ $state =~ $gone ]]; then return 1; fi
    if [[ $timeout ]] && ((SECONDS - began >= timeout)); then say "gave up after $timeout s" && exit 75; fi
    before=$state waits=$((waits + 1)) && sleep "${WAIT_SECONDS:-30}"
  done
  say "$pod is READY"
}
gone='^(PREEMPTED|FAILED|SUSPENDED|TERMINATED|MISSING)$' state=MISSING
if [[ $action == list ]]; then step "${queue[@]}" list "${place[@]}" && exit 0; fi
if ((!dry_run)); then mkdir -p "${request%/*}" && look; fi
case $action in
  status) if ((dry_run)); then unless_missing "${queue[@]}" describe; else printf '%s\n' "$state"; fi && exit 0 ;;
  delete) unless_missing "${queue[@]}" delete --force --quiet && { ((dry_run)) || rm -f "$request"; } && exit 0 ;;
  create) [[ $state == MISSING ]] || { say "$pod exists" && await_ready && exit 0; } || exit ;;
  restore)
    [[ $state =~ $gone ]] || { await_ready && exit 0; } || :
    if [[ -s $request ]]; then mapfile -t flags <"$request"; elif [[ ! $type ]]; then die "$pod is unknown; set --type"; fi
    unless_missing "${queue[@]}" delete --force --quiet
    ;;
esac
step "${queue[@]}" create "$pod" "${place[@]}" "--node-id=$pod" "${flags[@]}" --quiet
if ((!dry_run)); then printf '%s\n' "${flags[@]}" >"$request" && await_ready; fi
