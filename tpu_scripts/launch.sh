#!/usr/bin/env bash
# Starts one run or a sweep, and keeps beside it what is needed to start it again. `--help` says how.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: launch.sh --local 1 [--sweep] [--dry-run] --config=PATH --workdir=DIR [--config.field=value …]

  --local N      run on this machine, as N processes (so far only 1)
  --sweep        run every run of the config file's sweep(), not the config itself
  --dry-run      print the exact commands and do nothing
  --config=PATH  config file, with :arg behind it if it takes one
  --workdir=DIR  where the run keeps everything; the same command again resumes it

Anything else is passed on. PYTHON names the interpreter (default: python). Paths are relative to the current folder.
The command goes to DIR/launch/command.txt, the output to the screen and to DIR/launch/worker-0.log; each run records
commit, diff and versions itself, in provenance.jsonl. The exit status is that of the program.
EOF
}

die() {
  printf 'launch.sh: %s\n' "$1" >&2
  exit 2
}

processes='' sweep=0 dry_run=0 config='' workdir=''
arguments=()
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --local) (($# > 1)) || die '--local needs a number' && processes=$2 && shift ;;
    --local=*) processes=${1#*=} ;;
    --sweep) sweep=1 ;;
    --dry-run) dry_run=1 ;;
    --config | --workdir) die "write $1=VALUE" ;;
    --config=*) config=${1#*=} && arguments+=("$1") ;;
    --workdir=*) workdir=${1#*=} && arguments+=("$1") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ $processes == 1 ]] || die "only --local 1 so far${processes:+, not --local $processes}"
[[ $config ]] || die '--config=PATH is missing'
[[ $workdir ]] || die '--workdir=DIR is missing'

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
module=echo_jax.train
if ((sweep)); then module=echo_jax.sweep; fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
command=("$python" -m "$module" "${arguments[@]}")

if ((dry_run)); then
  if ((sweep)); then exec "${command[@]}" --dry_run; fi
  printf 'PYTHONPATH=%q' "$PYTHONPATH"
  printf ' %q' "${command[@]}"
  printf '\n'
  exit 0
fi

launch=$workdir/launch
mkdir -p "$launch"
{
  printf '%q ' "${command[@]}"
  printf '\n'
} >"$launch/command.txt"

# tee ignores Ctrl-C, so that it still writes what the program says while it stops; pipefail keeps the exit status.
"${command[@]}" 2>&1 | tee -ia "$launch/worker-0.log"
