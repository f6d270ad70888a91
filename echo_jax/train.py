"""Trains an agent: a warm start on scripted demonstrations, then ECHO on its own rollouts.

    python -m echo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart --config.seed=1

Run again on the same workdir, it resumes. The workdir holds config.json, provenance.jsonl (commit, diff and versions,
one line a start), metrics.jsonl (one object a step), tensorboard/, rollouts/, checkpoints/ and, with a KL, reference/;
and DONE when the run is complete. Ctrl-C and SIGTERM save a checkpoint and stop.

Several processes (see system/peers.py) train one run, in a workdir that all of them see. Each samples its share of a
step's rollouts with an engine of its own, then all update together; process 0 writes what is written once. Exit
statuses: 0 complete, 75 stopped by SIGTERM or because a process was lost (the same command again goes on), 69 the
workdir is another's, 130 stopped by Ctrl-C, 1 an error to mend.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from echo_jax.run.build import start_peers
from echo_jax.run.runner import train
from echo_jax.system.cli import run_program


def main(args: flags.FlagValues) -> int:
    with start_peers(args.config) as peers:
        return train(args.config, Path(args.workdir), owner=args.owner, peers=peers)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file; override any field with --config.section.field=value."
    )
    flags.DEFINE_string("workdir", None, "Folder of the run; an unfinished run in it is resumed.")
    flags.DEFINE_string("owner", "", "Take the run only if no other owner has: for several that share one sweep.")
    run_program(main)
