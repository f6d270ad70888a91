#!/usr/bin/env bash
# Runs echo_jax.train on all workers of a TPU pod until it completes, through preemptions. launch.sh calls it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"

usage() {
  cat <<'EOF'
Usage: pod_run.sh --pod=NAME --zone=ZONE [--project=P] --workdir=DIR [OPTIONS] -- ARGUMENTS

  --pod=NAME, --zone=ZONE, --project=P   the pod, which pod.sh creates
  --workdir=DIR   on a file system that all workers share; the logs go to DIR/launch/worker-W.log there
  --commit=COMMIT the commit to run, also after restarts (default: the present HEAD)
  --restarts=R    how often to restart a run that was stopped, lost or preempted (default 10)
  --dry-run       print the commands and do nothing

Ships the tree (ship.sh), then runs it with worker.sh on all workers. SIGINT and SIGTERM go to the run; a second signal
kills it, a third closes the connection. The state of the pod is checked every WAIT_SECONDS (default 30).
EOF
}

pod='' zone='' project='' workdir='' restarts=10 commit=HEAD
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --pod=* | --zone=* | --project=* | --workdir=* | --restarts=* | --commit=*) set_option "$1" ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "unknown option $1" ;;
  esac
  shift
done
[[ $pod && $zone && $workdir ]] || die '--pod, --zone or --workdir is missing'

place=("$pod" "--zone=$zone" ${project:+"--project=$project"})
output=$(mktemp -u) # created on the first write
sha=$(git -C "$root" rev-parse "$commit")
tree="\$HOME/echo_jax/$sha"
ship=("$here/ship.sh" "--commit=$sha" "--pod=$pod" "--zone=$zone" ${project:+"--project=$project"})
attempt='' signals=0

pass_on() {
  signals=$((signals + 1))
  if [[ ! $attempt ]] || ((signals > 2)); then
    kill -TERM -- "-$child" 2>/dev/null || :
  else
    say "passing the signal on to the workers"
    if ((signals == 1)); then stop=$1; else stop=KILL; fi
    in_new_session bash -c "$(on_worker all "$tree/tpu_scripts/worker.sh --attempt=$attempt --stop=$stop" "${place[@]}")" &
  fi
}

# Runs it once; sets `status`, and `ended`: "W S" for each worker W that ended with status S.
run_once() {
  local id command
  id=$(date +%s)-$$-$restart # two starts may happen in one second
  command="cd $tree && PYTHONPATH=\$PWD ECHO_JAX_CLUSTER=auto exec tpu_scripts/worker.sh --attempt=$id"
  command+=" $(quoted "--logs=$workdir/launch") -- \$HOME/echo_jax/venv/bin/python -m echo_jax.train $(quoted "$@")"
  command=$(on_worker all "$command" "${place[@]}")
  if ((dry_run)); then step "$command" && return; fi
  : >"$output" && trap 'rm -f "$output"' EXIT
  in_new_session bash -c "exec $command" >>"$output" 2>&1 &
  child=$! attempt=$id status=0
  if ((signals)); then signals=0 && pass_on INT; fi # a signal came just before the start
  tail -s "$POLL_SECONDS" -c +1 -f --pid="$child" "$output" &
  shown=$!
  await "$child" || status=$?
  attempt='' && await "$shown" || :
  ended=$(sed -n "s/^echo_jax: worker \(.*\) ended with status \(.*\) ($id)\$/\1 \2/p" "$output")
}

restart=1
if ((dry_run)); then "${ship[@]}" --dry-run && run_once "$@" && exit; fi
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP
for (( ; ; restart++)); do
  status=0 ended='' state=''
  step "$(quoted "${ship[@]}")" || status=$?
  if ((status == 0 && !signals)); then run_once "$@"; fi
  # gcloud exits with the status of the first worker that failed, or with an error status of gcloud itself.
  mapfile -t codes < <(cut -d' ' -f2 <<<"$ended")
  worst=$(most_telling "${codes[@]}") && status=$((worst ? worst : status))
  if ((worst)) && ! again "$worst"; then
    worker=$(awk -v "status=$worst" '$2 == status { print $1; exit }' <<<"$ended")
    say "worker $worker ended with status $worst; its log on the pod: $workdir/launch/worker-$worker.log" && exit "$worst"
  fi
  if ((signals)); then exit $((status ? status : 130)); elif ((status == 0)); then exit 0; fi
  # If gcloud cannot tell the state, this machine's network may be down: no reason to recreate the pod.
  for ((asked = 0; asked < 20 && !signals; asked++)); do
    if state=$("$here/pod.sh" status "${place[@]}"); then break; fi
    sleep "${WAIT_SECONDS:-30}" || :
  done
  if [[ ! $state ]]; then say 'the state of the pod is unknown; the same command resumes' && exit 75; fi
  if [[ $state == READY ]] && ! again "$status"; then exit "$status"; fi
  if ((restart > restarts)); then say "gave up after $(reason "$status"); the same command resumes" && exit 75; fi
  say "restart $restart of $restarts after $(reason "$status"); $pod is $state"
  if [[ $state != READY ]]; then step "$(quoted "$here/pod.sh" restore "${place[@]}")"; fi
done
