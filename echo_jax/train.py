"""Trains an agent: a warm start on scripted demonstrations, then ECHO on its own rollouts.

    python -m echo_jax.train --config=configs/quickstart.py --workdir=runs/quickstart --config.seed=1

The same command resumes the run in its workdir; with a larger num_steps it extends the run. The workdir holds
config.json, provenance.jsonl (commit, diff and versions, one line per start), metrics.jsonl (one object per step),
tensorboard/, rollouts/, checkpoints/, with a KL also reference/, and DONE once the run is complete. Ctrl-C, SIGTERM and
closing the terminal save a checkpoint and stop.

Several processes (see system/peers.py) can train one run, in a workdir that all of them see. Each samples its share of
a step's rollouts with its engine, then all update together; process 0 writes the files that exist once. Exit statuses:
0 complete, 75 stopped by SIGTERM or SIGHUP or because a process was lost (the same command resumes), 69 the workdir
belongs to another owner or process, 130 stopped by Ctrl-C, 1 an error to fix.
"""

from absl import flags

from echo_jax.config import may_add
from echo_jax.system.cli import define_config, define_path, run_program


def main(args: flags.FlagValues) -> int:
    # These take seconds to import, which --help and a misspelt flag need not wait for.
    from echo_jax.run.build import start_peers
    from echo_jax.run.lifecycle import train

    with start_peers(args.config) as peers:
        if args.init_from:
            args.config.init_from = args.init_from
        return train(args.config, args.workdir, owner=args.owner, peers=peers)


if __name__ == "__main__":
    define_config(may_add)
    define_path("workdir", "Folder of the run; resumes an unfinished run in it.")
    flags.DEFINE_string(
        "init_from",
        "",
        "WORKDIR or WORKDIR:STEP of a run with the same warm start, whose weights this one starts from.",
    )
    flags.DEFINE_string(
        "owner", "", "Train only if no other owner has taken the run; lets several machines share one sweep."
    )
    run_program(main, outlives_output=True)
