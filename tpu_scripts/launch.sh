#!/usr/bin/env bash
# Starts one run or a sweep, here or on a TPU pod, and records next to it how to start it again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"

usage() {
  cat <<'EOF'
Usage: launch.sh --local N | --pod NAME --zone ZONE  [--sweep] --config=PATH --workdir=DIR [--config.x=value …]

  --local N       run on this machine, as N processes
  --pod NAME      run on all workers of this TPU pod; needs --zone ZONE and perhaps --project PROJECT
  --commit COMMIT with --pod: the commit to run (default: the present HEAD)
  --config=PATH   config file, followed by :arg if it takes one; with --pod committed, and relative to the tree
  --workdir=DIR   where the run stores everything; with --pod absolute, on a file system that all workers share
  --sweep         run every run of the config file's sweep(), not the config itself; --only=REGEX selects some
  --owner=NAME    take only runs that no other owner has (default in a pod's sweep: the pod)
  --logs=DIR      with --sweep: folder of the runs' logs and the table (default with --pod: runs/pods/POD/…)
  --report        with --sweep: start nothing, only tabulate existing results
  --restarts R    restart up to R times if the run is stopped, lost or preempted (default: 2, with --pod 10)
  --dry-run       print the exact commands and do nothing

Other arguments go to the program. PYTHON is the interpreter (default: that of an activated environment, of .venv in this
repository, or python on PATH). Paths are relative to the current
folder. Output goes to the screen and to DIR/launch/worker-0.log etc.; each run records commit, diff and versions in
provenance.jsonl. The same command resumes. The exit status is that of the program; of several processes, the most
telling one: 0 complete, 1 an error to fix, 2 wrong use, 69 owned by another, 75 the same command resumes.
EOF
}

local='' pod='' zone='' project='' commit=HEAD restarts='' sweep=0 report=0 config='' workdir='' owner='' logs='' dry=()
arguments=()
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --local | --pod | --zone | --project | --restarts | --commit)
      (($# > 1)) || die "$1 needs a value"
      set -- "$1=$2" "${@:3}" && continue
      ;;
    --local=* | --pod=* | --zone=* | --project=* | --restarts=* | --commit=*) set_option "$1" ;;
    --sweep) sweep=1 ;;
    --report) report=1 ;;
    --dry-run) dry=(--dry-run) ;;
    --config | --workdir | --owner | --logs | --only) die "write $1=VALUE" ;;
    --logs=*) logs=${1#*=} ;;
    --owner=*) owner=${1#*=} && arguments+=("$1") ;;
    --config=*) config=${1#*=} && arguments+=("$1") ;;
    --workdir=*) workdir=${1#*=} && arguments+=("$1") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ $local$pod ]] || die 'give --local N, or --pod NAME --zone ZONE'
[[ ! $local || ! $pod ]] || die '--local and --pod exclude each other'
[[ $pod || $local =~ ^[1-9][0-9]*$ ]] || die "--local $local is not a number of processes"
[[ $restarts =~ ^[0-9]*$ ]] || die "--restarts $restarts is not a number"
[[ ! $pod || $zone ]] || die '--pod needs --zone ZONE'
[[ $config ]] || die '--config=PATH is missing'
[[ $workdir ]] || die '--workdir=DIR is missing'
if [[ $logs ]] || ((report)); then ((sweep)) || die '--logs and --report need --sweep'; fi
python=${PYTHON:-python}
if [[ ! ${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $root/.venv/bin/python ]]; then
  python=$root/.venv/bin/python
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ $pod ]]; then
  [[ $workdir == /* ]] || die "--workdir=$workdir is not absolute; all workers of the pod must share it"
  sha=$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}") || die "there is no commit $commit"
  git -C "$root" cat-file -e "$sha:${config%%:*}" 2>/dev/null || die "${config%%:*} is not committed in $root"
  [[ ${dry[*]} ]] || command -v gcloud >/dev/null || die 'gcloud is not on PATH'
  where=("--pod=$pod" "--zone=$zone" "--commit=$sha" ${project:+"--project=$project"})
  again=("--restarts=${restarts:-10}")
  ((sweep)) || exec "$here/pod_run.sh" "${where[@]}" "${again[@]}" "--workdir=$workdir" "${dry[@]}" -- "${arguments[@]}"
  if [[ ! $owner ]]; then arguments+=("--owner=$pod"); fi
  logs=$(realpath -m "${logs:-$root/runs/pods/$pod/${workdir##*/}}")
  if [[ $python == */* ]]; then python=$(realpath -s "$python"); fi
  cd "$root" # the config file's path is relative to the repository, here as on the pod
  options=("--launcher=$(quoted "$here/launch.sh" "${where[@]}" "${again[@]}")" "--logs=$logs"
    "--table=$(quoted "$here/ship.sh" "${where[@]}" -- --report "--config=$config" "--workdir=$workdir")")
else
  on_machine=("$here/local.sh" "--logs=$workdir/launch" "${dry[@]}")
  on_machine+=("--processes=$local" "--restarts=${restarts:-2}" -- "$python" -m echo_jax.train "${arguments[@]}")
  ((sweep)) || exec "${on_machine[@]}"
  options=(${logs:+"--logs=$logs"})
  if [[ $local != 1 || $restarts ]]; then
    options+=("--launcher=$(quoted "$here/launch.sh" "--local=$local" "--restarts=${restarts:-2}")")
  fi
fi
command=("$python" -m echo_jax.sweep "${arguments[@]}" "${options[@]}")
if ((report)); then command+=(--report); fi
if [[ ${dry[*]} ]]; then exec "${command[@]}" --dry_run; fi
if ((report)); then exec "${command[@]}"; fi
exec "$here/local.sh" "--logs=${logs:-$workdir}/launch" --restarts=0 -- "${command[@]}"
