#!/usr/bin/env bash
# Copies the committed tree to all workers of a TPU pod and prepares them. launch.sh does this before each start.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"

usage() {
  cat <<'EOF'
Usage: ship.sh --pod=NAME --zone=ZONE [--project=P] [--commit=COMMIT] [--dry-run] [-- ARGUMENTS]

  --pod=NAME, --zone=ZONE, --project=P   the pod, which pod.sh creates
  --commit=COMMIT                        the commit to ship (default: HEAD)
  --dry-run                              print the commands and do nothing

The tree of that commit goes to ~/echo_jax/COMMIT on every worker, with the commit in .shipped/commit. .shipped/diff
records local changes, which do not run. Then setup.sh runs there. GCLOUD_SSH_FLAGS are added to each ssh and scp, for
example --internal-ip. With ARGUMENTS, worker 0 then runs python -m echo_jax.sweep with them.
EOF
}

pod='' zone='' project='' commit=HEAD
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --pod=* | --zone=* | --project=* | --commit=*) set_option "$1" ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) die "unknown option $1" ;;
  esac
  shift
done
[[ $pod && $zone ]] || die '--pod or --zone is missing'

place=("--zone=$zone" ${project:+"--project=$project"})
sha=$(git -C "$root" rev-parse "$commit")
git=$(quoted git -C "$root")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/echo_jax/ship/$pod.$$
dir=$(quoted "$cache")
archive=echo_jax-$sha.tar
tree="\$HOME/echo_jax/$sha"
if ! git -C "$root" diff --quiet "$sha"; then say "local changes that are not in $sha will not run"; fi

# shellcheck disable=SC2086 # several flags
copy=$(quoted gcloud compute tpus tpu-vm scp "${place[@]}" --worker=all --quiet ${GCLOUD_SSH_FLAGS:-} \
  "$cache/tree.tar" "$pod:$archive")
# Another run may be using an existing tree: leave it in place.
unpack="set -e; mkdir -p $tree.new; tar -xf $archive -C $tree.new; rm $archive; if [ -d $tree ]; then"
unpack+=" cp $tree.new/.shipped/* $tree/.shipped; rm -r $tree.new; else mv $tree.new $tree; fi; $tree/tpu_scripts/setup.sh"

if ((!dry_run)); then trap 'rm -rf "$cache"' EXIT; fi
step "mkdir -p $dir/.shipped && echo $sha >$dir/.shipped/commit && $git diff $sha >$dir/.shipped/diff"
step "$git archive --output=$dir/tree.tar $sha && tar -rf $dir/tree.tar -C $dir .shipped"
step "$copy"
step "$(on_worker all "$unpack" "$pod" "${place[@]}")"
if (($#)); then
  command="cd $tree && PYTHONPATH=\$PWD \$HOME/echo_jax/venv/bin/python -m echo_jax.sweep $(quoted "$@")"
  step "$(on_worker 0 "$command" "$pod" "${place[@]}")"
fi
