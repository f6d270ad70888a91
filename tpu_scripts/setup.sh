#!/usr/bin/env bash
# Prepares this machine for the tree that contains the script: Python, packages, sandbox. Running it again is harmless.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$root/tpu_scripts/common.sh"

usage() {
  cat <<'EOF'
Usage: setup.sh [--extra=NAME] [--dry-run]

  --extra=NAME   extra of the package to install (default: tpu)
  --dry-run      print the commands and do nothing

The virtual environment is ~/echo_jax/venv, with Python 3.12 from uv, since TPU images have 3.10; both are downloaded.
It is rebuilt only when setup.py has changed. Then the script tests the sandbox; on Ubuntu 24.04 the sandbox needs a
kernel setting, which the script changes if sudo asks for no password.
EOF
}

extra=tpu dry_run=0
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --extra=*) extra=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    *) die "unknown option $1" ;;
  esac
  shift
done

base=$HOME/echo_jax
venv=$base/venv
step() {
  if ((dry_run)); then printf '%s\n' "$1"; else bash -euo pipefail -c "$1"; fi
}

install() {
  local uv
  if ! uv=$(PATH=$base/bin:$PATH command -v uv); then
    uv=$base/bin/uv
    step "curl -LsSf https://astral.sh/uv/install.sh | env $(quoted "UV_INSTALL_DIR=$base/bin") UV_NO_MODIFY_PATH=1 sh"
  fi
  step "rm -rf $(quoted "$venv")"
  step "$(quoted "$uv" venv --quiet --python 3.12 "$venv")"
  step "$(quoted "$uv" pip install --quiet --python "$venv/bin/python" -e "${root}[$extra]")"
}

# After a lost connection an earlier setup may still be running.
if ((!dry_run)); then mkdir -p "$base" && exec 8>"$base/setup.lock" && flock 8; fi
wanted="$extra $(sha256sum <"$root/setup.py")"
if [[ -x $venv/bin/python && $(cat "$venv/installed" 2>/dev/null) == "$wanted" ]]; then
  say 'the packages are up to date'
else
  lock=$base/state/lock # worker.sh's
  if [[ -e $lock ]] && ! flock -n "$lock" true; then
    say "setup.py has changed, but a run is active here: $(cat "$base/state/command")" && exit 1
  fi
  install
  if ! ((dry_run)); then printf '%s' "$wanted" >"$venv/installed"; fi
fi

probe="cd $(quoted "$root") && $(quoted "$venv/bin/python" -c 'from echo_jax.tools import sandbox; sandbox.probe("auto")')"
setting=kernel.apparmor_restrict_unprivileged_userns
if ((dry_run)); then step "$probe" && exit 0; fi
if bash -c "$probe" 2>/dev/null; then exit 0; fi
if sysctl "$setting" >/dev/null 2>&1; then
  say "the sandbox needs $setting=0"
  sudo -n sysctl -w "$setting=0" || :
fi
# Not an error: the task family maze runs no subprocess.
bash -c "$probe" || say 'the sandbox does not work here, see above; only configs without a shell will run'
