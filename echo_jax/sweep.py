"""Runs a sweep: every run of a config file's `sweep()`, one after the other on this machine.

    python -m echo_jax.sweep --config=configs/ablations/observation_weight.py --workdir=DIR [--dry_run] [--only=REGEX]

The config file has `get_config(arg=None)` and `sweep()`, which yields one flat dictionary a run, for example
`{"loss.observation_weight": 0.05, "seed": 1}`: that run works in DIR/observation_weight=0.05,seed=1 and logs to log.txt
there. Runs whose workdir holds DONE are skipped, others resume: after an interruption give the same command again.
Further overrides (--config.num_steps=50) go to all runs. A table of the results is printed and kept in DIR/results.csv;
--report prints it at any time and starts nothing.

Several machines share one sweep if each gives an --owner=NAME of its own: a run that another owner has (status 69) is
left to it. --launcher=COMMAND starts each run in place of `python -m echo_jax.train`; the run is done when that ends
with status 0. Where this machine does not see DIR, --logs=FOLDER keeps what is written here, and --table=COMMAND prints
the table.
"""

import shlex
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from echo_jax.run.sweeper import run_sweep
from echo_jax.system.cli import run_program


def main(args: flags.FlagValues) -> int:
    return run_sweep(
        config_flags.get_config_filename(args["config"]),
        Path(args.workdir),
        common=config_flags.get_override_values(args["config"]),
        only=args.only,
        dry_run=args.dry_run,
        report=args.report,
        launcher=shlex.split(args.launcher) or None,
        owner=args.owner,
        logs=Path(args.logs) if args.logs else None,
        table=shlex.split(args.table) or None,
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file with get_config(arg=None) and sweep(); may end in :arg."
    )
    flags.DEFINE_string("workdir", None, "Folder for the runs' workdirs and for results.csv.")
    flags.DEFINE_bool("dry_run", False, "Print the command of every run, and start none.")
    flags.DEFINE_bool("report", False, "Start no run; print the table and write results.csv from what is there.")
    flags.DEFINE_string("launcher", "", "Command that starts a run, in place of `python -m echo_jax.train`.")
    flags.DEFINE_string("owner", "", "Leave runs alone that another owner has taken.")
    flags.DEFINE_string("logs", "", "Folder for the runs' logs and results.csv, where the workdirs are not seen.")
    flags.DEFINE_string("table", "", "Command that prints the table, where the workdirs are not seen.")
    flags.DEFINE_string("only", "", "Start only the runs in whose name this regular expression is found.")
    run_program(main)
